"""The servers agree: what is said to be held is there, in this session alone, until given back."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from django.db import Error, connections

from django_dbhealth.session_state import SessionState
from django_dbhealth.vendors import mysql, postgresql

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from tests.conftest import Database

RULES = {"mysql": mysql.SESSION_RULES, "postgresql": postgresql.SESSION_RULES}

IN_TRANSACTION = {
    "mariadb": "SELECT @@in_transaction",
    # The transaction of a statement by itself begins with it.
    "postgresql": "SELECT now() < statement_timestamp()",
}
MY_LOCK = "SELECT COALESCE(IS_USED_LOCK('a') = CONNECTION_ID(), 0)"
ADVISORY = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
PREPARED = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"
HELD_CURSORS = "SELECT count(*) FROM pg_cursors WHERE is_holdable"
CHANNELS = "SELECT count(*) FROM pg_listening_channels()"
TMP = "SELECT count(*) FROM tmp"
MANY = "1, " * 1000 + "1"

# Statements, a query that tells whether the session has what they made, what gives it back.
HELD_AND_GIVEN_BACK = {
    "mariadb": [
        ("CREATE TEMPORARY TABLE tmp (id int)", TMP, "DROP TABLE tmp"),
        ("CREATE TEMPORARY TABLE `tmp` (id int)", TMP, "DROP TEMPORARY TABLE IF EXISTS x, tmp"),
        ("SET STATEMENT max_statement_time=9 FOR CREATE TEMPORARY TABLE tmp (id int)", TMP, None),
        ("/*!40000 CREATE TEMPORARY TABLE tmp (id int) */", TMP, "DROP TABLE tmp"),
        ("CREATE TEMPORARY SEQUENCE s", "SELECT NEXTVAL(s)", "DROP SEQUENCE s"),
        ("SET @x = 1", "SELECT @x", None),
        ("SELECT @x := 1", "SELECT @x", None),
        ("SELECT 1 INTO @x", "SELECT @x", None),
        ("BEGIN NOT ATOMIC SET @x = 1; END", "SELECT @x", None),
        ("EXECUTE IMMEDIATE 'SET @x = 1'", "SELECT @x", None),
        ("SET sql_mode = 'ANSI'", "SELECT @@sql_mode", "SET sql_mode = DEFAULT"),
        ("SET LOCAL sql_mode = 'ANSI'", "SELECT @@sql_mode", "SET @@sql_mode = DEFAULT"),
        ("SET @@session . sql_mode = 'ANSI'", "SELECT @@sql_mode", None),
        ("SET NAMES latin1", "SELECT @@character_set_client", None),
        ("SET foreign_key_checks=0", "SELECT @@foreign_key_checks", "SET foreign_key_checks=1"),
        ("SET unique_checks = OFF", "SELECT @@unique_checks", "SET unique_checks = ON"),
        ("SET autocommit=0", "SELECT @@autocommit", "SET autocommit=1"),
        ("SET SESSION TRANSACTION READ ONLY", "SELECT @@tx_read_only", None),
        ("USE information_schema", "SELECT DATABASE()", None),
        ("LOCK TABLES app_row READ", "SELECT COUNT(*) FROM app_row AS other", "UNLOCK TABLES"),
        ("HANDLER app_row OPEN AS h", "HANDLER h READ FIRST", "HANDLER h CLOSE"),
        ("PREPARE p FROM 'SELECT 1'", "EXECUTE p", "DEALLOCATE PREPARE p"),
        ("PREPARE p FROM 'SELECT 1'", "EXECUTE p", "DROP PREPARE p"),
        ("BEGIN", IN_TRANSACTION["mariadb"], "COMMIT"),
        ("START TRANSACTION", IN_TRANSACTION["mariadb"], "ROLLBACK WORK AND NO CHAIN"),
        ("COMMIT AND CHAIN", IN_TRANSACTION["mariadb"], "ROLLBACK"),
        ("XA START 'x'", IN_TRANSACTION["mariadb"], "XA END 'x'; XA ROLLBACK 'x'"),
        ("SELECT GET_LOCK('a', 0)", MY_LOCK, "SELECT RELEASE_LOCK('a')"),
        ("DO GET_LOCK('a', 0), GET_LOCK('a', 0)", MY_LOCK, "DO RELEASE_ALL_LOCKS()"),
        (
            "DO GET_LOCK('a', 0), GET_LOCK('a', 0)",
            MY_LOCK,
            "DO RELEASE_LOCK('a');DO RELEASE_LOCK('a')",
        ),
        (
            "INSERT INTO app_row (name, number) SELECT GET_LOCK('a', 0), 1",
            MY_LOCK,
            "DO RELEASE_ALL_LOCKS()",
        ),
    ],
    "postgresql": [
        ("CREATE TEMP TABLE tmp (id int)", TMP, "DROP TABLE tmp"),
        ("CREATE TEMP TABLE Tmp (id int)", TMP, 'DROP TABLE pg_temp."tmp"'),
        ("CREATE TABLE pg_temp.tmp (id int)", TMP, "DROP TABLE IF EXISTS x, tmp CASCADE"),
        ("SELECT 1 AS id INTO TEMP tmp", TMP, "DISCARD TEMP"),
        (
            f"SELECT 1 IS DISTINCT FROM 2 AS a INTO TEMP tmp FROM app_row WHERE id IN ({MANY})",
            TMP,
            "DISCARD TEMP",
        ),
        ("EXPLAIN ANALYZE CREATE TEMP TABLE tmp AS SELECT 1", TMP, "DISCARD TEMP"),
        ("CREATE TEMP VIEW tmp AS SELECT 1", TMP, "DROP VIEW tmp"),
        ("CREATE TEMP SEQUENCE s", "SELECT nextval('s')", "DROP SEQUENCE s"),
        ("/* /* */ SELECT */ SET a.b = 1", "SELECT current_setting('a.b')", None),
        ("SET lock_timeout = 7", "SHOW lock_timeout", "RESET lock_timeout"),
        ("SET lock_timeout TO 7", "SHOW lock_timeout", "SET lock_timeout TO DEFAULT"),
        (
            "SELECT set_config('lock_timeout', '7', false)",
            "SHOW lock_timeout",
            "RESET lock_timeout",
        ),
        ("SET SESSION lock_timeout TO 7", "SHOW lock_timeout", "RESET ALL"),
        (
            "UPDATE pg_settings SET setting = 7 WHERE name = 'lock_timeout'",
            "SHOW lock_timeout",
            "RESET ALL",
        ),
        ("SET TIME ZONE 'Asia/Tokyo'", "SHOW timezone", None),
        ("SET SCHEMA 'x'", "SHOW search_path", "RESET search_path"),
        ('SET search_path TO "default"', "SHOW search_path", "RESET search_path"),
        ("SET NAMES 'LATIN1'", "SHOW client_encoding", None),
        ("SET ROLE shop", "SHOW role", "RESET ROLE"),
        ("SET role = shop", "SHOW role", "DISCARD ALL"),
        (
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SHOW transaction_read_only",
            "RESET ALL",
        ),
        (
            "DO $$ BEGIN PERFORM set_config('lock_timeout', '7', false); END $$",
            "SHOW lock_timeout",
            None,
        ),
        ("SELECT pg_advisory_lock(1)", ADVISORY, "SELECT pg_advisory_unlock(1)"),
        ("SELECT pg_try_advisory_lock(1, 2)", ADVISORY, "SELECT pg_advisory_unlock(1,2)::text"),
        ("SELECT pg_advisory_lock_shared(1)", ADVISORY, "SELECT pg_advisory_unlock_shared(1)"),
        (
            "SELECT pg_advisory_lock(hashtext('a'))",
            ADVISORY,
            "SELECT pg_advisory_unlock(hashtext('a'))",
        ),
        (
            "SELECT pg_advisory_lock(1), generate_series(1, 2)",
            ADVISORY,
            "SELECT pg_advisory_unlock_all()",
        ),
        ("PREPARE p (int) AS SELECT $1", PREPARED, "DEALLOCATE p"),
        ("PREPARE p AS SELECT 1", PREPARED, "DEALLOCATE ALL"),
        ("LISTEN prices", CHANNELS, "UNLISTEN prices"),
        ("LISTEN prices", CHANNELS, "UNLISTEN *"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", HELD_CURSORS, "CLOSE c"),
        ("BEGIN", IN_TRANSACTION["postgresql"], "END"),
        ("BEGIN", IN_TRANSACTION["postgresql"], "ABORT WORK AND NO CHAIN"),
    ],
}

# Statements that seem to give back, and do not.
STILL_HELD = {
    "mariadb": [
        (["DO GET_LOCK('a', 0), GET_LOCK('a', 0)", "DO RELEASE_LOCK('a')"], MY_LOCK),
        (["DO GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('a') FROM app_row WHERE 0"], MY_LOCK),
        (["DO GET_LOCK('a', 0)", "SELECT RELEASE_LOCK('a') LIMIT 0"], MY_LOCK),
        (["CREATE TEMPORARY TABLE tmp (id int)", "DROP TABLE IF EXISTS TMP"], TMP),
        (["CREATE TEMPORARY TABLE tmp (id int)", "/*!999999 DROP TABLE tmp */"], TMP),
        (["BEGIN", "SAVEPOINT s", "ROLLBACK TO s"], IN_TRANSACTION["mariadb"]),
        (["BEGIN", "COMMIT AND CHAIN"], IN_TRANSACTION["mariadb"]),
        (["SET autocommit=0", "COMMIT"], "SELECT @@autocommit"),
    ],
    "postgresql": [
        (["CREATE TEMP TABLE tmp (id int)", "BEGIN", "DROP TABLE tmp", "ROLLBACK"], TMP),
        (["SET lock_timeout = 7", "BEGIN", "RESET ALL", "ROLLBACK"], "SHOW lock_timeout"),
        (
            ["SET lock_timeout = 7", "BEGIN", "SAVEPOINT s", "RESET ALL", "ROLLBACK TO s", "END"],
            "SHOW lock_timeout",
        ),
        (["LISTEN prices", "BEGIN", "UNLISTEN *", "ROLLBACK"], CHANNELS),
        (["SET ROLE shop", "RESET ALL"], "SHOW role"),
        (["SELECT pg_advisory_lock(1)"] * 2 + ["SELECT pg_advisory_unlock(1)"], ADVISORY),
        (
            ["SELECT pg_advisory_lock(1), generate_series(1, 2)", "SELECT pg_advisory_unlock(1)"],
            ADVISORY,
        ),
        (["SELECT pg_advisory_lock(1)", "EXPLAIN SELECT pg_advisory_unlock(1)"], ADVISORY),
    ],
}

# Statements that leave nothing, and a query of which both sessions think the same.
LEFT_NOTHING = {
    "mariadb": [
        (["SET TRANSACTION READ ONLY"], "SELECT @@session.tx_read_only"),
        (["SET STATEMENT max_statement_time=9 FOR SELECT 1"], "SELECT @@max_statement_time"),
        (["SELECT 'SET @x = 1; BEGIN'"], IN_TRANSACTION["mariadb"]),
        (["SELECT 'it\\'s', \"; BEGIN\" -- ; BEGIN"], IN_TRANSACTION["mariadb"]),
    ],
    "postgresql": [
        (["BEGIN", "SET LOCAL lock_timeout = 7", "COMMIT"], "SHOW lock_timeout"),
        (["SELECT set_config('lock_timeout', '7', true)"], "SHOW lock_timeout"),
        (["SELECT pg_advisory_xact_lock(1)"], ADVISORY),
        (["CREATE TEMP TABLE tmp (id int) ON COMMIT DROP"], TMP),
        (["BEGIN", "DECLARE c CURSOR FOR SELECT 1", "COMMIT"], HELD_CURSORS),
        (["BEGIN", "LOCK TABLE app_row", "COMMIT"], ADVISORY),
        (["SET CONSTRAINTS ALL IMMEDIATE"], ADVISORY),
        (
            ["SELECT '\\', '; BEGIN', $x$; BEGIN $x$ /* /* */ ; BEGIN */"],
            IN_TRANSACTION["postgresql"],
        ),
    ],
}


def rows(table: dict[str, list[Any]]) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(kind, row, id=f"{kind}-{row[0][:90]}") for kind in table for row in table[kind]
    ]
    return pytest.mark.parametrize(("database", "row"), parameters, indirect=["database"])


class Session:
    """A connection of its own, and what its statements are said to leave."""

    def __init__(self, database: Database) -> None:
        self.connection: BaseDatabaseWrapper = connections[database.alias].copy()
        self.state = SessionState(RULES[self.connection.vendor])

    def run(self, sql: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
        self.state.observe(sql)

    def answer(self, query: str) -> object:
        """Return what the query says, its error included."""
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(query)
                return cursor.fetchall()
        except Error as error:
            return type(error)

    def close(self) -> None:
        self.connection.close()


def answer_of_a_new_session(database: Database, query: str) -> object:
    with closing(Session(database)) as session:
        return session.answer(query)


@rows(HELD_AND_GIVEN_BACK)
def test_held_until_given_back(database: Database, row: tuple[str, str, str | None]) -> None:
    """What is held is in this session only; given back, the session is like a new one."""
    statement, query, giving_back = row
    with closing(Session(database)) as session:
        session.run(statement)
        assert session.state
        new = answer_of_a_new_session(database, query)
        assert session.answer(query) != new
        if giving_back:
            for part in giving_back.split(";"):
                session.run(part)
            assert session.state.descriptions() == ()
            assert session.answer(query) == new


@rows(STILL_HELD)
def test_still_held(database: Database, row: tuple[list[str], str]) -> None:
    """What only seems to be given back is still there."""
    statements, query = row
    with closing(Session(database)) as session:
        for statement in statements:
            session.run(statement)
        assert session.state
        assert session.answer(query) != answer_of_a_new_session(database, query)


@rows(LEFT_NOTHING)
def test_left_nothing(database: Database, row: tuple[list[str], str]) -> None:
    """What is not counted is not there."""
    statements, query = row
    with closing(Session(database)) as session:
        for statement in statements:
            session.run(statement)
        assert session.state.descriptions() == ()
        assert session.answer(query) == answer_of_a_new_session(database, query)
