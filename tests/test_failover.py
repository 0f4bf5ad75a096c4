"""After a failover the old primary is read-only: its connections are given up where they may be."""

from __future__ import annotations

import gc
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from django.db import Error, connections, transaction

from django_dbhealth import close_old_connections
from django_dbhealth.signals import connection_healed
from django_dbhealth.watch import watch_of
from tests.app.models import Row
from tests.conftest import KINDS, create_tables, register, unregister
from tests.servers import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

MARIADB, POSTGRESQL = "mariadb", "postgresql"
DRIVERS = [
    pytest.param((MARIADB, "django.db.backends.mysql"), id="mysqlclient"),
    pytest.param((MARIADB, "tests.pymysql_backend"), id="PyMySQL"),
    pytest.param((POSTGRESQL, "django.db.backends.postgresql"), id="psycopg"),
]


class Pair:
    """Two servers, and a proxy that leads to one of them."""

    def __init__(self, kind: str) -> None:
        self.old, self.new = KINDS[kind](), KINDS[kind]()
        for server in (self.old, self.new):
            server.start()
            register("database", server.django())
            create_tables("database")
            unregister("database")
        self.read_only = "read_only" if kind == MARIADB else "default_transaction_read_only"
        self.proxy = Proxy(self.old.host, self.old.port)
        self.proxy.start()

    def remove(self) -> None:
        self.proxy.stop()
        self.old.remove()
        self.new.remove()

    def begin_anew(self) -> None:
        """Have the old server as the primary, and no rows."""
        self.old.set(**{self.read_only: "OFF"})
        self.proxy.lead_to(self.old.host, self.old.port)
        for server in (self.old, self.new):
            server.execute("DELETE FROM app_row", database="test")

    def fail_over(self) -> None:
        """Make the old server read-only; only new connections lead to the new one."""
        self.old.set(**{self.read_only: "ON"})
        self.proxy.lead_to(self.new.host, self.new.port)

    def rows(self, server: Server) -> list[str]:
        found = server.execute("SELECT name FROM app_row ORDER BY id", database="test")
        return [name for (name,) in found]


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    pairs = {kind: Pair(kind) for kind in (MARIADB, POSTGRESQL)}
    yield pairs
    for pair in pairs.values():
        pair.remove()


