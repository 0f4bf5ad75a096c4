"""PostgreSQL's refusals, in the languages that a server may speak (``lc_messages``).

A refused client is given no SQLSTATE, only a text. Here are the words that tell it: all languages
into which PostgreSQL 15 is translated (src/backend/po), each in this order: English, German,
Spanish, French, Italian, Japanese, Georgian, Korean, Russian, Swedish, Ukrainian, Chinese. They
avoid letters that a server whose LC_CTYPE is C turns into question marks, where that can be. Wrong
credentials are known in English only: in other languages they are no known fault, so nobody tries
again.
"""

from __future__ import annotations

TOO_MANY_CLIENTS = (
    "too many clients already",
    "schon zu viele Verbindungen",
    "ya tenemos demasiados clientes",
    "trop de clients sont d",
    "troppi client gi",
    "現在クライアント数が多すぎます",
    "უკვე მეტისმეტად ბევრი კლიენტია",
    "최대 동시 접속자 수를 초과했습니다",
    "уже слишком много клиентов",
    "nga klienter",
    "вже забагато клієнтів",
    "已经有太多的客户",
)
SLOTS_ARE_RESERVED = (
    "remaining connection slots are reserved",
    "verbleibenden Verbindungen sind f",
    "las conexiones restantes est",
    "emplacements de connexions restants",
    "rimanenti slot di connessione",
    "残りの接続スロットは",
    "남은 연결 슬롯은",
    "оставшиеся слоты подключений",
    "resterande anslutningsslottar",
    "слоти підключень, які залишились",
    "已保留的连接位置",
)
TOO_MANY_CONNECTIONS = (  # for a role or a database
    "too many connections for",
    "zu viele Verbindungen von",
    "zu viele Verbindungen f",
    "demasiadas conexiones para",
    "trop de connexions pour",
    "troppe connessioni",
    "接続が多すぎます",
    "ბევრი კავშირი",
    "접속수를 초과했습니다",
    "слишком много подключений",
    "nga uppkopplingar",
    "занадто багато підключень",
    "的连接太多了",
)
NOT_READY = (  # starting up, shutting down, in recovery, not accepting connections
    "the database system is",
    "das Datenbanksystem",
    "el sistema de base",
    "me de base",
    "il database si sta",
    "di ripristino",
    "il sistema di database",
    "データベースシステムは",
    "მონაცემთა ბაზის სისტემ",
    "데이터베이스 시스템",
    "система баз данных",
    "система БД",
    "databassystemet",
    "система бази даних",
    "数据库系统",
)
TERMINATING = (  # the connection: the server is shut down, or has crashed
    "terminating connection",
    "Verbindung wird abgebrochen",
    "terminando la conexi",
    "t des connexions suite",
    "t de la connexion",
    "interruzione della connessione",
    "stata terminata a causa",
    "管理者コマンドにより接続を終了",
    "クラッシュしたため接続を終了",
    "postmasterの終了のため",
    "მიერთების შეწყვეტა",
    "연결을 끝냅니다",
    "연결을 중지합니다",
    "연결을 종료합니다",
    "закрытие подключения",
    "avslutar anslutning",
    "avbryter anslutning",
    "завершення підключення",
    "中断联接",
    "终止连接",
)
