"""Encrypted connections: there OpenSSL has the first word when one is lost, in words of its own."""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
from django.db import Error, connections, transaction

from django_dbhealth import Kind, Outcome, classify
from tests.app.models import Row
from tests.conftest import KINDS, create_tables
from tests.faults import DRIVERS
from tests.outcomes import socket_ended
from tests.servers import Proxy
from tests.servers.base import PASSWORD, USER, find_program, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

ASK = {
    "mysql": "SELECT variable_value, CONNECTION_ID() FROM information_schema.session_status"
    " WHERE variable_name = 'Ssl_version'",
    "postgresql": "SELECT version, pid FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
}


def start_with_tls(kind: str) -> Server:
    """Start a server that has made itself a certificate."""
    server = KINDS[kind]()
    server.start()
    data = server.directory / "data"  # where PostgreSQL looks for these two
    certificate, key = data / "server.crt", data / "server.key"
    openssl = find_program("openssl", [], "apt install openssl.")
    files = ["-out", str(certificate), "-keyout", str(key)]
    run([openssl, "req", "-new", "-x509", "-nodes", "-subj", "/CN=localhost", *files])
    for file in (certificate, key):
        file.chmod(0o600)
        if server.owner:
            shutil.chown(file, server.owner)
    if kind == "mariadb":
        server.settings |= {"ssl_cert": certificate, "ssl_key": key}
        server.restart()
    else:
        server.set(ssl=True)
    return server


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    servers = {kind: start_with_tls(kind) for kind in KINDS}
    yield servers
    for server in servers.values():
        server.remove()


class Encrypted:
    """A connection of Django's to a server, with a proxy before it."""

    def __init__(self, server: Server, proxy: Proxy, alias: str) -> None:
        self.server, self.proxy, self.alias = server, proxy, alias
        create_tables(alias)
        Row.objects.using(alias).all().delete()

    def session(self) -> int:
        with connections[self.alias].cursor() as cursor:
            cursor.execute(ASK[self.server.vendor])
            version, session = cursor.fetchone()
        assert version.startswith("TLS")
        return int(session)

    def lose(self, loss: str) -> None:
        session = self.session()
        if loss == "kill":
            self.server.kill_connection(session)
        else:
            self.proxy.cut()
        self.server.wait_until_gone(session)
        wait_for(lambda: socket_ended(connections[self.alias]))  # the proxy has passed it on

    def add(self, name: str) -> None:
        Row.objects.using(self.alias).create(name=name)

    def rows(self) -> list[str]:
        rows = self.server.execute("SELECT name FROM app_row ORDER BY id", database="test")
        return [name for (name,) in rows]


@pytest.fixture(params=[name for name, driver in DRIVERS.items() if driver.engine])
def encrypted(
    request: pytest.FixtureRequest, servers: dict[str, Server], add_database: Callable[..., str]
) -> Iterator[Encrypted]:
    driver = DRIVERS[request.param]
    server = servers[driver.kind]
    options: dict[str, Any] = {"sslmode": "require"}
    if driver.kind == "mariadb":
        authority = str(server.directory / "data" / "server.crt")
        options = {"ssl": {"ca": authority, "check_hostname": False}}
    with Proxy(server.host, server.port) as proxy:
        settings = server.django(transport="tcp", PORT=str(proxy.port), OPTIONS=options)
        yield Encrypted(server, proxy, add_database({**settings, "ENGINE": driver.engine}))


@pytest.mark.parametrize("loss", ["kill", "cut"])
def test_healed(encrypted: Encrypted, loss: str) -> None:
    """A connection that was lost while nobody used it is replaced by another encrypted one."""
    before = encrypted.session()
    assert encrypted.session() == before
    encrypted.lose(loss)
    encrypted.add("after the loss")
    assert encrypted.rows() == ["after the loss"]
    assert encrypted.session() != before


@pytest.mark.parametrize("loss", ["kill", "cut"])
def test_lost_in_a_transaction(encrypted: Encrypted, loss: str) -> None:
    """The error is that of a loss, whoever tells it; all is undone, and the next use works."""
    with pytest.raises(Error) as caught, transaction.atomic(encrypted.alias):
        encrypted.add("undone")
        encrypted.lose(loss)
        encrypted.add("never sent")
    fault = classify(caught.value)
    assert fault is not None
    assert (fault.kind, fault.connection_usable) == (Kind.LOST, False)
    assert encrypted.rows() == []
    encrypted.add("next")
    assert encrypted.rows() == ["next"]


def test_psycopg2(servers: dict[str, Server]) -> None:
    """ "SSL SYSCALL error: EOF detected", it mostly says of a connection that was cut."""
    server = servers["postgresql"]
    account = {"user": USER, "password": PASSWORD, "dbname": "test", "sslmode": "require"}
    with (
        Proxy(server.host, server.port) as proxy,
        closing(psycopg2.connect(host=proxy.host, port=proxy.port, **account)) as handle,
        closing(handle.cursor()) as cursor,
    ):
        cursor.execute("SELECT 1")
        proxy.cut()
        with pytest.raises(psycopg2.OperationalError) as caught:
            cursor.execute("SELECT 1")
    fault = classify(caught.value)
    assert fault is not None
    assert (fault.kind, fault.outcome) == (Kind.LOST, Outcome.UNKNOWN)
