"""The harness of the fault tables' tests: what goes wrong, over each driver, alone and in Django.

A happening is a function that makes one thing go wrong for a client and lets its error out. It runs
once for each driver that it names, through the driver alone and on a guarded connection of
Django's. The statements go into the table `happened`, which the test reads as administrator.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from django.db import Error, connections, transaction

from tests.conftest import KINDS, forget, register
from tests.servers import PgBouncer, Proxy
from tests.servers.base import PASSWORD, USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_dbhealth import Outcome
    from tests.servers import Server

FIRST, SECOND = "first", "second"
INSERT = "INSERT INTO happened (name) VALUES (%s)"
# Rows that take for ever, and are undone at once.
SLOWLY = {
    "mariadb": "INSERT INTO happened (name) SELECT 'second' FROM seq_1_to_1000000000",
    "postgresql": "INSERT INTO happened (name) SELECT 'second' FROM generate_series(1, 1000000000)",
}
SESSION_ID = {"mariadb": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
BEGIN = {"mariadb": "START TRANSACTION", "postgresql": "BEGIN"}


@dataclass(frozen=True)
class Driver:
    """A driver, and the ENGINE that uses it; psycopg2 takes psycopg's place only elsewhere."""

    name: str
    module: str
    kind: str
    engine: str | None


DRIVERS = {
    each.name: each
    for each in (
        Driver("mysqlclient", "MySQLdb", "mariadb", "django.db.backends.mysql"),
        Driver("PyMySQL", "pymysql", "mariadb", "tests.pymysql_backend"),
        Driver("psycopg", "psycopg", "postgresql", "django.db.backends.postgresql"),
        Driver("psycopg2", "psycopg2", "postgresql", None),
    )
}


class Bench:
    """A private server with a table, a second account, and a proxy before it."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind = kind
        self.server: Server = KINDS[kind](**settings)
        self.server.start()
        self.proxy = Proxy(self.server.host, self.server.port)
        self.proxy.start()
        for sql in PREPARE[kind]:
            self.execute(sql)

    def remove(self) -> None:
        self.proxy.stop()
        self.server.remove()

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement as the administrator: the second connection of every test."""
        return self.server.execute(sql, database="test")

    def rows(self) -> list[str]:
        return [name for (name,) in self.execute("SELECT DISTINCT name FROM happened ORDER BY 1")]

    def reset(self) -> None:
        """Have a server that runs, an empty table, and nobody connected."""
        self.server.start()
        for session in self.server.sessions():
            with suppress(self.server.operational_error):
                self.server.kill_connection(session.id)
            self.server.wait_until_gone(session.id)
        self.proxy.pass_through()
        self.execute("DELETE FROM happened")


PREPARE = {
    "mariadb": [
        "CREATE TABLE happened (name VARCHAR(99), more LONGTEXT) ENGINE=InnoDB",
        "CREATE USER clerk@'%' IDENTIFIED BY 'x'",
        "GRANT ALL ON test.* TO clerk@'%'",
    ],
    "postgresql": [
        "CREATE TABLE happened (name text)",
        f"GRANT ALL ON happened TO {USER}",
        "CREATE ROLE clerk PASSWORD 'x'",
    ],
}


@dataclass
class Case:
    """A client's side of a happening; what it opens is closed at the end."""

    bench: Bench
    driver: Driver
    guarded: bool
    stack: ExitStack = field(default_factory=ExitStack)
    pgbouncer: PgBouncer | None = None
    _aliases: int = 0

    def start_pgbouncer(self, **settings: Any) -> None:
        """Have a PgBouncer, which is then reached by the transport "pgbouncer"."""
        self.pgbouncer = self.stack.enter_context(PgBouncer(self.bench.server, **settings))

    def connect(self, transport: str = "tcp", **options: Any) -> Client:
        kind = GuardedClient if self.guarded else BareClient
        client = kind(self, transport, options)
        self.stack.callback(client.close)
        return client

    @contextmanager
    def while_running(self, action: Callable[[], Any]) -> Iterator[None]:
        """Do something from another thread as soon as SLOWLY runs."""

        def act() -> None:
            self.bench.server.wait_until_running(SLOWLY[self.bench.kind])
            action()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            yield
        finally:
            thread.join()


