"""PostgreSQL, through psycopg 3 and psycopg2."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.session_state import NAME, TRANSACTION, Call, Mention, Rule, RuleSet

from .base import Driver, Liveness, Refusal, Vendor, hang_up, readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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
        **dict.fromkeys(["SELECT", "WITH"], ("_advisory", "_config", "into")),
        **dict.fromkeys(
            ["INSERT", "UPDATE", "DELETE", "SAVEPOINT", "RELEASE"], ("_advisory", "_config")
        ),
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

# libpq's PGTransactionStatusType; both drivers hand the numbers through.
IDLE, UNKNOWN = 0, 4
IN_TRANSACTION = (2, 3)  # whole, or failed


class _Psycopg(Driver):
    """What both have of libpq."""

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        return bool(handle.closed)

    def bound_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        if "PGCONNECT_TIMEOUT" not in os.environ and "service" not in parameters:
            super().bound_connect(parameters, seconds)


class Psycopg(_Psycopg):
    """psycopg 3."""

    def descriptor(self, handle: Any) -> int | None:
        return None if handle.closed else int(handle.pgconn.socket)

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if not handle.closed and handle.pgconn.transaction_status in IN_TRANSACTION:
            return Liveness.IN_TRANSACTION
        return self.ask(handle, timeout=timeout)

    def ask(self, handle: Any, *, timeout: float) -> Liveness:
        from psycopg import Error

        pgconn = handle.pgconn
        if handle.closed or pgconn.transaction_status == UNKNOWN:
            return Liveness.LOST
        if pgconn.transaction_status not in (IDLE, *IN_TRANSACTION) or pgconn.pipeline_status:
            return Liveness.BUSY
        if handle.lock.locked():  # not acquired: an interrupt before its release would be a hang
            return Liveness.BUSY
        liveness = Liveness.LOST
        try:
            liveness = _ask_libpq(pgconn, time.monotonic() + timeout)
        except Error:
            pass
        finally:
            if liveness is Liveness.LOST:  # also when a signal handler's exception came
                pgconn.finish()
        return liveness

    def has_begun(self, handle: Any) -> bool:
        return handle.pgconn.transaction_status in IN_TRANSACTION


def _ask_libpq(pgconn: Any, deadline: float) -> Liveness:
    """Send an empty query and await its answer. Notifications go where psycopg keeps them."""
    from psycopg.pq import ExecStatus

    answer = Liveness.ALIVE
    pgconn.send_query(b"")
    pgconn.flush()
    while True:
        pgconn.consume_input()
        while notification := pgconn.notifies():
            pgconn.notify_handler(notification)  # as psycopg's own fetching does
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                return answer
            if result.status != ExecStatus.EMPTY_QUERY:
                answer = Liveness.LOST  # the server's farewell; libpq then reads the end as well
        if not readable(pgconn.socket, max(0.0, deadline - time.monotonic())):
            return Liveness.LOST


class Psycopg2(_Psycopg):
    """psycopg2."""

    def descriptor(self, handle: Any) -> int | None:
        return None if handle.closed else int(handle.fileno())

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if handle.closed:
            return Liveness.LOST
        status = handle.get_transaction_status()
        if status in IN_TRANSACTION:
            return Liveness.IN_TRANSACTION
        if status != IDLE:
            return Liveness.LOST if status == UNKNOWN else Liveness.BUSY
        try:
            with _hang_up_after(timeout, handle.fileno()), handle.cursor() as cursor:
                cursor.execute("SELECT 1")
            if not handle.autocommit:
                handle.rollback()
        except handle.Error:
            return Liveness.LOST
        except RuntimeError:  # no thread can be started, and so no bound set
            return Liveness.BUSY
        return Liveness.ALIVE

    def has_begun(self, handle: Any) -> bool:
        return handle.get_transaction_status() in IN_TRANSACTION


@contextmanager
def _hang_up_after(timeout: float, descriptor: int) -> Iterator[None]:
    """Hang up if the block takes longer: psycopg2 offers no other bound."""
    timer = threading.Timer(timeout, hang_up, [descriptor])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


# "-c idle_session_timeout=5min" or "--idle-session-timeout=5min", as libpq takes it.
_IDLE_SESSION_TIMEOUT = re.compile(
    r"(?:-c\s*|--)idle[_-]session[_-]timeout=(\d+(?:\.\d+)?)(?:\\\s)*(us|ms|s|min|h|d)?(?!\S)"
)
# The units of the manual's section 20.1.1, in seconds; the parameter's own is the millisecond.
_UNITS = {"us": 1e-6, "": 1e-3, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


# An error at connect has no SQLSTATE, so these are texts: the server's, in English, and libpq's.
FINAL = ("authentication failed", "does not exist", "no pg_hba.conf entry")
REFUSALS = {
    "too many clients already": Refusal.NO_FREE_SLOT,
    "remaining connection slots are reserved": Refusal.NO_FREE_SLOT,
    "too many connections for": Refusal.NO_FREE_SLOT,  # a role, a database
    "no more connections allowed": Refusal.NO_FREE_SLOT,  # PgBouncer's
    "the database system is": Refusal.UNREACHABLE,  # starting up, shutting down, in recovery
    "Connection refused": Refusal.UNREACHABLE,
    "No such file or directory": Refusal.UNREACHABLE,  # of the unix socket
    "Connection reset by peer": Refusal.UNREACHABLE,
    "Connection timed out": Refusal.UNREACHABLE,
    "Network is unreachable": Refusal.UNREACHABLE,
    "No route to host": Refusal.UNREACHABLE,
    "server closed the connection": Refusal.UNREACHABLE,
    "timeout expired": Refusal.UNREACHABLE,
}


class PostgreSQL(Vendor):
    """PostgreSQL. It drops idle sessions only when it was told to."""

    name = "postgresql"
    drivers: ClassVar[Mapping[str, Driver]] = {"psycopg": Psycopg(), "psycopg2": Psycopg2()}
    has_server_side_cursors = True
    has_pool = True
    refuses_unknown_options = True
    session_option = "options"

    def idle_timeout_in(self, session_option: str) -> float | None:
        found = _IDLE_SESSION_TIMEOUT.findall(session_option)
        if not found:
            return None
        number, unit = found[-1]
        return float(number) * _UNITS[unit] or None  # 0 switches it off

    def pooled_idle_time(self, pool_options: Mapping[str, Any]) -> float:
        # psycopg_pool looks at max_lifetime only when a connection is given back (measured with
        # 3.3.3: one idle past it is handed out all the same), and max_idle closes but one
        # connection in each interval, and only while there are more than min_size.
        if pool_options.get("min_size", 4) != 0:
            return math.inf
        try:
            return float((pool_options["max_size"] + 1) * pool_options.get("max_idle", 600))
        except (KeyError, TypeError, ValueError):
            return math.inf

    session_rules = SESSION_RULES

    def refusal(self, error: Exception) -> Refusal | None:
        text = str(error)
        if type(error).__name__ == "PoolTimeout":  # psycopg_pool may not be there to import
            return Refusal.NO_FREE_SLOT
        if any(words in text for words in FINAL):  # of one of several hosts, perhaps
            return None
        return next((refusal for words, refusal in REFUSALS.items() if words in text), None)
