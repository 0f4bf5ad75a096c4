"""The harness of the guard's table: what a use of the database meets after a loss.

A use is a generator that yields where the connection is lost. All uses of one test function, one
configuration and one loss are a batch: they get ready one after the other, one loss hits them all
(and all wait for their idle timeout together), then each test lets its own go on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from django.db import connections, transaction
from django.db.backends.signals import connection_created

from django_dbhealth.vendors import driver_of
from django_dbhealth.vendors.base import readable
from tests.app.models import Row
from tests.conftest import KINDS, create_tables, forget, register, unregister
from tests.servers import Proxy
from tests.servers.base import USER, Transport, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import QuerySet

    from tests.servers import Server

Steps = Generator[None]
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Configuration:
    """A kind of server, a driver, and the way between them."""

    name: str
    kind: str
    engine: str
    transport: Transport

    def __str__(self) -> str:
        return self.name


CONFIGURATIONS = (
    Configuration("mariadb-socket", "mariadb", "django.db.backends.mysql", "socket"),
    Configuration("mariadb-tcp", "mariadb", "django.db.backends.mysql", "tcp"),
    Configuration("pymysql", "mariadb", "tests.pymysql_backend", "tcp"),
    Configuration("postgresql", "postgresql", "django.db.backends.postgresql", "tcp"),
)
SOCKET, TCP, PYMYSQL, POSTGRESQL = CONFIGURATIONS
MARIADB = (SOCKET, TCP, PYMYSQL)

LOSSES = ("idle", "kill", "restart", "cut")

# What a session is born with. A SET would be session state. Long enough for a use to get ready
# on a busy machine.
IDLE_TIMEOUT = {
    "mariadb": {"wait_timeout": 5},
    "postgresql": {"idle_session_timeout": "5s", "idle_in_transaction_session_timeout": "5s"},
}
INSERT = "INSERT INTO app_row (name, number) VALUES (%s, 0)"
SESSION_ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}


def losses_of(configuration: Configuration) -> list[str]:
    """Return the losses that are possible there: the proxy is one for TCP."""
    return [loss for loss in LOSSES if (loss, configuration.transport) != ("cut", "socket")]


def session_id(connection: BaseDatabaseWrapper) -> int:
    with connection.cursor() as cursor:
        cursor.execute(SESSION_ID[connection.vendor])
        return int(cursor.fetchone()[0])


# The table


class Use(NamedTuple):
    """A row of the table: what is done before and after the loss, and where it can be done."""

    name: str
    run: Callable[[Case], Steps]
    configurations: tuple[Configuration, ...] = CONFIGURATIONS
    settings: Mapping[str, Any] = NONE  # for DATABASES
    session: Mapping[str, Any] = NONE  # variables of every new session
    reconnects: int | None = 1  # connections that are opened after the loss; None: not counted
    words: str = ""  # a note of the error says so


@dataclass(frozen=True)
class Cell:
    """A use, on one configuration, after one loss."""

    use: Use
    configuration: Configuration
    loss: str

    def __str__(self) -> str:
        return f"{self.use.name}-{self.configuration}-{self.loss}"


class Uses:
    """The uses of one outcome; as a decorator of a generator function it adds one.

    The use's name is the function's, with the variant. Keywords that `Use` does not know are
    arguments for the function.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []

    def __call__(self, variant: str = "", **details: Any) -> Callable[[Any], Any]:
        def add(run: Callable[..., Steps]) -> Callable[..., Steps]:
            name = run.__name__.replace("_", "-") + (variant and f"-{variant}")
            known = {k: details[k] for k in details if k in Use._fields}
            arguments = {k: details[k] for k in details if k not in known}
            self.uses.append(Use(name, functools.partial(run, **arguments), **known))
            return run

        return add

    def cells(self) -> list[Cell]:
        """Return the cells, batch by batch."""
        return [
            Cell(use, configuration, loss)
            for configuration in CONFIGURATIONS
            for loss in losses_of(configuration)
            for use in self.uses
            if configuration in use.configurations
        ]


# Servers


