"""Fixtures: servers that run for the session or for one test, and databases on them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from asgiref.sync import SyncToAsync
from django.apps import apps
from django.db import Error, connections
from django.db.utils import ConnectionHandler, load_backend

from tests.servers import MariaDBServer, PostgreSQLServer
from tests.servers.base import ADMIN, PASSWORD, USER, shared
from tests.servers.keeper import close_keeper, get_keeper
from tests.servers.postgresql import close_and_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

    from tests.servers import Server


def replace_executor() -> None:
    """Give a forked child (scripts/mutants) a thread of its own for the ORM in async code."""
    SyncToAsync.single_thread_executor = ThreadPoolExecutor(max_workers=1)


os.register_at_fork(after_in_child=replace_executor)

# What a shell without job control has in its background ignores Ctrl-C, with all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a deadline, which a machine that does something else for 0.2 s would miss.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile("patient")

KINDS: dict[str, type[Server]] = {"mariadb": MariaDBServer, "postgresql": PostgreSQLServer}


@dataclass(frozen=True)
class Database:
    """A database with the tests' table, by its alias, and the server that it is on."""

    alias: str
    server: Server


# Servers


@pytest.fixture(scope="session", autouse=True)
def _keeper() -> Iterator[None]:
    """Take the run's directory before a subprocess of a test could."""
    get_keeper()
    yield
    close_keeper()


@pytest.fixture(scope="session")
def mariadb(_keeper: None) -> Iterator[Server]:
    """The MariaDB that all tests share: leave its settings as they are."""
    with shared(MariaDBServer) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql(_keeper: None) -> Iterator[Server]:
    """The PostgreSQL that all tests share: leave its settings as they are."""
    with shared(PostgreSQLServer) as server:
        yield server


@pytest.fixture
def new_server() -> Iterator[Callable[..., Server]]:
    """Start a private server: `new_server("mariadb", wait_timeout=1)`."""
    servers: list[Server] = []

    def start(kind: str, **settings: Any) -> Server:
        server = KINDS[kind](**settings)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.remove()


# Databases


@pytest.fixture(scope="session")
def django_db_setup(mariadb: Server, postgresql: Server, django_db_setup: None) -> None:
    """Have the servers running when pytest-django makes its test databases."""


@pytest.fixture(scope="session", autouse=True)
def _unblocked(django_db_blocker: Any) -> Iterator[None]:
    """Let every test use the databases: most need real commits, on connections of their own."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(autouse=True)
def _closed_connections() -> Iterator[None]:
    """Begin and end every test without an open connection in this thread."""
    close_connections()
    yield
    close_connections()


def close_connections() -> None:
    for connection in connections.all(initialized_only=True):
        # A TestCase's transaction spans the tests of its class.
        if not any(block._from_testcase for block in connection.atomic_blocks):
            close(connection)


def close(connection: BaseDatabaseWrapper) -> None:
    """Close a connection whatever state a test has left it in."""
    left_open = connection.in_atomic_block
    try:
        connection.close()
    except Error:
        left_open = True
    if left_open and connection.vendor != "sqlite":
        del connections[connection.alias]


@pytest.fixture
def add_database() -> Iterator[Callable[..., str]]:
    """Add an alias for this test: `add_database(server.django(), CONN_MAX_AGE=60)`.

    The tests' table is there, no connection is open.
    """
    aliases: list[str] = []

    def add(settings: dict[str, Any], alias: str = "private", **conn_settings: Any) -> str:
        register(alias, settings | conn_settings)
        aliases.append(alias)
        create_tables(alias)
        return alias

    yield add
    for alias in aliases:
        unregister(alias)


def register(alias: str, settings: dict[str, Any]) -> None:
    """Add an alias, with Django's defaults for what the settings leave out."""
    connections.settings[alias] = ConnectionHandler({"default": {}, alias: settings}).settings[
        alias
    ]


def unregister(alias: str) -> None:
    """Remove an alias; its connections are in this thread, and in the one that async code uses."""
    SyncToAsync.single_thread_executor.submit(forget, alias).result()
    forget(alias)
    del connections.settings[alias]


def forget(alias: str) -> None:
    connection = connections[alias]
    if connection.vendor == "sqlite" and connection.connection is not None:
        connection.connection.close()  # Django keeps one in memory open
    with suppress(Error):
        connection.close()
    if connection.vendor == "postgresql":
        connection.close_pool()  # Django keeps pools by alias: the next test has another server
    del connections[alias]


def create_tables(alias: str) -> None:
    """Create the table of tests.app unless it is there.

    By the administrator, whom no limit on connections concerns and whom `sessions()` leaves out:
    a closed connection holds its slot until the server has noticed.
    """
    if connections[alias].vendor == "sqlite":
        create_row_table(connections[alias])
        return
    # The schema editor looks its connection up by the alias.
    connection = connections[alias] = administrator(alias)
    try:
        create_row_table(connection)
    finally:
        if connection.vendor == "postgresql" and connection.connection:
            close_and_wait(connection.connection)
        connection.close()
        del connections[alias]


def create_row_table(connection: BaseDatabaseWrapper) -> None:
    row = apps.get_model("app", "Row")
    if row._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(row)


def administrator(alias: str) -> BaseDatabaseWrapper:
    """Return a plain connection of the administrator to the same database."""
    settings = connections.settings[alias]
    wrapper = load_backend(settings["ENGINE"]).DatabaseWrapper
    # Without the idle timeout that the server may have for others.
    options = (
        {"options": f"-c role={USER} -c idle_session_timeout=0"}
        if wrapper.vendor == "postgresql"
        else {"init_command": "SET SESSION wait_timeout = 600"}
    )
    if socket := settings["OPTIONS"].get("unix_socket"):
        options["unix_socket"] = socket
    account = {"USER": ADMIN, "PASSWORD": PASSWORD, "OPTIONS": options}
    return wrapper({**settings, **account}, alias)


@pytest.fixture(scope="session")
def _prepared() -> set[str]:
    """The kinds of servers that have the database of the `database` fixture."""
    return set()


@pytest.fixture(params=list(KINDS))
def database(request: pytest.FixtureRequest, _prepared: set[str]) -> Iterator[Database]:
    """Give an empty table on each kind of server, and nobody else connected to it."""
    kind = request.param
    server: Server = request.getfixturevalue(kind)
    empty(server)
    register("database", server.django("rows"))
    if kind not in _prepared:
        server.create_database("rows")
        create_tables("database")
        _prepared.add(kind)
    server.execute("DELETE FROM app_row", database="rows")
    yield Database("database", server)
    unregister("database")


def empty(server: Server) -> None:
    """End the sessions that earlier tests have left: one might hold locks."""
    for session in server.sessions():
        with suppress(server.operational_error):
            server.kill_connection(session.id)
        server.wait_until_gone(session.id)