class Client:
    """One connection, by itself or through Django."""

    def __init__(self, case: Case, transport: str, options: dict[str, Any]) -> None:
        self.case = case
        self.open(self.address(transport), options)

    @property
    def kind(self) -> str:
        return self.case.driver.kind

    def address(self, transport: str) -> dict[str, Any]:
        bench = self.case.bench
        if transport == "socket":
            return bench.server._address("socket")
        before = {"proxy": bench.proxy, "pgbouncer": self.case.pgbouncer}.get(transport)
        return {"HOST": "127.0.0.1", "PORT": str((before or bench.server).port)}

    def open(self, address: dict[str, Any], options: dict[str, Any]) -> None:
        raise NotImplementedError

    def cursor(self) -> Any:
        raise NotImplementedError

    def transaction(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def execute(self, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
        cursor = self.cursor()
        cursor.execute(sql, params)
        return list(cursor.fetchall()) if cursor.description else []

    def insert(self, name: str) -> None:
        self.execute(INSERT, [name])

    def session_id(self) -> int:
        return int(self.execute(SESSION_ID[self.kind])[0][0])

    def lose(self, action: Callable[[], Any] | None = None) -> None:
        """Let the session end while nobody uses it, by a kill or in another way."""
        server, session = self.case.bench.server, self.session_id()
        if action is None:
            server.kill_connection(session)
        else:
            action()
        server.wait_until_gone(session)


class BareClient(Client):
    """The driver alone."""

    def open(self, address: dict[str, Any], options: dict[str, Any]) -> None:
        self.module = __import__(self.case.driver.module)
        name = "database" if self.kind == "mariadb" else "dbname"
        arguments = {"user": USER, "password": PASSWORD, name: "test"}
        if address["HOST"].startswith("/") and self.kind == "mariadb":
            arguments["unix_socket"] = address["HOST"]
        else:
            arguments |= {"host": address["HOST"], "port": int(address["PORT"])}
        self.handle: Any = None
        self.handle = self.module.connect(**arguments | options)
        if self.kind == "mariadb":
            self.handle.autocommit(True)
        else:
            self.handle.autocommit = True

    def cursor(self) -> Any:
        return self.handle.cursor()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.execute(BEGIN[self.kind])
        yield
        self.execute("COMMIT")

    def close(self) -> None:
        if self.handle is not None:
            with suppress(self.module.Error):
                self.handle.close()


class GuardedClient(Client):
    """A connection of Django's, with the guard on."""

    KEYS = {"database": "NAME", "dbname": "NAME", "user": "USER", "password": "PASSWORD"}

    def open(self, address: dict[str, Any], options: dict[str, Any]) -> None:
        server, driver = self.case.bench.server, self.case.driver
        self.case._aliases += 1
        self.alias = f"happening{self.case._aliases}"
        keys = {self.KEYS[key]: options.pop(key) for key in list(options) if key in self.KEYS}
        settings = server.django(OPTIONS=options, ENGINE=driver.engine, CONN_MAX_AGE=None)
        register(self.alias, settings | address | keys)
        self.case.stack.callback(connections.settings.pop, self.alias)
        self.connection: Any = connections[self.alias]
        self.case.stack.callback(forget, self.alias)
        self.connection.ensure_connection()

    @property
    def handle(self) -> Any:
        return self.connection.connection

    def cursor(self) -> Any:
        return self.connection.cursor()

    def transaction(self) -> Any:
        return transaction.atomic(self.alias)

    def close(self) -> None:
        with suppress(Error):
            self.connection.close()


@dataclass(frozen=True)
class Happening:
    """What goes wrong, and which fault it must be, by driver."""

    name: str
    run: Callable[[Case], None]
    faults: dict[str, str]  # by driver: the anchor
    guarded: dict[str, str]  # likewise, where a guarded connection knows more; "": healed
    outcome: Outcome | None  # in Django, where it is not the table's


HAPPENINGS: list[Happening] = []


def happens(
    *, guarded: dict[str, str] | str | None = None, outcome: Outcome | None = None, **faults: str
) -> Callable[[Any], Any]:
    """Add a happening: `@happens(mysqlclient="2006", PyMySQL="2006")`."""

    def add(run: Callable[[Case], None]) -> Callable[[Case], None]:
        in_django = dict.fromkeys(faults, guarded) if isinstance(guarded, str) else guarded or {}
        HAPPENINGS.append(
            Happening(run.__name__.replace("_", "-"), run, faults, faults | in_django, outcome)
        )
        return run

    return add


def combinations() -> Iterator[tuple[Happening, Driver, bool]]:
    """Yield each happening with each of its drivers, alone and guarded."""
    for happening in HAPPENINGS:
        for name in happening.faults:
            driver = DRIVERS[name]
            yield happening, driver, False
            if driver.engine and happening.guarded[name]:
                yield happening, driver, True