@pytest.fixture(params=DRIVERS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Iterator[Pair]:
    """Give the alias "database", by way of the proxy, with one of the drivers."""
    kind, engine = request.param
    pair = pairs[kind]
    pair.begin_anew()
    settings = pair.old.django(transport="tcp", ENGINE=engine, PORT=str(pair.proxy.port))
    register("database", settings)
    yield pair
    unregister("database")


def create(name: str) -> None:
    Row.objects.using("database").create(name=name)


def run(sql: str) -> None:
    with connections["database"].cursor() as cursor:
        cursor.execute(sql)


def test_next_use_meets_the_new_primary(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """One write is refused; the next goes to the new primary, and it is told why."""
    caplog.set_level(logging.INFO, "django_dbhealth")
    healed: list[str] = []

    def note(signal: Any, reason: str, **arguments: Any) -> None:
        healed.append(reason)

    create("before")
    pair.fail_over()
    with pytest.raises(Error) as caught:
        create("refused")
    assert "the next use outside a transaction gets another connection" in caught.value.__notes__[0]
    connection_healed.connect(note)
    try:
        create("after")
    finally:
        connection_healed.disconnect(note)
    assert (pair.rows(pair.old), pair.rows(pair.new)) == (["before"], ["after"])
    assert healed == ["the server is read-only"]
    assert "the server is read-only" in caplog.records[-1].message


def test_transaction_ends_where_it_began(pair: Pair) -> None:
    """All of it meets the old server, also what comes after the error; then the new one is met."""
    create("before")
    pair.fail_over()
    with pytest.raises(Error), transaction.atomic("database"):
        with suppress(Error), transaction.atomic("database"):
            create("refused")
        assert Row.objects.using("database").count() == 1
        run("SELECT nonsense")  # another error does not make the first forgotten
    with transaction.atomic("database"):
        assert Row.objects.using("database").count() == 0
        create("after")
    assert (pair.rows(pair.old), pair.rows(pair.new)) == (["before"], ["after"])


def test_boundary_gives_it_up(pair: Pair) -> None:
    """A worker that closes old connections between its jobs does not keep the old server."""
    connections["database"].settings_dict["CONN_MAX_AGE"] = 600
    create("before")
    pair.fail_over()
    with pytest.raises(Error):
        create("refused")
    close_old_connections()
    assert connections["database"].connection is None
    create("after")
    assert pair.rows(pair.new) == ["after"]


def test_session_state_keeps_it(pair: Pair) -> None:
    """With a lock on it the connection stays, and the note says so; without, it is given up."""
    take, give = "SELECT GET_LOCK('shelf', 0)", "SELECT RELEASE_LOCK('shelf')"
    if pair.old.vendor == "postgresql":
        take, give = "SELECT pg_advisory_lock(77)", "SELECT pg_advisory_unlock(77)"
    run(take)
    pair.fail_over()
    for _ in range(2):
        with pytest.raises(Error) as caught:
            create("refused")
        assert "is kept, because its session carries" in caught.value.__notes__[0]
        close_old_connections()
    run(give)
    del caught
    gc.collect()  # Django's error holds its cursor, whose rows might still have to be read
    create("after")
    assert pair.rows(pair.new) == ["after"]


def test_failover_that_is_not_over(pair: Pair) -> None:
    """While new connections still lead to the old server, each refused write costs one connect."""
    create("before")
    pair.fail_over()
    pair.proxy.lead_to(pair.old.host, pair.old.port)
    for _ in range(2):
        with pytest.raises(Error):
            create("refused")
    pair.proxy.lead_to(pair.new.host, pair.new.port)
    create("after")
    assert pair.rows(pair.new) == ["after"]


# What looks alike


def session_of(connection: Any) -> int:
    handle = connection.connection
    return int(handle.thread_id() if connection.vendor == "mysql" else handle.info.backend_pid)


def test_no_failover(database: Any) -> None:
    """A READ ONLY transaction of the program's own is no reason to go elsewhere."""
    connection = connections["database"]
    begin = {"mysql": "START TRANSACTION READ ONLY", "postgresql": "BEGIN READ ONLY"}
    create("before")
    session = session_of(connection)
    run(begin[connection.vendor])
    with pytest.raises(Error):
        create("refused")
    watch = watch_of(connection)
    assert watch is not None
    assert watch.refused_write
    run("ROLLBACK")
    create("after")
    assert session_of(connection) == session
    assert not watch.refused_write


def test_standby(new_server: Any, add_database: Any) -> None:
    """A PostgreSQL in recovery says so itself."""
    server = new_server("postgresql", wal_level="replica")
    add_database(server.django(), alias="database")
    server.stop()
    (server.directory / "data" / "standby.signal").touch()
    server.start()
    connection: Any = connections["database"]
    connection.ensure_connection()
    session = session_of(connection)
    with pytest.raises(Error, match="read-only"):
        create("refused")
    assert Row.objects.using("database").count() == 0
    assert session_of(connection) != session


def test_pool_does_not_lend_it_again(new_server: Any, add_database: Any) -> None:
    """Django's pool gets its handle back ended, and opens another one."""
    server = new_server("postgresql")
    add_database(server.django(), alias="database", OPTIONS={"pool": {"min_size": 1}})
    connection: Any = connections["database"]
    create("before")
    session = session_of(connection)
    server.set(default_transaction_read_only="ON")
    with pytest.raises(Error):
        create("refused")
    server.set(default_transaction_read_only="OFF")
    connection.connection.pgconn.exec_(b"SET default_transaction_read_only = on")  # unseen
    create("after")
    assert session_of(connection) != session
