"""What a server says of itself, against what its administrator is told."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extras
import pytest
from django.db import Error, connections, transaction

from django_dbhealth.vendors import driver_of, vendor_named
from django_dbhealth.vendors.base import Vendor
from django_dbhealth.vendors.postgresql.drivers import Psycopg2
from django_dbhealth.vendors.relays import Relay, own_address, relay_between
from tests.conftest import register, unregister
from tests.servers import HAProxy, MariaDBServer, PgBouncer, PostgreSQLServer, Proxy, wait_for
from tests.servers.base import ADMIN, PASSWORD, USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_dbhealth.vendors.server import Limit, ServerState, Session
    from tests.servers import Server

    Connect = Callable[..., Any]

MARIADB_SETTINGS = {
    "wait_timeout": 77,
    "net_read_timeout": 41,
    "max_statement_time": 2.5,
    "idle_transaction_timeout": 9,
    "max_connections": 33,
    "max_user_connections": 12,
    "log_bin": "log",
    "server_id": 1,
}
POSTGRESQL_SETTINGS = {
    "idle_session_timeout": "77s",
    "idle_in_transaction_session_timeout": "1500ms",
    "statement_timeout": "2min",
    "max_connections": 33,
    "superuser_reserved_connections": 2,
    "max_wal_senders": 2,
    "wal_level": "replica",
}


@pytest.fixture(scope="module")
def maria() -> Iterator[Server]:
    """A MariaDB whose figures are all its own, with an account that has hardly any rights."""
    with MariaDBServer(**MARIADB_SETTINGS) as server:
        for name in ("guest", "viewer"):
            server.execute(f"CREATE USER {name}@'%%' IDENTIFIED BY %s", [PASSWORD])
            server.execute(f"GRANT SELECT ON test.* TO {name}@'%'")
        server.execute("GRANT SELECT, PROCESS ON *.* TO viewer@'%'")
        server.execute("ALTER USER guest@'%' WITH MAX_USER_CONNECTIONS 5")
        yield server


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A PostgreSQL whose figures are all its own."""
    with PostgreSQLServer(**POSTGRESQL_SETTINGS) as server:
        for name in ("guest", "viewer"):
            server.execute(f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 5 PASSWORD '{PASSWORD}'")
        server.execute("GRANT pg_monitor TO viewer")
        server.execute("ALTER DATABASE test CONNECTION LIMIT 20")
        yield server


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open Django's connections: `connect(server, "tcp", USER="guest")`."""
    aliases: list[str] = []
    servers: set[Any] = set()

    def opened(server: Any, transport: Any = "socket", **settings: Any) -> Any:
        alias = f"opened{len(aliases)}"
        register(alias, server.django(transport=transport, **settings))
        aliases.append(alias)
        servers.add(server)
        connections[alias].ensure_connection()
        return connections[alias]

    yield opened
    for alias in aliases:
        unregister(alias)
    for server in servers:  # the next test counts them
        if server.running:
            server.wait_for_sessions(0)


def state_of(connection: Any) -> ServerState:
    vendor = vendor_named(connection.vendor)
    assert vendor is not None
    return vendor.server_state(connection)


def sessions_of(connection: Any) -> list[Session]:
    vendor = vendor_named(connection.vendor)
    assert vendor is not None
    return sorted(vendor.sessions(connection), key=lambda session: session.id)


def terminate(connection: Any, session_id: int) -> bool:
    vendor = vendor_named(connection.vendor)
    assert vendor is not None
    return vendor.terminate(connection, session_id)


def query(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


def own_id(connection: Any) -> int:
    function = "CONNECTION_ID" if connection.vendor == "mysql" else "pg_backend_pid"
    return int(query(connection, f"SELECT {function}()")[0][0])


def port_of(connection: Any) -> int | None:
    """Return the port from which a connection leaves, None for a unix socket."""
    driver = driver_of(connection)
    descriptor = driver.descriptor(connection.connection) if driver else None
    assert descriptor is not None
    address = own_address(descriptor)
    return address and address[1]


def limits(state: ServerState) -> dict[str, Limit]:
    return {limit.scope: limit for limit in state.limits}


both_transports = pytest.mark.parametrize("transport", ["socket", "tcp"])
both_mysql_drivers = pytest.mark.parametrize(
    "engine", ["django.db.backends.mysql", "tests.pymysql_backend"]
)


# MariaDB's state


@both_transports
@both_mysql_drivers
def test_mariadb(maria: Server, connect: Connect, engine: str, transport: str) -> None:
    """Product, version, account and timeouts are the server's own words and figures."""
    connection = connect(
        maria, transport, ENGINE=engine, OPTIONS={"init_command": "SET SESSION wait_timeout = 55"}
    )
    state = state_of(connection)
    assert (state.product, state.user) == ("MariaDB", "shop@%")
    assert [(state.version,)] == maria.execute("SELECT VERSION()")
    assert (state.proxy, state.is_pooled, state.is_read_only) == (None, False, False)
    told = dict(query(connection, "SHOW SESSION VARIABLES"))
    assert {name: seconds or 0 for name, seconds in state.timeouts.items()} == {
        name: float(told[name]) for name in state.timeouts
    }
    assert state.timeouts["wait_timeout"] == 55
    assert state.timeouts["net_read_timeout"] == 41
    assert state.timeouts["max_statement_time"] == 2.5
    assert state.timeouts["idle_transaction_timeout"] == 9
    assert state.timeouts["idle_write_transaction_timeout"] is None
    assert state.idle_timeout == "wait_timeout"


def test_mariadb_lock_wait_of_zero_is_a_timeout(maria: Server, connect: Connect) -> None:
    """No patience for locks is not the same as no limit of it."""
    options = {"init_command": "SET SESSION lock_wait_timeout = 0"}
    assert state_of(connect(maria, OPTIONS=options)).timeouts["lock_wait_timeout"] == 0


def test_mariadb_limits(maria: Server, connect: Connect) -> None:
    """The limits of an account without rights, and what is in use, also what it does not see."""
    connect(maria), connect(maria, "tcp")
    connect(maria, USER="guest")
    connection = connect(maria, "tcp", USER="guest")
    wait_for(lambda: limits(state_of(connection))["server"].used == 4)  # the administrator is gone
    state = state_of(connection)
    server, account = limits(state)["server"], limits(state)["account"]
    assert (server.name, server.maximum, server.used) == ("max_connections", 33, 4)
    assert (account.name, account.maximum, account.used) == ("max_user_connections", 5, 2)
    assert len(maria.sessions("guest")) == 2
    [unseen] = state.unseen
    assert unseen == (
        "The account guest@% lacks the right PROCESS, so it sees its own sessions only, and of the "
        "others how many there are."
    )


def test_mariadb_limit_of_all_accounts(maria: Server, connect: Connect) -> None:
    """Where the account has no limit of its own, the server's for each account holds."""
    account = limits(state_of(connect(maria)))["account"]
    assert (account.maximum, account.used) == (12, 1)


def test_mariadb_without_a_limit(mariadb: Server, connect: Connect) -> None:
    """0 is none."""
    assert limits(state_of(connect(mariadb)))["account"].maximum is None


def test_mariadb_with_rights(maria: Server, connect: Connect) -> None:
    """Nothing is unseen with PROCESS, by itself or among all."""
    for account in ("viewer", ADMIN):
        assert state_of(connect(maria, USER=account)).unseen == ()


def test_read_only(maria: Server, postgres: Server, connect: Connect) -> None:
    """A server that takes no writes says so, or one session of it."""
    maria.set(read_only=1)
    try:
        assert state_of(connect(maria)).is_read_only
    finally:
        maria.set(read_only=0)
    options = {"options": "-c default_transaction_read_only=on"}
    assert state_of(connect(postgres, OPTIONS=options)).is_read_only


# PostgreSQL's state


@both_transports
def test_postgresql(postgres: Server, connect: Connect, transport: str) -> None:
    """Product, version, account and timeouts are the server's own words and figures."""
    connection = connect(postgres, transport, OPTIONS={"options": "-c lock_timeout=250"})
    state = state_of(connection)
    assert (state.product, state.user) == ("PostgreSQL", USER)
    assert [(state.version,)] == postgres.execute("SHOW server_version")
    assert (state.proxy, state.is_pooled, state.is_read_only) == (None, False, False)
    assert state.idle_timeout == "idle_session_timeout"
    timeouts = dict(state.timeouts)
    keepalive = timeouts.pop("tcp_keepalives_idle")
    timeouts.pop("transaction_timeout", None)  # 17
    assert timeouts == {
        "idle_session_timeout": 77,
        "idle_in_transaction_session_timeout": 1.5,
        "statement_timeout": 120,
        "lock_timeout": 0.25,
        "tcp_user_timeout": None,
    }
    assert [(str(int(keepalive or 0)),)] == query(
        connection, "SELECT setting FROM pg_settings WHERE name = 'tcp_keepalives_idle'"
    )
    assert (keepalive is None) == (transport == "socket")


def clients(server: Server, condition: str = "true") -> int:
    """Count the clients as the administrator sees them, who is not one of them."""
    [(count,)] = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        f" AND pid <> pg_backend_pid() AND {condition}"
    )
    return int(count)


@pytest.mark.parametrize("account", ["guest", "viewer"])
def test_postgresql_limits(postgres: Server, connect: Connect, account: str) -> None:
    """The limits of the server, the role and the database, and what is in use of each."""
    connect(postgres), connect(postgres, "tcp")
    connect(postgres, USER=account)
    connect(postgres, USER=ADMIN, NAME="postgres")
    connection = connect(postgres, "tcp", USER=account)
    wait_for(lambda: limits(state_of(connection))["server"].used == 5)  # the others are gone
    state = state_of(connection)
    found = {
        scope: (limit.name, limit.maximum, limit.used) for scope, limit in limits(state).items()
    }
    assert clients(postgres) == 5
    assert found == {
        "server": ("max_connections, less the reserved ones", 31, 5),
        "account": ("CONNECTION LIMIT of the role", 5, clients(postgres, f"usename='{account}'")),
        "database": ("CONNECTION LIMIT of the database", 20, clients(postgres, "datname='test'")),
    }
    assert (found["account"][2], found["database"][2]) == (2, 4)


def test_postgresql_limits_of_an_administrator(postgres: Server, connect: Connect) -> None:
    """The reserved connections are an administrator's too, and -1 is no limit."""
    state = state_of(connect(postgres, USER=ADMIN, NAME="postgres"))
    found = {scope: (limit.name, limit.maximum) for scope, limit in limits(state).items()}
    assert found == {
        "server": ("max_connections", 33),
        "account": ("CONNECTION LIMIT of the role", None),
        "database": ("CONNECTION LIMIT of the database", None),
    }


def test_postgresql_rights(postgres: Server, connect: Connect) -> None:
    """What the account may not see is said, unless it may see all."""
    [unseen] = state_of(connect(postgres)).unseen
    assert unseen == (
        "The account shop is no member of pg_read_all_stats, so of the sessions of other accounts "
        "it sees neither the address nor the state nor the statement."
    )
    for account in ("viewer", ADMIN):
        assert state_of(connect(postgres, USER=account)).unseen == ()


# What stands between


def test_nothing_between(maria: Server, postgres: Server, connect: Connect) -> None:
    """A direct connection stays as it was: reading the address changes no socket."""
    for server in (maria, postgres):
        connection = connect(server, "tcp")
        driver = driver_of(connection)
        assert driver is not None
        descriptor = driver.descriptor(connection.connection)
        assert descriptor is not None
        before = os.get_blocking(descriptor)
        socket.setdefaulttimeout(5)
        try:
            assert state_of(connection).proxy is None
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(descriptor) == before


@pytest.mark.parametrize("kind", ["maria", "postgres"])
def test_haproxy(kind: str, request: pytest.FixtureRequest, connect: Connect) -> None:
    """A proxy is told by the port that the server sees; the session is still one's own."""
    server: Server = request.getfixturevalue(kind)
    with HAProxy(server) as proxy:
        address = {"HOST": proxy.host, "PORT": str(proxy.port)}
        connection = connect(server, "tcp", **address)
        state = state_of(connection)
        port = port_of(connection)
        [own] = [session for session in sessions_of(connection) if session.is_own]
        assert own.port != port
        assert state.proxy == (
            f"A proxy, a tunnel or a NAT: this connection leaves from 127.0.0.1, port {port}, "
            f"and the server sees it come from 127.0.0.1, port {own.port}."
        )
        assert not state.is_pooled
        assert state.idle_timeout is not None
        connection.close()


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pgbouncer(mode: str, postgres: Server, connect: Connect) -> None:
    """A pooler is told by the session's number; all figures but the idle timeout still hold."""
    with PgBouncer(postgres, pool_mode=mode) as bouncer:
        address = {"HOST": bouncer.host, "PORT": str(bouncer.port)}
        connection = connect(postgres, "tcp", DISABLE_SERVER_SIDE_CURSORS=True, **address)
        state = state_of(connection)
        assert state.is_pooled
        assert state.proxy is not None
        number = own_id(connection)
        told = connection.connection.info.backend_pid
        assert state.proxy == (
            f"A pooler: the server calls this session {number}, the driver was told {told}."
        )
        assert state.idle_timeout is None
        assert state.timeouts["idle_session_timeout"] == 77
        assert limits(state)["server"].maximum == 31
        assert [session.id for session in sessions_of(connection) if session.is_own] == [number]
        other = connect(postgres)
        assert terminate(connection, own_id(other))
        connection.close()


class OtherNumbers(Proxy):
    """Tell each client another number of its session, as ProxySQL and MaxScale do."""

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        if source.getpeername()[1] == self._target[1]:
            greeting = await self._loop.sock_recv(source, 65536)
            at = greeting.index(b"\0", 5) + 1  # after the version comes the number
            await self._loop.sock_sendall(target, greeting[:at] + b"\7\7\7\7" + greeting[at + 4 :])
        await super()._pump(source, target)


@both_mysql_drivers
def test_pooler_of_mysql(maria: Server, connect: Connect, engine: str) -> None:
    """A pooler that speaks MySQL's protocol is told by the session's number as well."""
    with OtherNumbers(maria.host, maria.port) as pooler:
        address = {"HOST": pooler.host, "PORT": str(pooler.port)}
        connection = connect(maria, "tcp", ENGINE=engine, **address)
        state = state_of(connection)
        assert state.proxy == (
            f"A pooler: the server calls this session {own_id(connection)}, the driver was told "
            f"{0x07070707}."
        )
        assert state.is_pooled
        assert state.idle_timeout is None
        connection.close()


def test_number_of_psycopg2(postgres: Server) -> None:
    """psycopg2 knows the session's number like the others."""
    handle = psycopg2.connect(
        host=str(postgres.socket), user=USER, password=PASSWORD, dbname="test"
    )
    with closing(handle), handle.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone() == (Psycopg2().session_id(handle),)


@pytest.mark.parametrize(
    ("own", "seen", "is_same"),
    [
        (("127.0.0.1", 5000), ("127.0.0.1", 5000), True),
        (("127.0.0.1", 5000), ("127.0.0.1", 5001), False),
        (("192.0.2.1", 5000), ("192.0.2.2", 5000), False),
        (("192.0.2.1", 5000), ("::ffff:192.0.2.1", 5000), True),
        (("fe80::1%eth0", 5000), ("fe80::1", 5000), True),
        (("127.0.0.1", 5000), ("localhost", 5000), True),
        (("127.0.0.1", 5000), ("localhost", 5001), False),
    ],
)
def test_addresses(own: Any, seen: Any, is_same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that mean the same are the same; a name is nobody's address."""
    # No socket of this machine has most of these addresses.
    monkeypatch.setattr("django_dbhealth.vendors.relays.own_address", lambda descriptor: own)
    driver: Any = SimpleNamespace(session_id=lambda handle: 1, descriptor=lambda handle: 0)
    relay = relay_between(driver, None, session_id=1, seen_address=seen)
    assert (relay.words is None) == is_same


def test_unix_socket_on_one_side_only() -> None:
    """Whoever leaves by a unix socket and arrives by TCP, or the reverse, has been relayed."""
    here, there = socket.socketpair()
    with here, there:
        driver: Any = SimpleNamespace(
            session_id=lambda handle: 1, descriptor=lambda handle: here.fileno()
        )
        relay = relay_between(driver, None, session_id=1, seen_address=("192.0.2.1", 5000))
        assert relay.words == (
            "A proxy, a tunnel or a NAT: this connection leaves from a unix socket, and the server "
            "sees it come from 192.0.2.1, port 5000."
        )
        assert relay_between(driver, None, session_id=1, seen_address=None).words is None


# Sessions


@contextmanager
def running(connection: Any, sql: str) -> Iterator[None]:
    """Have a statement run in a connection's session; it is ended with the block."""

    def run() -> None:
        with pytest.raises(Error), connection.cursor() as cursor:
            cursor.execute(sql)

    connection.inc_thread_sharing()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(20)
        connection.dec_thread_sharing()
        assert not thread.is_alive()


SLEEP = {"mysql": "SELECT SLEEP(19)", "postgresql": "SELECT pg_sleep(19)"}
IDLE = {"mysql": "Sleep", "postgresql": "idle"}
BUSY = {"mysql": "Query", "postgresql": "active"}


@pytest.mark.parametrize("kind", ["maria", "postgres"])
def test_sessions(kind: str, request: pytest.FixtureRequest, connect: Connect) -> None:
    """Each session has its number, account, address, database, state and statement."""
    server: Server = request.getfixturevalue(kind)
    vendor = server.vendor
    idle, busy, asking = connect(server), connect(server, "tcp"), connect(server, USER=ADMIN)
    number, port = own_id(busy), port_of(busy)
    with running(busy, SLEEP[vendor]):
        wait_for(lambda: SLEEP[vendor] in {each.statement for each in sessions_of(asking)})
        found = {session.id: session for session in sessions_of(asking)}
        first, second, third = found[own_id(idle)], found[number], found[own_id(asking)]
        assert (first.user, first.host, first.port) == (USER, None, None)
        assert (first.database, first.state, first.statement) == ("test", IDLE[vendor], None)
        assert first.idle_seconds is not None
        assert 0 <= first.idle_seconds < 60
        assert (second.host, second.port) == ("127.0.0.1", port)
        assert (second.state, second.statement) == (BUSY[vendor], SLEEP[vendor])
        assert second.idle_seconds == 0
        assert (third.user, third.is_own, third.state) == (ADMIN, True, BUSY[vendor])
        assert [session.id for session in found.values() if session.is_own] == [third.id]
        assert not any(session.is_replication for session in found.values())
        assert terminate(asking, number)
    server.wait_until_gone(number)
    assert not terminate(asking, number)
    assert number not in {session.id for session in sessions_of(asking)}


@pytest.mark.parametrize("kind", ["maria", "postgres"])
def test_idle_seconds(kind: str, request: pytest.FixtureRequest, connect: Connect) -> None:
    """Idleness grows, with fractions of a second, and begins anew with each statement."""
    server: Server = request.getfixturevalue(kind)
    idle, asking = connect(server), connect(server)
    number = own_id(idle)

    def seconds() -> float:
        [found] = [each.idle_seconds for each in sessions_of(asking) if each.id == number]
        assert found is not None
        return found

    wait_for(lambda: seconds() > 0.3 and seconds() % 1)
    began = time.monotonic()
    own_id(idle)
    assert seconds() <= time.monotonic() - began + 0.1


def test_idle_in_transaction(postgres: Server, connect: Connect) -> None:
    """PostgreSQL's idle session in a transaction has its state, and its last statement."""
    other, asking = connect(postgres), connect(postgres)
    with transaction.atomic(other.alias):
        number = own_id(other)
        [found] = [each for each in sessions_of(asking) if each.id == number]
        assert found.state == "idle in transaction"
        assert found.statement == "SELECT pg_backend_pid()"
        assert found.idle_seconds is not None


def test_sessions_without_rights(maria: Server, postgres: Server, connect: Connect) -> None:
    """MariaDB shows an account its own sessions; PostgreSQL those of others, and little of them."""
    connect(maria, "tcp"), connect(postgres, "tcp")
    own = connect(maria, USER="guest")
    assert [each.user for each in sessions_of(own)] == ["guest"]
    asking = connect(postgres, USER="guest")
    [other] = [each for each in sessions_of(asking) if not each.is_own]
    assert (other.user, other.database, other.state) == (USER, "test", "unknown")
    assert (other.host, other.port, other.idle_seconds, other.statement) == (None,) * 4


def test_long_statement(maria: Server, connect: Connect) -> None:
    """Of a statement of megabytes the beginning is fetched."""
    busy, asking = connect(maria), connect(maria)
    statement = f"SELECT SLEEP(19), '{'x' * 2_000_000}'"
    number = own_id(busy)
    with running(busy, statement):
        beginning = (number, statement[:1024])
        wait_for(lambda: beginning in [(each.id, each.statement) for each in sessions_of(asking)])
        assert terminate(asking, number)


@pytest.mark.parametrize("kind", ["maria", "postgres"])
def test_rights_to_terminate(kind: str, request: pytest.FixtureRequest, connect: Connect) -> None:
    """Another account's session is ended by nobody without the right: Django's error comes."""
    server: Server = request.getfixturevalue(kind)
    other, asking = connect(server, USER=ADMIN), connect(server)
    with pytest.raises(Error):
        terminate(asking, own_id(other))
    assert query(other, "SELECT 1") == [(1,)]


def test_sessions_are_streamed(maria: Server, postgres: Server, connect: Connect) -> None:
    """Nothing is asked before the first session is wanted, and the rest is not waited for."""
    for server in (maria, postgres):
        connect(server)
        asking = connect(server)
        iterator = vendor_named(server.vendor).sessions(asking)  # type: ignore[union-attr]
        assert iter(iterator) is iterator
        assert next(iterator).id
        iterator.close()  # type: ignore[attr-defined]
        assert query(asking, "SELECT 1") == [(1,)]


def test_pid_of_the_client(new_server: Any, connect: Connect) -> None:
    """What the client said of itself is kept where performance_schema is on."""
    server = new_server("mariadb", performance_schema="ON")
    server.execute("CREATE USER guest@'%%' IDENTIFIED BY %s", [PASSWORD])
    server.execute("GRANT SELECT ON test.* TO guest@'%'")
    for account in ("guest", ADMIN):  # the second may see everybody's
        ours, asking = connect(server, USER="guest"), connect(server, USER=account)
        found = {each.id: each.client_pid for each in sessions_of(asking)}
        assert found[own_id(ours)] == found[own_id(asking)] == os.getpid()


def test_no_pid_of_the_client(maria: Server, connect: Connect) -> None:
    """Where it is off, as MariaDB is by default, nobody knows."""
    assert [each.client_pid for each in sessions_of(connect(maria))] == [None]


def test_replication_of_mariadb(maria: Server, new_server: Any, connect: Connect) -> None:
    """A replica's session is marked on the primary; its own threads are no sessions."""
    replica = new_server("mariadb", server_id=2)
    replica.execute(
        "CHANGE MASTER TO master_host = %s, master_port = %s, master_user = %s,"
        " master_password = %s",
        [maria.host, maria.port, ADMIN, PASSWORD],
    )
    replica.execute("START SLAVE")
    primary = connect(maria, USER=ADMIN)
    marked = wait_for(lambda: [each for each in sessions_of(primary) if each.is_replication])
    assert [(each.user, each.state) for each in marked] == [(ADMIN, "Binlog Dump")]
    asking = connect(replica, USER=ADMIN)
    threads = "SELECT 1 FROM information_schema.processlist WHERE user = 'system user'"
    assert query(asking, threads)
    # The administrator's own short connections go by.
    wait_for(lambda: [each.is_own for each in sessions_of(asking)] == [True])
    replica.execute("STOP SLAVE")


def test_replication_of_postgresql(postgres: Server, connect: Connect) -> None:
    """A replica's session is marked."""
    handle = psycopg2.connect(
        host=str(postgres.socket),
        user=ADMIN,
        dbname="test",
        connection_factory=psycopg2.extras.LogicalReplicationConnection,
    )
    with closing(handle):
        found = sessions_of(connect(postgres, USER=ADMIN))
        number = handle.get_backend_pid()
        assert [each.id for each in found if each.is_replication] == [number]


# Nothing to ask


def test_sqlite() -> None:
    """SQLite has no server: there is nothing to ask, and nobody to end."""
    connection = connections["sqlite"]
    state = state_of(connection)
    assert (state.product, state.version) == ("SQLite", sqlite3.sqlite_version)
    assert state.unseen == ("There is nothing to ask: SQLite is part of this process.",)
    assert (state.limits, state.timeouts, state.idle_timeout) == ((), {}, None)
    assert sessions_of(connection) == []
    assert not terminate(connection, 1)


def test_unknown_database() -> None:
    """Of a database that is not known here nothing is asked."""
    connection: Any = SimpleNamespace(display_name="Frobnicator")
    state = Vendor().server_state(connection)
    assert (state.product, state.version) == ("Frobnicator", "")
    assert state.unseen == (
        "The server is not asked: django-dbhealth does not know this database.",
    )
    assert list(Vendor().sessions(connection)) == []
    assert not Vendor().terminate(connection, 1)


def test_unknown_driver() -> None:
    """Of a driver that is not known neither number nor address can be asked."""
    assert relay_between(None, None, session_id=1, seen_address=("192.0.2.1", 5000)) == Relay()
