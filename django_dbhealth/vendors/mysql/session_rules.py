"""What leaves state in a session of MySQL or MariaDB."""

from __future__ import annotations

from django_dbhealth.session_state import NAME, TRANSACTION, Call, Mention, Rule, RuleSet

SESSION_RULES = RuleSet(
    # Manual: CREATE TABLE, CREATE SEQUENCE (MariaDB), DROP TABLE.
    Rule("CREATE [OR REPLACE] TEMPORARY TABLE [IF NOT EXISTS] name", holds="temporary table {}"),
    Rule(
        "CREATE [OR REPLACE] TEMPORARY SEQUENCE [IF NOT EXISTS] name", holds="temporary sequence {}"
    ),
    Rule("CREATE [OR REPLACE] TEMPORARY", holds="temporary object"),
    Rule("DROP [TEMPORARY] {TABLE|TABLES} [IF EXISTS] names", frees="temporary table {}"),
    Rule("DROP [TEMPORARY] SEQUENCE [IF EXISTS] names", frees="temporary sequence {}"),
    # Manual: USE. Which database the session began with is not known here: never given back.
    Rule("USE name", holds="USE {}"),
    # Manual: LOCK TABLES, FLUSH, LOCK INSTANCE FOR BACKUP (MySQL), BACKUP STAGE (MariaDB).
    Rule("LOCK {TABLE|TABLES}", holds="LOCK TABLES"),
    Rule("LOCK INSTANCE", holds="LOCK INSTANCE"),
    Rule("FLUSH ... WITH READ LOCK", holds="FLUSH TABLES WITH READ LOCK"),
    Rule("FLUSH ... FOR EXPORT", holds="FLUSH TABLES FOR EXPORT"),
    Rule("UNLOCK {TABLE|TABLES}", frees_all=("LOCK TABLES", "FLUSH TABLES *")),
    Rule("UNLOCK INSTANCE", frees="LOCK INSTANCE"),
    Rule("BACKUP STAGE END", frees="BACKUP STAGE"),
    Rule("BACKUP STAGE", holds="BACKUP STAGE"),
    Rule("BACKUP LOCK", holds="BACKUP LOCK"),
    Rule("BACKUP UNLOCK", frees="BACKUP LOCK"),
    # Manual: HANDLER.
    Rule("HANDLER name OPEN [AS] name", holds="HANDLER {}"),
    Rule("HANDLER name OPEN", holds="HANDLER {}"),
    Rule("HANDLER name CLOSE", frees="HANDLER {}"),
    # Manual: START TRANSACTION, COMMIT, and ROLLBACK. A DDL statement commits too: not followed.
    Rule("BEGIN NOT ATOMIC", holds="compound statement"),
    Rule("BEGIN", holds=TRANSACTION),
    Rule("START TRANSACTION", holds=TRANSACTION),
    Rule("COMMIT [WORK] AND CHAIN", holds=TRANSACTION),
    Rule("COMMIT [WORK] [AND NO CHAIN] [NO RELEASE]", frees=TRANSACTION),
    Rule("ROLLBACK [WORK] AND CHAIN", holds=TRANSACTION),
    Rule("ROLLBACK [WORK] [AND NO CHAIN] [NO RELEASE]", frees=TRANSACTION),
    # Manual: XA transactions.
    Rule("XA {START|BEGIN}", holds="XA transaction"),
    Rule("XA {COMMIT|ROLLBACK} ...", frees="XA transaction"),
    # Manual: prepared statements. What EXECUTE runs is often only known to the server.
    Rule("PREPARE name", holds="prepared statement {}"),
    Rule("DEALLOCATE PREPARE name", frees="prepared statement {}"),
    Rule("DROP PREPARE name", frees="prepared statement {}"),
    Rule("EXECUTE", holds="whatever EXECUTE has set"),
    # MariaDB manual: compound statements outside stored programs.
    Rule("IF", holds="compound statement"),
    Rule("CASE", holds="compound statement"),
    Rule("LOOP", holds="compound statement"),
    Rule("WHILE", holds="compound statement"),
    Rule("REPEAT", holds="compound statement"),
    Rule("FOR", holds="compound statement"),
    # Manual: SET variable, SET TRANSACTION, SET PASSWORD, SET ROLE, SET NAMES. What holds for the
    # next transaction only, for all sessions, or for an account is no state of this session.
    Rule("SET {TRANSACTION|PASSWORD|DEFAULT ROLE|GLOBAL|PERSIST|PERSIST_ONLY}"),
    Rule("SET @name"),  # see Mention below
    Rule("SET {NAMES|CHARACTER SET|CHARSET}", holds="SET NAMES"),
    Rule("SET SESSION TRANSACTION", holds="SET SESSION TRANSACTION"),
    Rule("SET ROLE", holds="SET ROLE"),
    Rule("SET RESOURCE GROUP", holds="SET RESOURCE GROUP"),
    # Django itself, and every dump, puts these back to what each session begins with.
    Rule("SET (autocommit|foreign_key_checks|unique_checks) = {1|ON|TRUE}", frees="SET {}"),
    # DEFAULT is the global value. init_command may have set another, and would again.
    Rule("SET name = DEFAULT", holds="SET {}", frees="SET {}"),
    Rule("SET name", holds="SET {}"),
    Rule("SET", holds="SET"),
    # Manual: user-defined variables. @@x is a system variable, user@host an account. One that is
    # only read was mostly set before, and is not worth a parser.
    Mention(rf"""(?<![\w'"@.$])@{NAME}""", holds="user variable @{}"),
    # Manual: locking functions.
    Call("get_lock", holds="lock by GET_LOCK", named_by=1),
    Call("release_lock", frees="lock by GET_LOCK", named_by=1),
    Call("release_all_locks", frees_all=("lock by GET_LOCK",)),
    # Manual: comments, string literals (a backslash escapes unless NO_BACKSLASH_ESCAPES is set).
    tokens=r"""
        (?P<code> /\*M?!\d* | \*/(?!\*) )
        | (?P<comment> /\*.*?\*/ | --(?=[\s\x00-\x1f]|\Z)[^\n]* | \#[^\n]* )
        | (?P<text> '(?:[^'\\]++|\\.|'')*' | "(?:[^"\\]++|\\.|"")*" )
        | (?P<name> `(?:[^`]++|``)*` )
        | (?P<placeholder> %% | %\([^)%]+\)s | %s )
        | (?P<end> ; )
    """,
    quiet=dict.fromkeys(
        ["SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE", "WITH", "SAVEPOINT", "RELEASE"],
        ("_lock",),
    ),
    quiet_characters="@;",
    rewrites=(
        (r"^SET STATEMENT .*? FOR ", ""),  # MariaDB: for the one statement that follows
        (r"^SET @@(GLOBAL|PERSIST|PERSIST_ONLY)\.", r"SET \1 "),
        (r"^SET LOCAL TRANSACTION ", "SET SESSION TRANSACTION "),
        (r"^SET (?:SESSION |LOCAL |@@SESSION\.|@@LOCAL\.|@@)(?!TRANSACTION )", "SET "),
    ),
    lists=r"SET (?!(?:SESSION |GLOBAL )?TRANSACTION |DEFAULT ROLE |ROLE |PASSWORD )",
    doubtful=(
        r"CREATE .*\b(?:FUNCTION|PROCEDURE|TRIGGER|EVENT|PACKAGE)\b|BEGIN NOT ATOMIC"
        r"|(?:IF|CASE|LOOP|WHILE|REPEAT|FOR)\b"
    ),
    pure_functions=("concat", "crc32", "lower", "md5", "sha1", "sha2", "upper"),
)
