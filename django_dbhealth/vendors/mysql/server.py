"""What MySQL and MariaDB say of themselves, asked with the rights of an ordinary account."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from django_dbhealth.vendors.relays import relay_between
from django_dbhealth.vendors.server import Limit, ServerState, Session

from .drivers import NO
from .faults import code_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

    from django_dbhealth.vendors.base import Driver
    from django_dbhealth.vendors.relays import Address

NONE_AT_ZERO = (
    "max_statement_time",  # MariaDB
    "max_execution_time",  # MySQL
    "idle_transaction_timeout",  # MariaDB, as are the next two
    "idle_readonly_transaction_timeout",
    "idle_write_transaction_timeout",
)
# Those that end a connection or a statement. interactive_timeout is not one: it is only where some
# sessions have their wait_timeout from (manual, wait_timeout).
TIMEOUTS = (
    "wait_timeout",
    "net_read_timeout",
    "net_write_timeout",
    "connect_timeout",
    "lock_wait_timeout",
    "innodb_lock_wait_timeout",
    *NONE_AT_ZERO,
)
MILLISECONDS = ("max_execution_time",)  # the others are seconds

READ_ONLY = ("read_only", "innodb_read_only")
VARIABLES = (
    *TIMEOUTS,
    *READ_ONLY,
    "version",
    "max_connections",
    "max_user_connections",  # the session's is its account's, whatever has set it (manual)
    "performance_schema",
)

LONGEST_STATEMENT = 1024  # characters of it that are fetched: an INSERT may have megabytes

SELECT_DENIED = 1142
NO_SUCH_THREAD = 1094


# The server


def server_state(connection: BaseDatabaseWrapper, driver: Driver | None) -> ServerState:
    """Return what the server says; ``driver`` is None for one that is not known."""
    with connection.cursor() as cursor:
        variables = _variables(cursor, _statistics(connection))
        account = _account(cursor, _processlist(connection, variables["performance_schema"]))
        sees_all = _sees_all(cursor)
        relay = relay_between(
            driver,
            connection.connection,
            session_id=account.session_id,
            seen_address=account.address,
        )
    return ServerState(
        product="MariaDB" if _is_mariadb(connection) else "MySQL",
        version=variables["version"],
        user=account.name,
        is_read_only=any(variables.get(name, "OFF") not in NO for name in READ_ONLY),
        proxy=relay.words,
        client_address=account.address,
        is_pooled=relay.is_pooled,
        timeouts=_timeouts(variables),
        idle_timeout=None if relay.is_pooled else "wait_timeout",
        limits=_limits(variables, account.used),
        unseen=() if sees_all else (_no_process(account.name),),
    )


def _is_mariadb(connection: BaseDatabaseWrapper) -> bool:
    return bool(connection.mysql_is_mariadb)  # type: ignore[attr-defined]


def _statistics(connection: BaseDatabaseWrapper) -> str:
    """Return the schema of the views of variables and counters."""
    return "information_schema" if _is_mariadb(connection) else "performance_schema"


def _processlist(connection: BaseDatabaseWrapper, performance_schema: str) -> str:
    """Return the view of the sessions.

    MySQL's manual calls the one in information_schema deprecated since 8.0.35; the other one is
    empty where performance_schema is off. MariaDB has the first only.
    """
    if _is_mariadb(connection) or performance_schema in NO:
        return "information_schema.processlist"
    return "performance_schema.processlist"


def _variables(cursor: CursorWrapper, schema: str) -> dict[str, str]:
    """Return what the server has of VARIABLES, the session's value where it has two."""
    cursor.execute(
        "SELECT LOWER(variable_name), variable_value"
        f" FROM {schema}.session_variables WHERE variable_name IN %s"
        " UNION ALL SELECT LOWER(variable_name), variable_value"
        f" FROM {schema}.global_status WHERE variable_name = 'Threads_connected'",
        [VARIABLES],
    )
    return dict(cursor.fetchall())


class _Account(NamedTuple):
    name: str
    session_id: int
    address: Address  # of this client, as the server has it
    used: int  # connections


