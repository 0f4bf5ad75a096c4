"""PostgreSQL's refusals, in the languages that a server may speak (``lc_messages``).

A refused client is given no SQLSTATE, only a text. Here are the words that tell it: all languages
into which PostgreSQL 15 is translated (src/backend/po), each in this order. Wrong credentials are
known in English only: in other languages they are no known fault, so nobody tries again.
"""

from __future__ import annotations

TOO_MANY_CLIENTS = (
    "too many clients already",
    "schon zu viele Verbindungen",  # German
    "ya tenemos demasiados clientes",  # Spanish
    "trop de clients sont déjà connectés",  # French
    "troppi client già connessi",  # Italian
    "現在クライアント数が多すぎます",  # Japanese
    "უკვე მეტისმეტად ბევრი კლიენტია",  # Georgian
    "최대 동시 접속자 수를 초과했습니다",  # Korean
    "уже слишком много клиентов",  # Russian
    "för många klienter",  # Swedish
    "вже забагато клієнтів",  # Ukrainian
    "已经有太多的客户",  # Chinese
)
SLOTS_ARE_RESERVED = (
    "remaining connection slots are reserved",
    "verbleibenden Verbindungen sind für",
    "conexiones restantes están reservadas",
    "emplacements de connexions restants sont réservés",
    "rimanenti slot di connessione sono riservati",
    "残りの接続スロットは",
    "남은 연결 슬롯은",
    "оставшиеся слоты подключений зарезервированы",
    "resterande anslutningsslottar är reserverade",
    "слоти підключень, які залишились, зарезервовані",
    "已保留的连接位置",
)
TOO_MANY_CONNECTIONS = (  # for a role or a database
    "too many connections for",
    "zu viele Verbindungen von Rolle",
    "zu viele Verbindungen für Datenbank",
    "demasiadas conexiones para",
    "trop de connexions pour",
    "troppe connessioni per il ruolo",
    "troppe connessioni al database",
    "からの接続が多すぎます",
    "への接続が多すぎます",
    "მეტისმეტად ბევრი კავშირი როლისთვის",
    "ძალიან ბევრი კავშირი ბაზისთვის",
    "롤의 최대 동시 접속수를 초과했습니다",
    "데이터베이스 최대 접속수를 초과했습니다",
    "слишком много подключений",
    "för många uppkopplingar",
    "занадто багато підключень",
    "的连接太多了",
)
NOT_READY = (  # starting up, shutting down, in recovery, not accepting connections
    "the database system is",
    "das Datenbanksystem",
    "el sistema de base",
    "le système de base",
    "il database si sta",
    "il database è in modalità di ripristino",
    "il sistema di database non accetta",
    "データベースシステムは",
    "მონაცემთა ბაზის სისტემ",
    "데이터베이스 시스템",
    "система баз данных",
    "система БД",
    "databassystemet",
    "система бази даних",
    "数据库系统",
)
