"""What PostgreSQL says of itself, asked with the rights of an ordinary account."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from django_dbhealth.vendors.relays import relay_between
from django_dbhealth.vendors.server import Limit, ServerState, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.vendors.base import Driver

# Those that end a connection or a statement; those of later versions may be missing.
TIMEOUTS = (
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",  # 17
    "statement_timeout",
    "lock_timeout",
    "tcp_keepalives_idle",
    "tcp_user_timeout",
)

# Of a process of another account nothing is shown but its number, account and database. One
# that has both is a client, or now and then a worker for one. A walsender has slots of its own.
CLIENTS = (
    "(backend_type = 'client backend'"
    " OR backend_type IS NULL AND usesysid IS NOT NULL AND datid IS NOT NULL)"
)

# One statement: a pooler may send the next one to another session. Manual: 20.3.1 for the slots
# that are not for everybody, 52.8 and 54.20 for the limits that stand in tables.
STATE = f"""
WITH
    clients AS (SELECT usesysid, datid FROM pg_stat_activity WHERE {CLIENTS}),
    account AS (SELECT * FROM pg_roles WHERE rolname = session_user),
    this AS (SELECT * FROM pg_database WHERE datname = current_database())
SELECT
    current_setting('server_version'),
    session_user,
    pg_is_in_recovery() OR current_setting('transaction_read_only')::bool,
    pg_has_role('pg_read_all_stats', 'USAGE'),
    pg_backend_pid(),
    host(inet_client_addr()),
    inet_client_port(),
    (
        SELECT json_object_agg(
            name, setting::float8 / CASE unit WHEN 'ms' THEN 1000 ELSE 1 END
        )::text
        FROM pg_settings WHERE name IN ({", ".join(f"'{name}'" for name in TIMEOUTS)})
    ),
    current_setting('max_connections')::int,
    CASE WHEN account.rolsuper THEN 0 ELSE
        current_setting('superuser_reserved_connections')::int
        + coalesce(current_setting('reserved_connections', true)::int, 0)  -- 16
    END,
    (SELECT count(*) FROM clients),
    account.rolconnlimit,
    (SELECT count(*) FROM clients WHERE usesysid = account.oid),
    this.datconnlimit,
    (SELECT count(*) FROM clients WHERE datid = this.oid)
FROM account, this
"""

# In the order of Session's fields.
SESSIONS = f"""
SELECT
    pid,
    usename,
    host(client_addr),
    nullif(client_port, -1),  -- a unix socket
    datname,
    coalesce(state, 'unknown'),
    CASE
        WHEN state LIKE 'idle%' THEN extract(epoch FROM clock_timestamp() - state_change)::float8
        WHEN state = 'active' THEN 0
    END,
    CASE WHEN state <> 'idle' THEN query END,
    NULL,  -- the client says nothing of its process
    coalesce(backend_type, '') = 'walsender',
    pid = pg_backend_pid()
FROM pg_stat_activity WHERE {CLIENTS} OR backend_type = 'walsender'
"""


def server_state(connection: BaseDatabaseWrapper, driver: Driver | None) -> ServerState:
    """Return what the server says; ``driver`` is None for one that is not known."""
    with connection.cursor() as cursor:
        cursor.execute(STATE)
        version, user, is_read_only, sees_all, session_id, *rest = cursor.fetchone()
        host, port, timeouts, *limits = rest
        address = None if host is None else (host, port)
        relay = relay_between(
            driver,
            connection.connection,
            session_id=session_id,
            seen_address=address,
        )
    return ServerState(
        product="PostgreSQL",
        version=version,
        user=user,
        is_read_only=is_read_only,
        proxy=relay.words,
        client_address=address,
        is_pooled=relay.is_pooled,
        timeouts=_timeouts(json.loads(timeouts)),
        idle_timeout=None if relay.is_pooled else "idle_session_timeout",
        limits=_limits(*limits),
        unseen=() if sees_all else (_no_stats(user),),
    )


def _timeouts(seconds: Mapping[str, float]) -> dict[str, float | None]:
    return {name: seconds[name] or None for name in TIMEOUTS if name in seconds}  # 0: none


def _limits(
    maximum: int,
    reserved: int,
    used: int,
    role_maximum: int,
    role_used: int,
    database_maximum: int,
    database_used: int,
) -> tuple[Limit, ...]:
    """Return the limits; -1 is PostgreSQL's word for none."""
    return (
        Limit(
            name="max_connections, less the reserved ones" if reserved else "max_connections",
            scope="server",
            maximum=maximum - reserved,
            used=used,
        ),
        Limit(
            name="CONNECTION LIMIT of the role",
            scope="account",
            maximum=None if role_maximum < 0 else role_maximum,
            used=role_used,
        ),
        Limit(
            name="CONNECTION LIMIT of the database",
            scope="database",
            maximum=None if database_maximum < 0 else database_maximum,
            used=database_used,
        ),
    )


def _no_stats(user: str) -> str:
    return (
        f"The account {user} is no member of pg_read_all_stats, so of the sessions of other "
        "accounts it sees neither the address nor the state nor the statement."
    )


def sessions(connection: BaseDatabaseWrapper) -> Iterator[Session]:
    """Yield the sessions of clients, replication's too, and not the server's own processes."""
    with connection.cursor() as cursor:
        cursor.execute(SESSIONS)
        yield from map(Session._make, cursor)


def terminate(connection: BaseDatabaseWrapper, session_id: int) -> bool:
    """End a session; return False where there is none of that number any more."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [session_id])
        (was_there,) = cursor.fetchone()
    return bool(was_there)