class Service:
    """A private server that may be restarted and frozen, with a proxy before it."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind = kind
        self.server: Server = KINDS[kind](**settings)
        self.server.start()
        self.proxy = Proxy(self.server.host, self.server.port)
        self.proxy.start()
        self._schemas: set[str] = set()

    def remove(self) -> None:
        self.proxy.stop()
        self.server.remove()

    def prepare_schema(self, name: str) -> None:
        """Have an empty table of tests.app in a schema (on MySQL: a database) of that name."""
        if not self._schemas:
            register("outcomes", self.server.django())
            create_tables("outcomes")
            unregister("outcomes")
            for sql in CREATE_ROLE[self.kind]:
                self.execute(sql)
        if name not in self._schemas:
            for sql in CREATE_SCHEMA[self.kind]:
                self.execute(sql.format(name))
            self._schemas.add(name)
        self.execute(f"DELETE FROM {name}.app_row")

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement as the administrator: the second connection of every cell."""
        return self.server.execute(sql, database="test")

    def lose(self, loss: str) -> None:
        """Lose all sessions in one way, and wait until the server has closed the last of them."""
        sessions = self.server.sessions(USER)
        if loss == "kill":
            for session in sessions:
                with suppress(self.server.operational_error):  # it has just ended by itself
                    self.server.kill_connection(session.id)
        elif loss == "restart":
            self.server.restart()
        elif loss == "cut":
            self.proxy.cut()
        for session in sessions:  # by their idle timeout, where nothing was done
            self.server.wait_until_gone(session.id)


CREATE_ROLE = {
    "mariadb": ["CREATE ROLE clerk", "GRANT ALL ON *.* TO clerk", f"GRANT clerk TO {USER}"],
    "postgresql": [f"CREATE ROLE clerk; GRANT clerk TO {USER}"],
}
CREATE_SCHEMA = {
    "mariadb": ["CREATE DATABASE {0}", "CREATE TABLE {0}.app_row LIKE test.app_row"],
    "postgresql": [
        (
            f"SET ROLE {USER}; CREATE SCHEMA {{0}};"
            " CREATE TABLE {0}.app_row (LIKE public.app_row INCLUDING ALL)"
        )
    ],
}


def born_with(vendor: str, session: Mapping[str, Any]) -> dict[str, str]:
    """Return the OPTIONS that give every new session these variables."""
    pairs = [f"{name}={value}" for name, value in session.items()]
    if vendor == "postgresql":
        return {"options": " ".join(f"-c {pair}" for pair in pairs)}
    return {"init_command": f"SET SESSION {', '.join(pairs)}"} if pairs else {}


# One use, getting ready and going on


