"""MySQL and MariaDB, through mysqlclient and PyMySQL."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.session_state import NAME, TRANSACTION, Call, Mention, Rule, RuleSet

from .base import Driver, Liveness, Refusal, Vendor, hang_up, has_hung_up, readable

if TYPE_CHECKING:
    from collections.abc import Mapping

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


class MySQLClient(Driver):
    """mysqlclient, whichever client library it was built with."""

    cursors_need_handle = True

    def descriptor(self, handle: Any) -> int | None:
        try:
            return int(handle.fileno())
        except handle.Error:
            return None

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        # handle.ping() waits for ever on a server that hangs, so the question is sent and the
        # answer awaited here. DO 1 returns no rows and is not seen by any statement after it.
        descriptor = None
        try:
            descriptor = handle.fileno()
            if has_hung_up(descriptor):  # most losses: told for a tenth of what asking costs
                return Liveness.LOST
            handle.send_query(b"DO 1")
            if not readable(descriptor, timeout):
                hang_up(descriptor)
                return Liveness.LOST
            handle.read_query_result()
        except handle.ProgrammingError:
            # 2014: an unbuffered result is being read; or another thread is using the handle.
            return Liveness.BUSY
        except handle.Error as error:
            # No hang_up(): the library has closed the socket, whose number may be another's now.
            # An hourly quota, for one, is an answer too.
            return Liveness.LOST if _is_disconnect(error) else Liveness.ALIVE
        except BaseException:  # of a signal handler: the answer is still to come
            if descriptor is not None:
                hang_up(descriptor)
            raise
        return Liveness.ALIVE

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        # Manual, client error message reference. What the server says before it hangs up (4031,
        # 1927, 1053) leaves the socket open; the next statement then says 2006.
        return error.args[:1] in ((2006,), (2013,), (2026,), (2055,))

    def is_reading(self, handle: Any, *, new_references: int) -> bool:
        # Whatever is called meanwhile says 2014, and so does the reader then, at its last row.
        # The number of affected rows is -1 as long as a SELECT's result is not stored (manual,
        # mysql_affected_rows()), and again once its cursor is closed. While a result is read,
        # cursor and result hold the handle.
        return new_references >= 2 and handle.field_count() > 0 and handle.affected_rows() == -1

    def bound_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        if "read_default_file" not in parameters:  # it may have a connect-timeout of its own
            super().bound_connect(parameters, seconds)


def _is_disconnect(error: Exception) -> bool:
    """Return whether the driver's error means that the connection is gone.

    2000 to 2999 are the client library's own (manual, client error message reference); 1053, 1927
    and 4031 are what a server says before it hangs up (facts measured on MariaDB and MySQL).
    """
    code = error.args[0] if error.args else None
    return not isinstance(code, int) or 2000 <= code < 3000 or code in (1053, 1927, 4031)


class PyMySQL(Driver):
    """PyMySQL. It has no public way to reach its socket or to bound one call."""

    def descriptor(self, handle: Any) -> int | None:
        return int(handle._sock.fileno()) if handle.open else None

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if not handle.open:
            return Liveness.LOST
        result = handle._result
        if result is not None and (result.unbuffered_active or result.has_next):
            # PyMySQL would read the rows to their end and throw them away.
            return Liveness.BUSY
        read_timeout = handle._read_timeout
        handle._read_timeout = timeout
        try:
            handle.ping(reconnect=False)
        except handle.Error as error:
            return Liveness.LOST if _is_disconnect(error) else Liveness.ALIVE
        except OSError:
            return Liveness.LOST
        finally:
            handle._read_timeout = read_timeout
        return Liveness.ALIVE

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        return not handle.open

    def bound_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        super().bound_connect(parameters, seconds)
        # Its connect_timeout ends when the socket is connected, before the server's first word.
        parameters.setdefault("read_timeout", seconds)

    def lift_bound(self, handle: Any, options: Mapping[str, Any]) -> None:
        handle._read_timeout = options.get("read_timeout")


# An assignment with the word before it: "SET", a comma's nothing, or the scope. lock_wait_timeout
# and @wait_timeout, a variable of the user's, are others.
_WAIT_TIMEOUT = re.compile(
    r"(?<![\w@.])(?:@@)?(?:(\w+)(?:\s+|\s*\.\s*))?`?wait_timeout`?\s*:?=\s*(\d+)",
    re.IGNORECASE,
)
_SCOPES_OF_OTHERS = ("GLOBAL", "PERSIST", "PERSIST_ONLY")


# Manual, server error message reference (1226: ER_USER_LIMIT_REACHED) and client's. At connect:
# 1053 from a server that shuts down, 2006 and 2013 from one that hung up or did not answer in the
# handshake.
ACCOUNT_LIMIT = 1226
REFUSALS: dict[object, Refusal] = {
    1040: Refusal.NO_FREE_SLOT,
    1203: Refusal.NO_FREE_SLOT,
    1053: Refusal.UNREACHABLE,
    2002: Refusal.UNREACHABLE,
    2003: Refusal.UNREACHABLE,
    2006: Refusal.UNREACHABLE,
    2013: Refusal.UNREACHABLE,
}


class MySQL(Vendor):
    """MySQL and MariaDB: to Django, and for most questions, they are one."""

    name = "mysql"
    drivers: ClassVar[Mapping[str, Driver]] = {"MySQLdb": MySQLClient(), "pymysql": PyMySQL()}
    # The servers' own default is 28800; hosts that share a server set 300 and less.
    default_idle_timeout = 300
    refuses_unknown_options = True
    session_option = "init_command"

    def idle_timeout_in(self, session_option: str) -> float | None:
        found = [
            float(seconds)
            for scope, seconds in _WAIT_TIMEOUT.findall(session_option)
            if scope.upper() not in _SCOPES_OF_OTHERS
        ]
        return found[-1] if found else None

    def driver_problem(self) -> str | None:
        # Django imports "MySQLdb", which may be PyMySQL in disguise. Then its version_info and
        # __version__ are mysqlclient's; VERSION is its own.
        driver = sys.modules.get("MySQLdb")
        if driver is None or driver.__name__ != "pymysql" or driver.VERSION[:2] >= (1, 2):
            return None
        version = ".".join(str(number) for number in driver.VERSION[:3])
        return (
            f"PyMySQL {version} is older than 1.2: its ping(), and so Django's health check, "
            "connects again by itself, and what the session carried is gone without an error."
        )

    session_rules = SESSION_RULES

    def refusal(self, error: Exception) -> Refusal | None:
        code = error.args[0] if error.args else None
        if code == ACCOUNT_LIMIT:
            # The same code is that of the hourly quotas, and only the text tells.
            return Refusal.NO_FREE_SLOT if "max_user_connections" in str(error) else None
        return REFUSALS.get(code)