def _account(cursor: CursorWrapper, processlist: str) -> _Account:
    # Every account sees its own sessions. Accounts of one name on several hosts are not told apart.
    # The list is read once, which takes a while where there are thousands; USER() is NAME@HOST.
    cursor.execute(
        "SELECT CURRENT_USER(), MAX(IF(id = CONNECTION_ID(), id, NULL)),"
        f" MAX(IF(id = CONNECTION_ID(), host, NULL)), COUNT(*) FROM {processlist}"
        " WHERE user = LEFT(USER(), CHAR_LENGTH(USER()) - LOCATE('@', REVERSE(USER())))"
    )
    name, session_id, host, used = cursor.fetchone()
    return _Account(name, session_id, _address(host), used)


_SEES_ALL = re.compile(r"GRANT (?:.*, )?(?:PROCESS|ALL PRIVILEGES)\b.* ON \*\.\* TO ")


def _sees_all(cursor: CursorWrapper) -> bool:
    """Return whether the account may see the sessions of others."""
    cursor.execute("SHOW GRANTS")
    return any(_SEES_ALL.match(grant) for (grant,) in cursor.fetchall())


def _no_process(account: str) -> str:
    return (
        f"The account {account} lacks the right PROCESS, so it sees its own sessions only, and of "
        "the others how many there are."
    )


def _timeouts(variables: Mapping[str, str]) -> dict[str, float | None]:
    return {name: _seconds(name, variables[name]) for name in TIMEOUTS if name in variables}


def _seconds(name: str, value: str) -> float | None:
    seconds = float(value) / (1000 if name in MILLISECONDS else 1)
    return None if seconds == 0 and name in NONE_AT_ZERO else seconds


def _limits(variables: Mapping[str, str], used: int) -> tuple[Limit, Limit]:
    return (
        Limit(
            name="max_connections",
            scope="server",
            maximum=int(variables["max_connections"]),
            used=int(variables["threads_connected"]),
        ),
        Limit(
            name="max_user_connections",
            scope="account",
            maximum=int(variables["max_user_connections"]) or None,
            used=used,
        ),
    )


# Its sessions


def sessions(connection: BaseDatabaseWrapper) -> Iterator[Session]:
    """Yield the sessions that the account may see, the server's own threads excepted."""
    with connection.cursor() as cursor:
        for number, user, address, *rest, replicates, is_own in _session_rows(connection, cursor):
            host, port = _address(address) or (None, None)
            yield Session._make((number, user, host, port, *rest, bool(replicates), bool(is_own)))


def _session_rows(connection: BaseDatabaseWrapper, cursor: CursorWrapper) -> Iterable[Any]:
    cursor.execute("SELECT @@performance_schema")
    (performance_schema,) = cursor.fetchone()
    if performance_schema in NO:
        cursor.execute(_sessions_query(connection, performance_schema, attributes=None))
        return cursor
    try:
        cursor.execute(_sessions_query(connection, performance_schema, "session_connect_attrs"))
    except Exception as error:
        if code_of(error) != SELECT_DENIED:
            raise
        # What this table has, its own account's, everybody may see.
        cursor.execute(
            _sessions_query(connection, performance_schema, "session_account_connect_attrs")
        )
    return cursor


def _sessions_query(
    connection: BaseDatabaseWrapper, performance_schema: Any, attributes: str | None
) -> str:
    processlist = _processlist(connection, performance_schema)
    idle = "time_ms / 1e3" if _is_mariadb(connection) else "time + 0e0"
    pid, join = "NULL", ""
    if attributes:
        pid = "CAST(attr_value AS UNSIGNED)"
        join = (
            f" LEFT JOIN performance_schema.{attributes} AS attributes"
            " ON processlist_id = id AND attr_name = '_pid'"
        )
    return (
        f"SELECT id, user, host, db, command, IF(command = 'Sleep', {idle}, 0e0),"
        f" LEFT(info, {LONGEST_STATEMENT}), {pid},"
        " command LIKE 'Binlog Dump%', id = CONNECTION_ID()"
        f" FROM {processlist}{join}"
        " WHERE user NOT IN ('system user', 'event_scheduler') AND command <> 'Daemon'"
    )


def _address(host: str | None) -> Address:
    """Return what "192.0.2.7:51234" says; "localhost" alone stands for a unix socket."""
    name, _, port = (host or "").rpartition(":")
    return (name, int(port)) if name else None


def terminate(connection: BaseDatabaseWrapper, session_id: int) -> bool:
    """End a session; return False where there is none of that number any more."""
    with connection.cursor() as cursor:
        try:
            cursor.execute("KILL CONNECTION %s", [session_id])
        except Exception as error:
            if code_of(error) != NO_SUCH_THREAD:
                raise
            return False
    return True