class Alias:
    """An alias with an empty table of its own on a private server, and what uses are written with.

    `loss`: the connection is to be lost in that way. `settings` are for DATABASES, `session` are
    variables that every new session has.
    """

    def __init__(
        self,
        service: Service,
        name: str,
        configuration: Configuration,
        loss: str = "",
        settings: Mapping[str, Any] = NONE,
        session: Mapping[str, Any] = NONE,
    ) -> None:
        self.service = service
        self.server = service.server
        self.alias = "-".join(filter(None, (name, configuration.name, loss)))
        self.schema = name.replace("-", "_")
        self.callbacks = 0  # on_commit callbacks that ran
        self.connects = 0
        self.wrappers: set[BaseDatabaseWrapper] = set()
        self._later_options = self._settings(configuration, settings, session)["OPTIONS"]
        if loss == "idle":
            session = {**session, **IDLE_TIMEOUT[configuration.kind]}
        register(self.alias, self._settings(configuration, settings, session))
        if loss == "cut":
            connections.settings[self.alias]["PORT"] = str(service.proxy.port)
        connection_created.connect(self._count)
        service.prepare_schema(self.schema)

    def _settings(
        self,
        configuration: Configuration,
        settings: Mapping[str, Any],
        session: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return settings for DATABASES. A schema is a database on MySQL."""
        database = self.schema
        if self.vendor == "postgresql":
            database, session = "test", {**session, "search_path": self.schema}
        found = self.server.django(
            database, configuration.transport, **{"ENGINE": configuration.engine, **settings}
        )
        found["OPTIONS"] |= born_with(self.vendor, session)
        return found

    def _count(self, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        if connection.alias == self.alias:
            self.connects += 1
            self.wrappers.add(connection)

    def close(self) -> None:
        connection_created.disconnect(self._count)
        unregister(self.alias)

    def stay(self) -> None:
        """Let the sessions to come have no idle timeout."""
        options = connections.settings[self.alias]["OPTIONS"]
        options.clear()
        options.update(self._later_options)

    def seems_lost(self) -> bool:
        """Return whether no socket of this process has still to hear of the loss."""
        return all(map(socket_ended, self.wrappers))

    @property
    def connection(self) -> BaseDatabaseWrapper:
        return connections[self.alias]

    @property
    def vendor(self) -> str:
        return self.server.vendor

    @property
    def objects(self) -> QuerySet[Row]:
        return Row.objects.using(self.alias)

    def add(self, name: str) -> None:
        self.objects.create(name=name)

    def execute(self, sql: str) -> Any:
        """Run a statement through Django; return the first value of what it returns."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None

    def atomic(self, **options: Any) -> transaction.Atomic:
        return transaction.atomic(using=self.alias, **options)

    def on_commit(self) -> None:
        def callback() -> None:
            self.callbacks += 1

        transaction.on_commit(callback, using=self.alias)

    def rows(self) -> list[str]:
        """Return the names in the table, as a second connection sees them."""
        rows = self.service.execute(f"SELECT name FROM {self.schema}.app_row ORDER BY id")
        return [name for (name,) in rows]


class Case(Alias):
    """A cell's use, on an alias of its own."""

    def __init__(self, service: Service, cell: Cell) -> None:
        use = cell.use
        super().__init__(
            service, use.name, cell.configuration, cell.loss, use.settings, use.session
        )
        self.kept: list[str] = []  # the rows that must be there after an error
        self._failure: BaseException | None = None
        self._steps = use.run(self)

    def get_ready(self) -> None:
        """Do what comes before the loss. An error is told when the use is to go on."""
        try:
            next(self._steps)
        except Exception as error:
            self._failure = error

    def go_on(self) -> None:
        """Do what comes after the loss."""
        if self._failure is not None:
            raise self._failure
        self.connects = 0
        with suppress(StopIteration):
            next(self._steps)
            pytest.fail("A use yields once.")

    def close(self) -> None:
        with suppress(Exception):  # a use that was never let go on, inside atomic()
            self._steps.close()
        super().close()


def socket_ended(connection: BaseDatabaseWrapper) -> bool:
    driver = driver_of(connection)
    if connection.connection is None or driver is None:
        return True
    descriptor = driver.descriptor(connection.connection)
    return descriptor is None or readable(descriptor)


def in_a_thread(case: Case, work: Callable[[Callable[[], None]], Any]) -> Steps:
    """Run `work(pause)` in a thread of its own; it waits for the loss in `pause()`."""
    paused, resumed = threading.Event(), threading.Event()

    def pause() -> None:
        paused.set()
        assert resumed.wait(180)

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(work, pause)
        future.add_done_callback(lambda _: paused.set())
        try:
            assert paused.wait(180)
            if not future.done():
                yield
            resumed.set()
            future.result(60)
        finally:
            resumed.set()
            executor.submit(forget, case.alias).result(60)


# Batches


class Services:
    """The private servers of a test module: each is started when it is first asked for."""

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    def __getitem__(self, kind: str) -> Service:
        if kind not in self._services:
            # An oversize packet need not be large.
            settings = {"max_allowed_packet": 1 << 20} if kind == "mariadb" else {}
            self._services[kind] = Service(kind, **settings)
        return self._services[kind]

    def close(self) -> None:
        for service in self._services.values():
            service.remove()


class Batches:
    """The cases of a test run, by the batch that they are in."""

    def __init__(self, services: Services, items: Iterable[pytest.Item]) -> None:
        self._services = services
        self._cases: dict[pytest.Item, Case] = {}
        self._batches: dict[object, list[pytest.Item]] = {}
        for item in items:
            if cell_of(item) is not None:
                self._batches.setdefault(batch_of(item), []).append(item)

    def case(self, item: pytest.Item) -> Case:
        """Return the item's case, after the loss."""
        if item not in self._cases:
            self._lose(self._batches[batch_of(item)])
        return self._cases[item]

    def _lose(self, items: list[pytest.Item]) -> None:
        """Have all cases of a batch ready, then lose their connections."""
        for item in items:
            cell = cell_of(item)
            service = self._services[cell.configuration.kind]
            self._cases[item] = Case(service, cell)
            self._cases[item].get_ready()
        service.lose(cell.loss)
        for item in items:
            wait_for(self._cases[item].seems_lost, message=f"{item.name} has not heard of it.")
            self._cases[item].stay()

    def close_case(self, item: pytest.Item) -> None:
        self._cases.pop(item).close()

    def close(self) -> None:
        while self._cases:
            self._cases.popitem()[1].close()


def cell_of(item: pytest.Item) -> Any:
    """Return the item's parameter of that name, None if it has none."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("cell") if callspec else None


def batch_of(item: pytest.Item) -> object:
    cell = cell_of(item)
    return item.location[0], item.name.partition("[")[0], cell.configuration, cell.loss
