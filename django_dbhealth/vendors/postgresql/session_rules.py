"""What leaves state in a session of PostgreSQL."""

from __future__ import annotations

from django_dbhealth.session_state import NAME, TRANSACTION, Call, Mention, Rule, RuleSet


def _nested_comment(depth: int) -> str:
    """Return the pattern of a comment, with comments in it that are so deeply nested."""
    inner = f"|{_nested_comment(depth - 1)}" if depth else ""
    return rf"/\*(?:[^*/]++|\*(?!/)|/(?!\*){inner})*\*/"


SESSION_RULES = RuleSet(
    # Manual: CREATE TABLE, CREATE VIEW, CREATE SEQUENCE, SELECT INTO, DROP TABLE. DDL is undone by
    # a rollback. What is dropped ON COMMIT does not outlive its transaction.
    Rule("CREATE TEMP ... ON COMMIT DROP"),
    Rule("CREATE TEMP TABLE [IF NOT EXISTS] name", holds="temporary table {}"),
    Rule("CREATE TEMP VIEW name", holds="temporary view {}"),
    Rule("CREATE TEMP SEQUENCE [IF NOT EXISTS] name", holds="temporary sequence {}"),
    Rule("CREATE TEMP", holds="temporary object"),
    Rule("DROP TABLE [IF EXISTS] names", frees="temporary table {}", undoable=True),
    Rule("DROP VIEW [IF EXISTS] names", frees="temporary view {}", undoable=True),
    Rule("DROP SEQUENCE [IF EXISTS] names", frees="temporary sequence {}", undoable=True),
    Rule("EXPLAIN ... CREATE ... {TEMP|TEMPORARY}", holds="temporary object"),
    Mention(
        rf"(?<!INSERT )(?<!MERGE )\bINTO (?:LOCAL |GLOBAL )?(?:TEMPORARY|TEMP) (?:TABLE )?{NAME}",
        holds="temporary table {}",
    ),
    # Manual: SET, SET ROLE, SET SESSION AUTHORIZATION, SET TRANSACTION, SET CONSTRAINTS, RESET.
    Rule("SET {LOCAL|TRANSACTION|CONSTRAINTS}"),
    Rule("SET SESSION CHARACTERISTICS", holds="SET SESSION CHARACTERISTICS"),
    Rule("SET SESSION AUTHORIZATION DEFAULT", frees="SET SESSION AUTHORIZATION", undoable=True),
    Rule("SET SESSION AUTHORIZATION", holds="SET SESSION AUTHORIZATION"),
    Rule("SET ROLE", holds="SET ROLE"),
    # Back to what the session began with, and so would a new one: nothing to hold when unseen.
    Rule("SET name = DEFAULT", frees="SET {}", undoable=True),
    Rule("SET name", holds="SET {}"),
    Rule("SET", holds="SET"),
    # Neither the role nor the session's authorization: their words are in upper case.
    Rule("RESET ALL", frees_all=("SET [a-z]*", "SET SESSION CHARACTERISTICS"), undoable=True),
    Rule("RESET ROLE", frees="SET ROLE", undoable=True),
    Rule("RESET SESSION AUTHORIZATION", frees="SET SESSION AUTHORIZATION", undoable=True),
    Rule("RESET name", frees="SET {}", undoable=True),
    # Manual: pg_settings. An UPDATE of the view is a SET.
    Mention(r"\bUPDATE (?:ONLY )?(?:pg_catalog\.)?(pg_settings)\b", holds="SET by {}"),
    # Manual: system administration functions, set_config(name, value, is_local).
    Call("set_config", stands_for="SET {} = value", unless_last="true"),
    # Manual: advisory lock functions. Those with xact in their name end with the transaction.
    Call("pg_advisory_lock", holds="advisory lock", named_by=2),
    Call("pg_try_advisory_lock", holds="advisory lock", named_by=2),
    Call("pg_advisory_unlock", frees="advisory lock", named_by=2),
    Call("pg_advisory_lock_shared", holds="shared advisory lock", named_by=2),
    Call("pg_try_advisory_lock_shared", holds="shared advisory lock", named_by=2),
    Call("pg_advisory_unlock_shared", frees="shared advisory lock", named_by=2),
    Call("pg_advisory_unlock_all", frees_all=("*advisory lock",)),
    # Manual: BEGIN, START TRANSACTION, COMMIT, END, ROLLBACK, ABORT, PREPARE TRANSACTION.
    Rule("BEGIN", holds=TRANSACTION),
    Rule("START TRANSACTION", holds=TRANSACTION),
    Rule("COMMIT [{WORK|TRANSACTION}] AND CHAIN", holds=TRANSACTION),
    Rule("COMMIT [{WORK|TRANSACTION}] [AND NO CHAIN]", frees=TRANSACTION),
    Rule("END [{WORK|TRANSACTION}] AND CHAIN", holds=TRANSACTION),
    Rule("END [{WORK|TRANSACTION}] [AND NO CHAIN]", frees=TRANSACTION),
    Rule("PREPARE TRANSACTION name", frees=TRANSACTION),
    Rule("ROLLBACK [{WORK|TRANSACTION}] TO ...", undoes=True),
    Rule("ROLLBACK [{WORK|TRANSACTION}] AND CHAIN", holds=TRANSACTION, undoes=True),
    Rule("ROLLBACK [{WORK|TRANSACTION}] [AND NO CHAIN]", frees=TRANSACTION, undoes=True),
    Rule("ABORT [{WORK|TRANSACTION}] AND CHAIN", holds=TRANSACTION, undoes=True),
    Rule("ABORT [{WORK|TRANSACTION}] [AND NO CHAIN]", frees=TRANSACTION, undoes=True),
    # Manual: PREPARE, DEALLOCATE. Not undone by a rollback.
    Rule("PREPARE name", holds="prepared statement {}"),
    Rule("DEALLOCATE [PREPARE] ALL", frees_all=("prepared statement *",)),
    Rule("DEALLOCATE [PREPARE] name", frees="prepared statement {}"),
    # Manual: LISTEN, UNLISTEN.
    Rule("LISTEN name", holds="LISTEN {}"),
    Rule(r"UNLISTEN \*", frees_all=("LISTEN *",), undoable=True),
    Rule("UNLISTEN name", frees="LISTEN {}", undoable=True),
    # Manual: DECLARE, CLOSE. Without HOLD a cursor ends with its transaction.
    Rule("DECLARE name ... WITH HOLD", holds="cursor {} WITH HOLD"),
    Rule("CLOSE ALL", frees_all=("cursor *",)),
    Rule("CLOSE name", frees="cursor {} WITH HOLD"),
    # Manual: LOAD. A library is never unloaded.
    Rule("LOAD", holds="LOAD"),
    # Manual: DO. Its body is a string in a language of its own.
    Rule("DO", holds="whatever a DO block has set"),
    # Manual: DISCARD.
    Rule(
        "DISCARD ALL",
        frees_all=("SET*", "temporary *", "prepared *", "LISTEN *", "cursor *", "*advisory lock"),
    ),
    Rule("DISCARD {TEMP|TEMPORARY}", frees_all=("temporary *",), undoable=True),
    # Manual: lexical structure. Comments nest (here three deep); a backslash escapes in E'' only.
    tokens=rf"""
        (?P<comment> --[^\n]* | {_nested_comment(3)} )
        | (?P<text>
            (?<![\w$])[eE]'(?:[^'\\]++|\\.|'')*'
            | '(?:[^']++|'')*'
            | (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$
        )
        | (?P<name> "(?:[^"]++|"")*" )
        | (?P<placeholder> %% | %\([^)%]+\)[sbt] | %[sbt] )
        | (?P<end> ; )
    """,
    quiet={
        "SELECT": ("_advisory", "_config", "into"),
        "WITH": ("_advisory", "_config", "into", "pg_settings"),
        "UPDATE": ("_advisory", "_config", "pg_settings"),
        **dict.fromkeys(["INSERT", "DELETE", "SAVEPOINT", "RELEASE"], ("_advisory", "_config")),
    },
    quiet_characters=";",
    folds_case=True,
    rewrites=(
        (r"^CREATE (?:OR REPLACE |UNLOGGED |GLOBAL |LOCAL |RECURSIVE )+", "CREATE "),
        (r"^CREATE (?:TEMPORARY|TEMP) (?:RECURSIVE )?", "CREATE TEMP "),
        (r"^CREATE (?!TEMP |INDEX |UNIQUE )(?=(?:\w+ )+pg_temp\.)", "CREATE TEMP "),
        (r"(?<!INSERT )(?<!MERGE )\bINTO (?:TABLE )?pg_temp\.", "INTO TEMP "),
        (r" pg_temp\.", " "),
        (r"^SET SESSION (?!CHARACTERISTICS |AUTHORIZATION )", "SET "),
        (r"^SET session_authorization\b", "SET SESSION AUTHORIZATION"),
        (r"^SET TIME ZONE ", "SET timezone = "),
        (r"^RESET TIME ZONE$", "RESET timezone"),
        (r"^SET NAMES\b", "SET client_encoding ="),
        (r"^SET SCHEMA ", "SET search_path = "),
        (r"^(SET \S+) TO ", r"\1 = "),
    ),
    doubtful=r"CREATE .*\b(?:FUNCTION|PROCEDURE)\b",  # BEGIN ATOMIC … END
    pure_functions=("hashtext", "hashtextextended"),
)
