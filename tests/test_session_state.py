"""What statements leave behind in their session, as far as their texts tell."""

from __future__ import annotations

import re

import psycopg2.sql
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql as composed

from django_dbhealth.session_state import OPAQUE, SHORT_TEXT, TRANSACTION, SessionState
from django_dbhealth.vendors import mysql, postgresql

RULES = {"mysql": mysql.SESSION_RULES, "postgresql": postgresql.SESSION_RULES}
VENDORS = tuple(RULES)
LOCK, ADVISORY, SHARED = "lock by GET_LOCK", "advisory lock", "shared advisory lock"


def state_after(vendor: str, *statements: object) -> SessionState:
    """Return the state after statements, each a text or a pair of text and parameters."""
    state = SessionState(RULES[vendor])
    for statement in statements:
        state.observe(*(statement if isinstance(statement, tuple) else (statement,)))
    return state


def held(vendor: str, *statements: object) -> tuple[str, ...]:
    return state_after(vendor, *statements).descriptions()


# One text: vendor, text, what is held.

BOTH_HOLD = [
    ("BEGIN", TRANSACTION),
    ("begin work", TRANSACTION),
    ("START TRANSACTION READ ONLY", TRANSACTION),
    ("COMMIT AND CHAIN", TRANSACTION),
    ("ROLLBACK AND CHAIN", TRANSACTION),
    ("CREATE TEMPORARY TABLE tmp (id int)", "temporary table tmp"),
    ("create temporary table tmp(id int)", "temporary table tmp"),
    ("CREATE TEMPORARY TABLE IF NOT EXISTS tmp AS SELECT 1", "temporary table tmp"),
    ("CREATE TEMPORARY TABLE app.tmp (id int)", "temporary table app.tmp"),
    ("\n\t CREATE\n TEMPORARY  TABLE\ttmp (id int)", "temporary table tmp"),
    ("/* app:view */ CREATE /* x */ TEMPORARY TABLE tmp (id int)", "temporary table tmp"),
    ("-- a comment\nBEGIN", TRANSACTION),
    ("SELECT 1; BEGIN", TRANSACTION),
    ("BEGIN;", TRANSACTION),
    (b"BEGIN", TRANSACTION),
    ("SET ROLE reader", "SET ROLE"),
    (f"SELECT '{'x' * SHORT_TEXT}'; BEGIN", TRANSACTION),
    (f"INSERT INTO t VALUES ({'_x, ' * SHORT_TEXT} 1); BEGIN", TRANSACTION),
]
MYSQL_HOLDS = [
    ("CREATE OR REPLACE TEMPORARY TABLE `tmp` (id int)", "temporary table tmp"),
    ("CREATE TEMPORARY TABLE `my tmp` (id int)", "temporary table my tmp"),
    ("CREATE TEMPORARY TABLE `app`.`tmp` (id int)", "temporary table app.tmp"),
    ("CREATE TEMPORARY SEQUENCE s", "temporary sequence s"),
    ("/*!40000 CREATE TEMPORARY TABLE tmp (id int) */", "temporary table tmp"),
    ("/*M!100500 BEGIN */", TRANSACTION),
    ("# a comment\nBEGIN", TRANSACTION),
    ("USE other", "USE other"),
    ("use `other`", "USE other"),
    ("LOCK TABLES t WRITE, u READ", "LOCK TABLES"),
    ("LOCK TABLE t READ", "LOCK TABLES"),
    ("FLUSH TABLES WITH READ LOCK", "FLUSH TABLES WITH READ LOCK"),
    ("FLUSH TABLES a, b WITH READ LOCK", "FLUSH TABLES WITH READ LOCK"),
    ("FLUSH TABLES a FOR EXPORT", "FLUSH TABLES FOR EXPORT"),
    ("LOCK INSTANCE FOR BACKUP", "LOCK INSTANCE"),
    ("BACKUP STAGE START", "BACKUP STAGE"),
    ("BACKUP LOCK t", "BACKUP LOCK"),
    ("HANDLER t OPEN", "HANDLER t"),
    ("HANDLER t OPEN AS h", "HANDLER h"),
    ("HANDLER t OPEN h", "HANDLER h"),
    ("XA START 'x'", "XA transaction"),
    ("XA BEGIN 'x'", "XA transaction"),
    ("PREPARE p FROM 'SELECT 1'", "prepared statement p"),
    ("EXECUTE p", "whatever EXECUTE has set"),
    ("EXECUTE IMMEDIATE 'CREATE TEMPORARY TABLE t (id int)'", "whatever EXECUTE has set"),
    ("BEGIN NOT ATOMIC SET @a = 1; END", ("compound statement", "user variable @a")),
    ("IF 1 THEN SET sql_mode = ''; END IF", "compound statement"),
    # SET
    ("SET sql_mode = 'ANSI'", "SET sql_mode"),
    ("SET SQL_MODE='ANSI'", "SET sql_mode"),
    ("SET SESSION sql_mode = ''", "SET sql_mode"),
    ("SET LOCAL sql_mode = ''", "SET sql_mode"),
    ("SET @@sql_mode := ''", "SET sql_mode"),
    ("SET @@session.sql_mode = ''", "SET sql_mode"),
    ("SET @@local.sql_mode = ''", "SET sql_mode"),
    ("SET @@session . sql_mode = ''", "SET sql_mode"),
    ("SET GLOBAL a = 1, SESSION b = 2, c = 3", ("SET b", "SET c")),
    ("SET a = CONCAT(@@a, ',X'), @@global.b = 2", "SET a"),
    ("SET @a = 1, @b = 2", ("user variable @a", "user variable @b")),
    ("SET @a = 1, sql_mode = ''", ("SET sql_mode", "user variable @a")),
    ("SET NAMES utf8mb4", "SET NAMES"),
    ("SET CHARACTER SET utf8mb4", "SET NAMES"),
    ("SET CHARSET utf8mb4", "SET NAMES"),
    ("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", "SET SESSION TRANSACTION"),
    ("SET LOCAL TRANSACTION READ ONLY", "SET SESSION TRANSACTION"),
    ("SET RESOURCE GROUP rg", "SET RESOURCE GROUP"),
    ("SET autocommit = 0", "SET autocommit"),
    ("SET @@autocommit=OFF", "SET autocommit"),
    ("SET autocommit = 1 - 1", "SET autocommit"),
    ("SET foreign_key_checks=0", "SET foreign_key_checks"),
    ("SET foreign_key_checks = @old", ("SET foreign_key_checks", "user variable @old")),
    ("SET sql_mode = DEFAULT", "SET sql_mode"),
    ("SET STATEMENT max_statement_time=1 FOR BEGIN", TRANSACTION),
    (
        "SET STATEMENT max_statement_time=1 FOR CREATE TEMPORARY TABLE t (id int)",
        "temporary table t",
    ),
    ("SET STATEMENT max_statement_time=1 FOR SET sql_mode = ''", "SET sql_mode"),
    # User variables
    ("SELECT @x := 1", "user variable @x"),
    ("SELECT 1+@X:=2", "user variable @x"),
    ("SELECT id INTO @x FROM t", "user variable @x"),
    ("SELECT 1 INTO @'my var'", "user variable @my var"),
    ("CALL p(@out)", "user variable @out"),
    ("LOAD DATA INFILE 'f' INTO TABLE t (a, @v) SET b = @v", "user variable @v"),
    # Locks
    ("SELECT GET_LOCK('job', 10)", LOCK),
    ("select Get_Lock ('job', 10) AS got", LOCK),
    ("SELECT GET_LOCK(%s, %s)", LOCK),
    ("DO GET_LOCK('job', 10)", LOCK),
    ("(SELECT GET_LOCK('job', 10))", LOCK),
    ("WITH x AS (SELECT 1) SELECT GET_LOCK('job', 10) FROM x", LOCK),
    ("INSERT INTO t SELECT GET_LOCK('job', 10)", LOCK),
    ("UPDATE t SET a = 1+get_lock('job', 10)", LOCK),
    ("SELECT 1 /*!, GET_LOCK('job', 10) */", LOCK),
    (f"INSERT INTO t VALUES ('{'x' * SHORT_TEXT}', gEt_lOcK('job', 1))", LOCK),
    (f"INSERT INTO t_ VALUES ('{'_x' * SHORT_TEXT}', gEt_lOcK('job', 1))", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', `Get_Lock`('job', 1)", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', Get_Lock{' ' * 99}('job', 1)", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', Get_Lock{' ' * 999}('job', 1)", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', Get_Lock /* {'y' * 99} */ ('job', 1)", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', Get_Lock -- {'y' * 99}\n  ('job', 1)", LOCK),
    (f"SELECT '{'x' * SHORT_TEXT}', Get_Lock # {'y' * 99}\r\n\t('job', 1)", LOCK),
    (f"INSERT INTO t VALUES {'(1), ' * SHORT_TEXT} (Get_Lock('job', 1))", LOCK),
]
POSTGRESQL_HOLDS = [
    ("CREATE TEMP TABLE tmp (id int)", "temporary table tmp"),
    ("CREATE LOCAL TEMP TABLE tmp (id int)", "temporary table tmp"),
    ("CREATE GLOBAL TEMPORARY TABLE tmp (id int)", "temporary table tmp"),
    ('CREATE TEMP TABLE "Tmp" (id int)', "temporary table Tmp"),
    ("CREATE TEMP TABLE Tmp (id int)", "temporary table tmp"),
    ("CREATE TEMP TABLE tmp (id int) ON COMMIT DELETE ROWS", "temporary table tmp"),
    ("CREATE TABLE pg_temp.tmp (id int)", "temporary table tmp"),
    ("CREATE TABLE IF NOT EXISTS pg_temp.tmp (id int)", "temporary table tmp"),
    ("CREATE UNLOGGED TABLE pg_temp.tmp (id int)", "temporary table tmp"),
    ("CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "temporary object"),
    ("SELECT 1 AS a INTO TEMP tmp", "temporary table tmp"),
    ("select 1 as a\ninto temporary table tmp", "temporary table tmp"),
    ("WITH x AS (SELECT 1 AS a) SELECT a INTO pg_temp.tmp FROM x", "temporary table tmp"),
    (f"SELECT '{'x' * SHORT_TEXT}' AS a Into Temp tmp", "temporary table tmp"),
    (f"SELECT '{'i' * SHORT_TEXT}' AS a Into Temp tmp", "temporary table tmp"),
    (
        f"SELECT 1 IS NOT DISTINCT FROM 2 INTO TEMP tmp FROM t WHERE a IN ({'1,' * SHORT_TEXT} 1)",
        "temporary table tmp",
    ),
    (f"SELECT 1 as FROM INTO TEMP tmp WHERE 1 IN ({'1,' * SHORT_TEXT} 1)", "temporary table tmp"),
    ("CREATE TEMP VIEW v AS SELECT 1", "temporary view v"),
    ("CREATE OR REPLACE TEMP VIEW v AS SELECT 1", "temporary view v"),
    ("CREATE TEMP RECURSIVE VIEW v (n) AS SELECT 1", "temporary view v"),
    ("CREATE TEMP SEQUENCE s", "temporary sequence s"),
    ("EXPLAIN ANALYZE CREATE TEMP TABLE t AS SELECT 1", "temporary object"),
    ("/* a /* nested */ comment */ BEGIN", TRANSACTION),
    ("/* /* */ SELECT */ BEGIN", TRANSACTION),
    ("LISTEN prices", "LISTEN prices"),
    ("LOAD 'auto_explain'", "LOAD"),
    ("PREPARE p (int) AS SELECT $1", "prepared statement p"),
    ("PREPARE p AS SELECT 1", "prepared statement p"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "cursor c WITH HOLD"),
    ("DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT 1", "cursor c WITH HOLD"),
    ("DO $$ BEGIN PERFORM pg_advisory_lock(1); END $$", "whatever a DO block has set"),
    # SET
    ("SET search_path TO app", "SET search_path"),
    ("SET search_path = app, public", "SET search_path"),
    ('SET search_path TO "default"', "SET search_path"),
    ("SET SESSION Search_Path = app", "SET search_path"),
    ("SET app.tenant = 'x'", "SET app.tenant"),
    ("SET local.tenant = 'x'", "SET local.tenant"),
    ("SET TIME ZONE 'UTC'", "SET timezone"),
    ("SET SESSION TIME ZONE LOCAL", "SET timezone"),
    ("SET NAMES 'UTF8'", "SET client_encoding"),
    ("SET SCHEMA 'app'", "SET search_path"),
    ("SET SESSION ROLE reader", "SET ROLE"),
    ("SET ROLE NONE", "SET ROLE"),
    ("SET role TO reader", "SET ROLE"),
    ("SET SESSION AUTHORIZATION reader", "SET SESSION AUTHORIZATION"),
    ("SET SESSION SESSION AUTHORIZATION reader", "SET SESSION AUTHORIZATION"),
    ("SET session_authorization = reader", "SET SESSION AUTHORIZATION"),
    (
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SET SESSION CHARACTERISTICS",
    ),
    ("SELECT set_config('search_path', 'app', false)", "SET search_path"),
    ("SELECT SET_CONFIG('Search_Path', %s, FALSE)", "SET search_path"),
    ("SELECT pg_catalog.set_config('role', 'reader', false)", "SET ROLE"),
    ("SELECT set_config('role', 'none', %s)", "SET ROLE"),
    ("SELECT set_config(%s, %s, false)", "SET"),
    ("SELECT set_config(name, 'x', false) FROM pg_settings", "SET"),
    ("UPDATE t SET a = set_config('app.x', 'y', false)", "SET app.x"),
    ("UPDATE pg_settings SET setting = 'x' WHERE name = 'search_path'", "SET by pg_settings"),
    ('update only pg_catalog."pg_settings" AS s set setting = %s', "SET by pg_settings"),
    ("WITH x AS (UPDATE pg_settings SET setting = 1 RETURNING 1) TABLE x", "SET by pg_settings"),
    (
        f"UPDATE pg_settings SET setting = '{'x' * SHORT_TEXT}' WHERE name = 'a.b'",
        "SET by pg_settings",
    ),
    # Locks
    ("SELECT pg_advisory_lock(1)", ADVISORY),
    ("SELECT pg_advisory_lock(1, 2)", ADVISORY),
    ('SELECT "pg_advisory_lock"(1)', ADVISORY),
    ("SELECT pg_catalog.pg_advisory_lock(1)::text AS x", ADVISORY),
    ("SELECT pg_try_advisory_lock(%s)", ADVISORY),
    ("SELECT pg_advisory_lock_shared(1)", SHARED),
    ("SELECT pg_try_advisory_lock_shared(1)", SHARED),
    ("SELECT pg_advisory_lock(id) FROM t", ADVISORY),
    ("VALUES (pg_advisory_lock(1))", ADVISORY),
    ("COPY (SELECT pg_advisory_lock(1)) TO STDOUT", ADVISORY),
    ("EXPLAIN ANALYZE SELECT pg_advisory_lock(1)", ADVISORY),
    (f"SELECT '{'_' * SHORT_TEXT}', pg_advisory_lock(1)", ADVISORY),
    (f"SELECT '{'x' * SHORT_TEXT}', {'pg_catalog' * 9} . pg_advisory_lock (1)", ADVISORY),
]
HOLDS = [
    *((vendor, *row) for vendor in VENDORS for row in BOTH_HOLD),
    *(("mysql", *row) for row in MYSQL_HOLDS),
    *(("postgresql", *row) for row in POSTGRESQL_HOLDS),
]

BOTH_LEAVE = [
    "",
    ";",
    "-- only a comment",
    "SELECT 1",
    "select a from lock_table where b = %s",
    "INSERT INTO t (a) VALUES ('please SET x = 1; BEGIN')",
    "INSERT INTO t (a) VALUES ('it''s; BEGIN')",
    "SELECT 1 /* ; BEGIN; */",
    "SELECT 1 -- ; BEGIN",
    "UPDATE t SET a = 1",
    "SAVEPOINT s1",
    "ROLLBACK TO SAVEPOINT s1",
    "RELEASE SAVEPOINT s1",
    "COMMIT",
    "SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE",
    "CREATE TABLE t (temporary int)",
    "CALL refresh_prices(1)",
    "ALTER TABLE t ADD COLUMN a int",
    f"INSERT INTO t VALUES ('{'x' * SHORT_TEXT}')",
    f"INSERT INTO t VALUES ({'_x, ' * SHORT_TEXT} 1)",
    f"INSERT INTO t VALUES ('{'x;' * SHORT_TEXT}')",
]
MYSQL_LEAVES = [
    "SET GLOBAL max_connections = 5",
    "SET @@global.max_connections = 5, PERSIST a = 1, @@persist_only.b = 2",
    "SET PASSWORD = 'x'",
    "SET PASSWORD FOR u@localhost = PASSWORD('x')",
    "SET DEFAULT ROLE a, b TO u",
    "SET GLOBAL TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE",
    "SET STATEMENT max_statement_time=1 FOR SELECT 1",
    "SET foreign_key_checks=1",
    "SET autocommit = 1",
    "SELECT @@sql_mode, @@session.sql_mode",
    "CREATE USER 'root'@'localhost'",
    "GRANT ALL ON t TO root@localhost",
    "GRANT ALL ON t TO `root`@`%%`",
    "INSERT INTO t VALUES ('me@example.com', \"GET_LOCK('a', 1)\", 'it\\'s; BEGIN')",
    "SELECT `get_lock('a')`, `a;begin` FROM `_lock`",
    "SELECT 1 # ; BEGIN",
    "START REPLICA",
    "XA RECOVER",
    "HANDLER t READ FIRST",
]
POSTGRESQL_LEAVES = [
    "SET LOCAL search_path = app",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SELECT set_config('search_path', 'app', true)",
    "SELECT set_config(%s, %s, TRUE)",
    "SELECT pg_advisory_xact_lock(1), pg_try_advisory_xact_lock_shared(2)",
    "CREATE TEMP TABLE t (id int) ON COMMIT DROP",
    "DECLARE c CURSOR FOR SELECT 1",
    "DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1",
    "LOCK TABLE t IN SHARE MODE",
    "COMMIT PREPARED 'x'",
    "RESET search_path",
    "SET search_path TO DEFAULT",
    "INSERT INTO temp VALUES (1)",
    "WITH x AS (SELECT 1) INSERT INTO temp SELECT * FROM x",
    "SELECT a INTO t FROM u",
    "SELECT 1 AS temp FROM quinto",
    "SELECT $$; BEGIN; $$, $x$; SET a = 1; $$ $x$",
    "SELECT E'it\\'s; BEGIN'",
    'SELECT "pg_advisory_lock(1)", "a;begin" FROM t',
    "SELECT 1 /* a /* nested; */ ; BEGIN; */",
    "SELECT data @> '{}'::jsonb FROM t",
    "CREATE INDEX i ON t (a)",
]
LEAVES = [
    *((vendor, text) for vendor in VENDORS for text in BOTH_LEAVE),
    *(("mysql", text) for text in MYSQL_LEAVES),
    *(("postgresql", text) for text in POSTGRESQL_LEAVES),
]


@pytest.mark.parametrize(("vendor", "text", "expected"), HOLDS)
def test_what_holds(vendor: str, text: object, expected: str | tuple[str, ...]) -> None:
    """A statement that changes its session is remembered, in plain words."""
    assert held(vendor, text) == ((expected,) if isinstance(expected, str) else expected)


@pytest.mark.parametrize(("vendor", "text"), LEAVES)
def test_what_leaves_nothing(vendor: str, text: str) -> None:
    """A statement that a new session would not miss is not counted."""
    assert held(vendor, text) == ()


# Several texts: vendor, statements, what is held after them.

TABLE, FOUND = "CREATE TEMPORARY TABLE a (id int)", "temporary table a"
BOTH_SEQUENCES = [
    ([TABLE, "DROP TABLE a"], ()),
    ([TABLE, "DROP TABLE IF EXISTS x, a CASCADE"], ()),
    ([TABLE, TABLE.replace("a (", "b ("), "DROP TABLE a,b"], ()),
    ([TABLE, "DROP TABLE b"], (FOUND,)),
    ([TABLE, "DROP TABLE app.a"], (FOUND,)),
    ([TABLE, "DROP TABLE a . b"], (FOUND,)),
    ([TABLE, TABLE, "DROP TABLE a"], ()),
    ([f"{TABLE}; DROP TABLE a"], ()),
    ([TABLE, "INSERT INTO t VALUES ('; DROP TABLE a')"], (FOUND,)),
    (["BEGIN", "COMMIT"], ()),
    (["BEGIN", "ROLLBACK"], ()),
    (["START TRANSACTION", "COMMIT WORK AND NO CHAIN"], ()),
    (["BEGIN", "ROLLBACK TO SAVEPOINT s"], (TRANSACTION,)),
    (["BEGIN", "ROLLBACK TO s"], (TRANSACTION,)),
    (["BEGIN", "COMMIT AND CHAIN"], (TRANSACTION,)),
    # The body of a routine is not followed: what it might hold is held, no more given back.
    (["BEGIN", "CREATE PROCEDURE p() BEGIN SELECT 1; COMMIT; END"], (TRANSACTION,)),
    (["BEGIN", b"COMMIT"], ()),
]
MYSQL_SEQUENCES = [
    ([TABLE, "DROP TEMPORARY TABLE IF EXISTS `a`"], ()),
    ([TABLE, "DROP TABLES a"], ()),
    ([TABLE, "DROP TABLE A"], (FOUND,)),
    ([TABLE, "/*!99999 DROP TABLE a */"], (FOUND,)),
    (["CREATE TEMPORARY TABLE `my a` (id int)", "DROP TABLE `my a`"], ()),
    (["CREATE TEMPORARY SEQUENCE s", "DROP SEQUENCE s"], ()),
    (["LOCK TABLES t WRITE", "UNLOCK TABLES"], ()),
    (["FLUSH TABLES WITH READ LOCK", "UNLOCK TABLES"], ()),
    (["LOCK INSTANCE FOR BACKUP", "UNLOCK INSTANCE"], ()),
    (["BACKUP STAGE START", "BACKUP STAGE END"], ()),
    (["BACKUP LOCK t", "BACKUP UNLOCK"], ()),
    (["HANDLER t OPEN AS h", "HANDLER h CLOSE"], ()),
    (["HANDLER t OPEN AS h", "HANDLER t CLOSE"], ("HANDLER h",)),
    (["XA START 'x'", "XA END 'x'", "XA PREPARE 'x'"], ("XA transaction",)),
    (["XA START 'x'", "XA END 'x'", "XA COMMIT 'x' ONE PHASE"], ()),
    (["XA START 'x'", "XA END 'x'", "XA ROLLBACK 'x'"], ()),
    (["BEGIN", "END"], (TRANSACTION,)),
    (["BEGIN NOT ATOMIC COMMIT; END"], ("compound statement",)),
    (["PREPARE p FROM 'SELECT 1'", "DEALLOCATE PREPARE p"], ()),
    (["PREPARE p FROM 'SELECT 1'", "DROP PREPARE p"], ()),
    (["SET autocommit=0", "SET autocommit=1"], ()),
    (["SET autocommit=0", "COMMIT"], ("SET autocommit",)),
    (["SET foreign_key_checks=0", "SET foreign_key_checks=1"], ()),
    (["SET unique_checks=OFF", "SET @@session.unique_checks = ON"], ()),
    (["SET sql_mode = ''", "SET SESSION sql_mode = DEFAULT"], ()),
    # Doubt makes a rule that could give back one that holds.
    (["/*!50000 SET sql_mode = DEFAULT */"], ("SET sql_mode",)),
    # GET_LOCK counts, for each name.
    (["SELECT GET_LOCK('a', 1)", "SELECT RELEASE_LOCK('a')"], ()),
    (["SELECT GET_LOCK('a', 1)", "DO release_lock ( 'a' )"], ()),
    (["SELECT GET_LOCK('a', 1)", "SELECT RELEASE_LOCK('b')"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)", 'SELECT RELEASE_LOCK("a")'], ()),
    (["SELECT GET_LOCK('a', 1)"] * 2 + ["SELECT RELEASE_LOCK('a')"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)"] * 2 + ["SELECT RELEASE_LOCK('a')"] * 2, ()),
    (["SELECT GET_LOCK('a', 1), GET_LOCK('b', 1)", "SELECT RELEASE_LOCK('a')"], (LOCK,)),
    (
        ["SELECT GET_LOCK('a', 1), GET_LOCK('b', 1)", "DO RELEASE_LOCK('b'), RELEASE_LOCK('a')"],
        (),
    ),
    (["DO GET_LOCK('a', 1), GET_LOCK('b', 1)", "SELECT RELEASE_ALL_LOCKS()"], ()),
    (["SELECT GET_LOCK(name, 1) FROM t", "SELECT RELEASE_LOCK(name) FROM t"], (LOCK,)),
    (["SELECT GET_LOCK(name, 1) FROM t", "SELECT RELEASE_ALL_LOCKS()"], ()),
    (["SELECT GET_LOCK(DATABASE(), 1)", "SELECT RELEASE_LOCK(DATABASE())"], (LOCK,)),
    (["SELECT GET_LOCK(MD5('a'), 1)", "SELECT RELEASE_LOCK(MD5('a'))"], ()),
    (["SELECT GET_LOCK(GET_LOCK('a', 1), 1) FROM t", "SELECT RELEASE_LOCK('a')"], (LOCK,)),
    # It may not have run.
    (["SELECT GET_LOCK('a', 1)", "SELECT RELEASE_LOCK('a') FROM t"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)", "SELECT IF(0, RELEASE_LOCK('a'), 1)"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)", "SELECT RELEASE_LOCK('a') LIMIT 0"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)", "EXPLAIN SELECT RELEASE_LOCK('a')"], (LOCK,)),
    (["SELECT GET_LOCK('a', 1)", "SELECT RELEASE_ALL_LOCKS() FROM t"], (LOCK,)),
    # Names in parameters.
    ([("SELECT GET_LOCK(%s, %s)", ["a", 1]), ("SELECT RELEASE_LOCK(%s)", ("a",))], ()),
    ([("SELECT GET_LOCK(%s, %s)", ["a", 1]), ("SELECT RELEASE_LOCK(%s)", ["b"])], (LOCK,)),
    ([("SELECT GET_LOCK(%s, %s)", ["a", 1]), "SELECT RELEASE_LOCK('a')"], ()),
    ([("SELECT GET_LOCK(%s, %s)", ["it's", 1]), ("DO RELEASE_LOCK(%s)", ["it's"])], ()),
    (
        [
            ("SELECT GET_LOCK(%(name)s, 1)", {"name": "a"}),
            ("SELECT RELEASE_LOCK(%(name)s)", {"name": "a"}),
        ],
        (),
    ),
    (
        [
            ("SELECT GET_LOCK(%(name)s, 1)", {"name": "a"}),
            ("SELECT RELEASE_LOCK(%(name)s)", {"name": "b"}),
        ],
        (LOCK,),
    ),
    (
        [
            ("SELECT '%s', /* %s %% */ GET_LOCK(%s, 1)", ["x", "y", "a"]),
            ("SELECT RELEASE_LOCK(%s)", ["a"]),
        ],
        (LOCK,),  # not a plain list of calls
    ),
    (
        [
            ("SELECT /* %s %% */ GET_LOCK(%s, 1)", ["x", "a"]),
            ("SELECT RELEASE_LOCK(%s)", ["a"]),
        ],
        (),
    ),
    # Not to be resolved: held until all are released.
    (["SELECT GET_LOCK(%s, 1)", "SELECT RELEASE_LOCK(%s)"], (LOCK,)),
    (["SELECT GET_LOCK(%s, 1)", "SELECT RELEASE_ALL_LOCKS()"], ()),
    ([("SELECT GET_LOCK(%s, 1)", [None]), ("SELECT RELEASE_LOCK(%s)", [None])], (LOCK,)),
    ([("SELECT GET_LOCK(%s, 1)", []), ("SELECT RELEASE_LOCK(%s)", [])], (LOCK,)),
    (["SELECT GET_LOCK('a\\'b', 1)", "SELECT RELEASE_LOCK('a\\'b')"], (LOCK,)),
]
POSTGRESQL_SEQUENCES = [
    (["CREATE TEMP TABLE a (id int)", 'DROP TABLE "a"'], ()),
    (["CREATE TEMP TABLE a (id int)", "DROP TABLE A"], ()),
    (['CREATE TEMP TABLE "A" (id int)', "DROP TABLE A"], ("temporary table A",)),
    (["CREATE TEMP TABLE a (id int)", "DROP TABLE pg_temp.a"], ()),
    (["CREATE TABLE pg_temp.a (id int)", "DROP TABLE a"], ()),
    (["SELECT 1 AS x INTO TEMP a", "DROP TABLE a"], ()),
    (["CREATE TEMP VIEW v AS SELECT 1", "DROP VIEW v"], ()),
    (["CREATE TEMP SEQUENCE s", "DROP SEQUENCE s"], ()),
    (["CREATE TEMP TABLE a (id int)", "DISCARD TEMP"], ()),
    (["BEGIN", "END"], ()),
    (["BEGIN", "ABORT"], ()),
    (["BEGIN", "END AND CHAIN"], (TRANSACTION,)),
    (["BEGIN", "PREPARE TRANSACTION 'x'"], ()),
    (["BEGIN", "COMMIT PREPARED 'x'"], (TRANSACTION,)),
    (
        ["BEGIN", "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END"],
        (TRANSACTION,),
    ),
    (["SET a.b = 1", "RESET a.b"], ()),
    (["SET a.b = 1", "SET a.b TO DEFAULT"], ()),
    (["SET TIME ZONE 'UTC'", "RESET TIME ZONE"], ()),
    (["SET TIME ZONE 'UTC'", "SET TIME ZONE DEFAULT"], ()),
    (["SET a.b = 1", "SET c.d = 1", "RESET ALL"], ()),
    (["SELECT set_config('a.b', 'x', false)", "RESET a.b"], ()),
    (["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "RESET ALL"], ()),
    (["SET ROLE reader", "RESET ALL"], ("SET ROLE",)),
    (["SELECT set_config('role', 'reader', false)", "RESET ALL"], ("SET ROLE",)),
    (["SET ROLE reader", "RESET ROLE"], ()),
    (["SET SESSION AUTHORIZATION reader", "RESET ALL"], ("SET SESSION AUTHORIZATION",)),
    (["SET SESSION AUTHORIZATION reader", "RESET SESSION AUTHORIZATION"], ()),
    (["SET SESSION AUTHORIZATION reader", "SET SESSION AUTHORIZATION DEFAULT"], ()),
    (["PREPARE p AS SELECT 1", "DEALLOCATE p"], ()),
    (["PREPARE p AS SELECT 1", "DEALLOCATE PREPARE ALL"], ()),
    (["LISTEN a", "UNLISTEN a"], ()),
    (["LISTEN a", "LISTEN b", "UNLISTEN *"], ()),
    (["LISTEN a", "UNLISTEN b"], ("LISTEN a",)),
    (["DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE c"], ()),
    (["DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE ALL"], ()),
    (
        [
            "CREATE TEMP TABLE a (id int)",
            "SET ROLE reader",
            "SET a.b = 1",
            "PREPARE p AS SELECT 1",
            "LISTEN a",
            "SELECT pg_advisory_lock(1), pg_advisory_lock_shared(id) FROM t",
            "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            "DISCARD ALL",
        ],
        (),
    ),
    (["LOAD 'x'", "DISCARD ALL"], ("LOAD",)),
    (["SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"], ()),
    (["SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(2)"], (ADVISORY,)),
    (["SELECT pg_advisory_lock(1, 2)", "SELECT pg_advisory_unlock(1,2)"], ()),
    (["SELECT pg_advisory_lock(1, 2)", "SELECT pg_advisory_unlock(1)"], (ADVISORY,)),
    (["SELECT pg_try_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"], ()),
    (["SELECT pg_advisory_lock(1)"] * 2 + ["SELECT pg_advisory_unlock(1)"], (ADVISORY,)),
    (["SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock_shared(1)"], (ADVISORY,)),
    (["SELECT pg_advisory_lock_shared(1)", "SELECT pg_advisory_unlock_shared(1)"], ()),
    (["SELECT pg_advisory_lock_shared(1)", "SELECT pg_advisory_unlock_all()"], ()),
    (["SELECT pg_advisory_lock(-1)", "SELECT pg_advisory_unlock(-1)::int"], ()),
    (
        [
            ("SELECT pg_advisory_lock(%s::bigint)", [7]),
            ("SELECT pg_advisory_unlock(%s::bigint) AS ok", [7]),
        ],
        (),
    ),
    ([("SELECT pg_advisory_lock(%s)", [7]), "SELECT pg_advisory_unlock(7)"], ()),
    (["SELECT pg_advisory_lock(hashtext('a'))", "SELECT pg_advisory_unlock(hashtext('a'))"], ()),
    (
        ["SELECT pg_advisory_lock(hashtext('a'))", "SELECT pg_advisory_unlock(hashtext('A'))"],
        (ADVISORY,),
    ),
    (
        ["SELECT pg_advisory_lock(random()::int)", "SELECT pg_advisory_unlock(random()::int)"],
        (ADVISORY,),
    ),
    (["SELECT pg_advisory_lock(id) FROM t", "SELECT pg_advisory_unlock(id) FROM t"], (ADVISORY,)),
    (
        [
            "SELECT pg_advisory_lock(1), generate_series(1, 2)",
            "SELECT pg_advisory_unlock(1)",
        ],
        (ADVISORY,),
    ),
    # PostgreSQL's rollback brings back what was dropped or reset.
    (["CREATE TEMP TABLE a (id int)", "BEGIN", "DROP TABLE a", "ROLLBACK"], (FOUND,)),
    (["CREATE TEMP TABLE a (id int)", "BEGIN", "DROP TABLE a", "COMMIT", "ROLLBACK"], ()),
    (["SET a.b = 1", "RESET a.b", "ROLLBACK TO SAVEPOINT s"], ("SET a.b",)),
    (["SET a.b = 1", "RESET ALL", "ROLLBACK AND CHAIN"], ("SET a.b", TRANSACTION)),
    (["PREPARE p AS SELECT 1", "BEGIN", "DEALLOCATE p", "ROLLBACK"], ()),
]
SEQUENCES = [
    *((vendor, *row) for vendor in VENDORS for row in BOTH_SEQUENCES),
    *(("mysql", *row) for row in MYSQL_SEQUENCES),
    *(("postgresql", *row) for row in POSTGRESQL_SEQUENCES),
]


@pytest.mark.parametrize(("vendor", "statements", "expected"), SEQUENCES)
def test_what_gives_back(vendor: str, statements: list[object], expected: tuple[str, ...]) -> None:
    """Only what is surely given back is forgotten."""
    assert held(vendor, *statements) == expected


def test_a_new_session_holds_nothing() -> None:
    """A state begins false, becomes true, and is false again for a new session."""
    state = SessionState(RULES["postgresql"])
    assert not state
    state.observe("SET a.b = 1")
    assert state
    state.observe("RESET a.b")
    state.forget()
    state.rolled_back()
    assert not state
    assert state.descriptions() == ()


def test_states_share_rules_and_nothing_else() -> None:
    """What one connection holds is not another's."""
    first, second = (SessionState(RULES["mysql"]) for _ in range(2))
    first.observe("SET @a = 1")
    assert first
    assert not second


def test_descriptions_are_sorted_and_told_once() -> None:
    """Two locks are one line; the lines have an order."""
    texts = ["SET @b = 1", "SELECT GET_LOCK('x', 1)", "SELECT GET_LOCK('y', 1)", "SET @a = 1"]
    assert held("mysql", *texts) == (LOCK, "user variable @a", "user variable @b")


def test_a_driver_may_end_the_transaction() -> None:
    """A commit of the driver's ends what BEGIN began, and makes a DROP final."""
    state = state_after("postgresql", "CREATE TEMP TABLE a (id int)", "BEGIN", "DROP TABLE a")
    state.transaction_ended()
    state.rolled_back()
    assert state.descriptions() == ()


def test_a_driver_may_roll_back() -> None:
    """A rollback of the driver's brings a dropped table back."""
    state = state_after("postgresql", "CREATE TEMP TABLE a (id int)", "BEGIN", "DROP TABLE a")
    state.rolled_back()
    state.transaction_ended()
    assert state.descriptions() == (FOUND,)


def test_composed_sql_is_read() -> None:
    """psycopg's composed SQL counts as the text that it is sent as."""
    text = composed.SQL("SET {} = {}").format(composed.Identifier("app", "x"), composed.Literal(1))
    assert held("postgresql", text) == ("SET app.x",)
    assert held("postgresql", composed.SQL("SELECT 1")) == ()


def test_what_cannot_be_read_is_held() -> None:
    """An object of unknown kind may have done anything; psycopg2 quotes for a connection only."""
    assert held("postgresql", object()) == (OPAQUE,)
    assert held("postgresql", psycopg2.sql.Identifier("x")) == (OPAQUE,)
    assert held("postgresql", psycopg2.sql.SQL("BEGIN")) == (TRANSACTION,)


def test_no_rules_hold_nothing() -> None:
    """A database without rules is one of which nothing is known."""
    state = SessionState()
    state.observe("SET a = 1")
    assert not state


@pytest.mark.parametrize("vendor", VENDORS)
def test_parameters_are_never_described(vendor: str) -> None:
    """No description carries the value of a parameter."""
    secret = "sesame"
    texts = [
        ("SELECT GET_LOCK(%s, 1)", [secret]),
        ("SELECT pg_advisory_lock(hashtext(%s))", [secret]),
        ("SET @a = %s", [secret]),
        ("SET a.b = %s", [secret]),
        ("SELECT set_config(%s, %s, false)", [secret, secret]),
        (f"SET a.c = '{secret}'", None),
    ]
    descriptions = held(vendor, *texts)
    assert descriptions
    assert not any(secret in description for description in descriptions)


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_rule_is_reachable(vendor: str) -> None:
    """Rules are found by their first word, which therefore has no alternatives."""
    assert all(re.fullmatch("[A-Z]+", word) for word in RULES[vendor]._rules)


# Texts that do not count, wrapped in what makes them no code.

DANGEROUS = st.sampled_from(
    ["SET x = 1", "BEGIN", "; BEGIN;", "GET_LOCK('a', 1)", "@x := 1", "pg_advisory_lock(1)", "XA"]
) | st.text("abc '\";$`@#-/*()\\%\nÄ", max_size=12)


def quoted(text: str) -> str:
    return "'{}'".format(text.replace("'", "''"))


WRAPPERS = {
    "mysql": [
        lambda text: quoted(text.replace("\\", "\\\\")),
        lambda text: '"{}"'.format(text.replace("\\", "").replace('"', '""')),
        lambda text: "`{}`".format(text.replace("`", "``")),
        lambda text: "/* {} */ 1".format(text.replace("*/", "")),
        lambda text: "1 -- {}\n".format(text.replace("\n", "")),
        lambda text: "1 # {}\n".format(text.replace("\n", "")),
    ],
    "postgresql": [
        quoted,
        lambda text: "E" + quoted(text.replace("\\", "\\\\")),
        lambda text: f"$q${text.replace('$', '')}$q$",
        lambda text: '"{}"'.format(text.replace('"', '""')),
        lambda text: "/* {} */ 1".format(text.replace("*/", "").replace("/*", "")),
        lambda text: "/* {} /* */ */ 1".format(text.replace("*/", "").replace("/*", "")),
        lambda text: "1 --{}\n".format(text.replace("\n", "")),
    ],
}


@pytest.mark.parametrize("vendor", VENDORS)
@given(data=st.data())
def test_text_and_comments_never_count(vendor: str, data: st.DataObject) -> None:
    """Whatever stands in literals, quoted names and comments leaves nothing, and hides nothing."""
    items = data.draw(
        st.lists(
            st.tuples(DANGEROUS, st.sampled_from(WRAPPERS[vendor])).map(lambda x: x[1](x[0])),
            min_size=1,
            max_size=4,
        )
    )
    select = f"SELECT {', '.join(items)} FROM t"
    assert held(vendor, select) == ()
    assert held(vendor, f"{select}; BEGIN") == (TRANSACTION,)
    assert held(vendor, f"BEGIN; {select}; COMMIT") == ()


@pytest.mark.parametrize("vendor", VENDORS)
@given(text=st.text("abc'\";$`@#-/*()%=, \nSET", max_size=40), params=st.none() | st.just([1]))
def test_any_text_can_be_read(vendor: str, text: str, params: object) -> None:
    """No text, however broken, makes an error, and an unknown one does not hide a known one."""
    state_after(vendor, (text, params))
    words = [text, "CREATE TEMPORARY TABLE", "SELECT GET_LOCK(", "SELECT set_config(", "SET"]
    state_after(vendor, *(f"{word} {text}" for word in words))
