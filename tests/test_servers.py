"""The test servers do what the other tests take for granted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environ
import psutil
import pytest
from django.apps import apps
from django.conf import settings
from django.db import OperationalError, connections
from django.test import override_settings

from tests.conftest import KINDS, create_tables, register, unregister
from tests.servers import MariaDBServer, Proxy, ServerError, wait_for
from tests.servers.base import USER, find_program, is_gone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Database
    from tests.servers import Server

    NewServer = Callable[..., Server]
    AddDatabase = Callable[..., str]

ROOT = Path(__file__).resolve().parent.parent
SLEEP = {"mysql": "SELECT SLEEP(%s)", "postgresql": "SELECT pg_sleep(%s)"}

both_kinds = pytest.mark.parametrize("kind", list(KINDS))
both_transports = pytest.mark.parametrize("transport", ["socket", "tcp"])


@pytest.fixture(autouse=True)
def _plain_connections() -> Iterator[None]:
    """What servers do is seen through Django's own connections: the guard would heal them."""
    with override_settings(DBHEALTH={"GUARD": False}):
        yield


def query(alias: str, sql: str = "SELECT 1", params: Any = None) -> list[tuple[Any, ...]]:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run a function in a thread; return the thread and where its result goes."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


# Addresses


@both_kinds
@both_transports
def test_django_settings_reach_the_server(
    kind: str, transport: str, request: pytest.FixtureRequest, add_database: AddDatabase
) -> None:
    """The settings of either transport connect as the application account."""
    server = request.getfixturevalue(kind)
    alias = add_database(server.django(transport=transport), CONN_MAX_AGE=60)
    query(alias)
    [session] = server.wait_for_sessions(1)
    assert session.user == USER
    assert connections[alias].settings_dict["CONN_MAX_AGE"] == 60
    assert connections[alias].settings_dict["CONN_HEALTH_CHECKS"] is False


@both_kinds
@both_transports
def test_url_means_the_same_to_django_environ(
    kind: str, transport: str, request: pytest.FixtureRequest, add_database: AddDatabase
) -> None:
    """The URL survives django-environ, its password's special characters too."""
    server = request.getfixturevalue(kind)
    config = environ.Env.db_url_config(server.url(transport=transport))
    assert config["ENGINE"] == server.engine
    query(add_database(config))
    server.wait_for_sessions(1, USER)


@both_kinds
def test_overrides_replace_settings_and_merge_options(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """An override of OPTIONS keeps the options that are there anyway."""
    server = request.getfixturevalue(kind)
    config = server.django("shop", OPTIONS={"connect_timeout": 2}, USER="nobody")
    assert (config["NAME"], config["USER"]) == ("shop", "nobody")
    assert config["OPTIONS"] == {**server.django()["OPTIONS"], "connect_timeout": 2}


def test_the_suites_aliases_reach_the_shared_servers(mariadb: Server, postgresql: Server) -> None:
    """The addresses in tests.settings were written before the servers had started."""
    query("default")
    query("postgresql")
    mariadb.wait_for_sessions(1, USER)
    postgresql.wait_for_sessions(1, USER)


@pytest.mark.django_db(databases=["default", "postgresql", "sqlite"])
def test_pytest_django_has_its_test_databases() -> None:
    """Tests in a transaction that is rolled back work as well, on every alias."""
    row = apps.get_model("app", "Row")
    for alias in settings.DATABASES:
        row.objects.using(alias).create(name="one")
        assert row.objects.using(alias).count() == 1


def test_database_fixture_gives_an_empty_table(database: Database) -> None:
    """Rows are committed, and nobody else is connected."""
    rows = apps.get_model("app", "Row").objects.using(database.alias)
    assert database.server.sessions() == []
    assert rows.count() == 0
    rows.create(name="left for the next test")
    assert database.server.execute("SELECT name FROM app_row", database="rows") == [
        ("left for the next test",)
    ]


def test_database_fixture_is_emptied_between_tests(database: Database) -> None:
    """What the test before has committed is gone, and so are its connections."""
    assert database.server.sessions() == []
    assert apps.get_model("app", "Row").objects.using(database.alias).count() == 0


def test_add_database_takes_sqlite(add_database: AddDatabase) -> None:
    """A database in memory keeps its table."""
    alias = add_database({"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"})
    assert apps.get_model("app", "Row").objects.using(alias).count() == 0


def test_pool_goes_with_its_alias(postgresql: Server) -> None:
    """Django keeps pools by alias: the next test's must not get this one's."""
    register("pooled", postgresql.django(OPTIONS={"pool": {"min_size": 1, "max_size": 2}}))
    create_tables("pooled")
    query("pooled")
    unregister("pooled")
    postgresql.wait_for_sessions(0)


# Sessions, limits and timeouts


def test_wait_timeout_gives_2006(new_server: NewServer, add_database: AddDatabase) -> None:
    """An idle session on MariaDB's socket is gone after wait_timeout, and the driver says 2006."""
    server = new_server("mariadb", wait_timeout=3)
    alias = add_database(server.django())
    query(alias)
    server.wait_for_sessions(0)
    with pytest.raises(OperationalError) as error:
        query(alias)
    assert error.value.args[0] == 2006


def test_idle_session_timeout_gives_57p05(new_server: NewServer, add_database: AddDatabase) -> None:
    """An idle session on PostgreSQL is gone after idle_session_timeout, with its SQLSTATE."""
    server = new_server("postgresql", idle_session_timeout="3s")
    alias = add_database(server.django())
    query(alias)
    server.wait_for_sessions(0)
    with pytest.raises(OperationalError) as error:
        query(alias)
    assert error.value.__cause__.sqlstate == "57P05"


@both_kinds
def test_kill_connection(
    kind: str, request: pytest.FixtureRequest, add_database: AddDatabase
) -> None:
    """A session that is killed and gone is closed for its client, at once."""
    server = request.getfixturevalue(kind)
    alias = add_database(server.django())
    query(alias)
    [session] = server.wait_for_sessions(1, USER)
    assert session.database == "test"
    assert session.idle_seconds < 10
    server.kill_connection(session.id)
    server.wait_until_gone(session.id)
    with pytest.raises(OperationalError):
        query(alias)


def test_max_user_connections_gives_1203(new_server: NewServer, add_database: AddDatabase) -> None:
    """The application account meets the limit of all accounts, the administrator does not."""
    server = new_server("mariadb", max_user_connections=1)
    for alias in ["first", "second"]:
        add_database(server.django(), alias)
    query("first")
    with pytest.raises(OperationalError) as error:
        query("second")
    assert error.value.args[0] == 1203
    assert len(server.sessions()) == 1
    server.set(max_user_connections=2)
    query("second")


def test_max_connections_is_a_limit(new_server: NewServer, add_database: AddDatabase) -> None:
    """A PostgreSQL without free slots refuses the application, not the administrator."""
    server = new_server("postgresql", max_connections=4, superuser_reserved_connections=3)
    for alias in ["first", "second"]:
        add_database(server.django(), alias)
    query("first")
    with pytest.raises(OperationalError, match="remaining connection slots are reserved"):
        query("second")
    assert len(server.sessions()) == 1


@both_kinds
def test_grant_limit(kind: str, new_server: NewServer, add_database: AddDatabase) -> None:
    """An account's own limit is enforced (1226 on MariaDB), and lifted again."""
    server = new_server(kind)
    for alias in ["first", "second"]:
        add_database(server.django(), alias)
    server.grant_limit(USER, 1)
    query("first")
    expected = {"mariadb": "1226.*'max_user_connections'", "postgresql": "too many connections"}
    with pytest.raises(OperationalError, match=expected[kind]):
        query("second")
    server.grant_limit(USER, 0)
    query("second")


@both_kinds
def test_set_reaches_new_sessions_and_survives_a_restart(kind: str, new_server: NewServer) -> None:
    """A setting holds for the next session already."""
    server = new_server(kind)
    name, value, shown = {
        "mariadb": ("net_read_timeout", 77, ("net_read_timeout", "77")),
        "postgresql": ("lock_timeout", "77s", ("77s",)),
    }[kind]
    server.set(**{name: value})
    show = f"SHOW VARIABLES LIKE '{name}'" if kind == "mariadb" else f"SHOW {name}"
    assert server.execute(show) == [shown]
    server.restart()
    assert server.execute(show) == [shown]


def test_set_says_what_needs_a_restart(new_server: NewServer) -> None:
    """A PostgreSQL setting that cannot change while the server runs is an error."""
    server = new_server("postgresql")
    with pytest.raises(ServerError, match="max_connections"):
        server.set(max_connections=7)
    server.restart()
    assert server.execute("SHOW max_connections") == [("7",)]


def test_wait_for_sessions_lists_what_is_there(mariadb: Server) -> None:
    """A wait in vain ends in an AssertionError with the sessions."""
    query("default")
    with pytest.raises(AssertionError, match=r"Expected 2 sessions.*there are 1: \[Session\("):
        mariadb.wait_for_sessions(2, timeout=0.1)


# Life and death


def test_making_a_server_leaves_others_temporary_tables() -> None:
    """Test runs side by side make theirs at the same time; where one sweeps, the others fail."""
    table = Path(tempfile.gettempdir(), f"#sql-temptable-{os.getpid():x}-1-1.MAI")
    table.touch()
    server = MariaDBServer()
    server._make_directory(server.directory)
    try:
        server._initialise(server.directory)
        assert table.exists()
    finally:
        server.remove()
        table.unlink(missing_ok=True)


@both_kinds
def test_restart_keeps_data_and_port(kind: str, new_server: NewServer) -> None:
    """After a restart there is a new process with the old port and rows."""
    server = new_server(kind)
    port, pid = server.port, server.pid
    server.execute("CREATE TABLE kept (id INTEGER)", database="test")
    server.restart()
    assert server.port == port
    assert server.pid != pid
    assert server.execute("SELECT * FROM kept", database="test") == []


@both_kinds
def test_committed_rows_survive_kill(kind: str, new_server: NewServer) -> None:
    """SIGKILL ends all processes at once; what was committed is there afterwards."""
    server = new_server(kind)
    server.execute("CREATE TABLE kept (id INTEGER)", database="test")
    server.execute("INSERT INTO kept VALUES (1)", database="test")
    server.kill()
    assert not server.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), timeout=5)
    server.start()
    assert server.execute("SELECT id FROM kept", database="test") == [(1,)]


@both_kinds
def test_private_servers_do_not_share_anything(kind: str, new_server: NewServer) -> None:
    """Two servers of a kind have their own ports and data."""
    first, second = new_server(kind), new_server(kind)
    assert first.port != second.port
    first.create_database("only_here")
    first.create_database("only_here")
    first.execute("SELECT 1", database="only_here")
    with pytest.raises(second.operational_error):
        second.execute("SELECT 1", database="only_here")


@both_kinds
def test_frozen_server_hangs_until_thawed(
    kind: str, new_server: NewServer, add_database: AddDatabase
) -> None:
    """A query to a frozen server gets no answer, and gets it after the thaw."""
    server = new_server(kind)
    alias = add_database(server.django())
    answered = threading.Event()
    connected = threading.Event()
    frozen = threading.Event()

    def ask() -> None:
        with closing(connections[alias]):
            query(alias)
            connected.set()
            frozen.wait(10)
            query(alias)
            answered.set()

    thread, _ = in_thread(ask)
    assert connected.wait(10)
    server.freeze()
    frozen.set()
    assert not answered.wait(0.3)
    server.thaw()
    assert answered.wait(10)
    thread.join(10)


@both_kinds
def test_frozen_server_can_be_removed(kind: str) -> None:
    """The end of a test does not wait for a server that hangs."""
    with KINDS[kind]() as server:
        process = psutil.Process(server.pid)
        server.freeze()
    assert not server.directory.exists()
    assert is_gone(process)


def test_port_taken_by_another_is_tried_no_more(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that loses the race for its port gets another one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        socket.create_server(("127.0.0.1", 0)) as spare,
    ):
        ports = [taken.getsockname()[1], spare.getsockname()[1]]
        spare.close()
        monkeypatch.setattr("tests.servers.base.free_port", iter(ports).__next__)
        assert new_server("mariadb").port == ports[1]


@both_kinds
def test_server_that_does_not_start_says_why(kind: str) -> None:
    """A setting that the server rejects ends in an error with its log."""
    server = KINDS[kind](no_such_setting=1)
    with pytest.raises(ServerError, match=r"no.such.setting"):
        server.start()
    server.remove()


def test_missing_program_says_how_to_install_it() -> None:
    """A server that is not installed is named, with the command that installs it."""
    with pytest.raises(ServerError, match=r"need no-such-database.* Install it: apt install x"):
        find_program("no-such-database", ["/usr/sbin"], "apt install x")


# The proxy


@pytest.fixture
def proxy(mariadb: Server) -> Iterator[Proxy]:
    with Proxy(mariadb.host, mariadb.port) as proxy:
        yield proxy


@pytest.fixture
def proxied(proxy: Proxy, mariadb: Server, add_database: AddDatabase) -> str:
    """An alias that goes through the proxy, connected."""
    config = mariadb.django(
        transport="tcp", PORT=str(proxy.port), OPTIONS={"connect_timeout": 10, "read_timeout": 4}
    )
    alias = add_database(config)
    query(alias)
    return alias


def raw(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def test_proxy_forwards(proxy: Proxy, proxied: str) -> None:
    """Large data pass unchanged both ways, and a closed connection is forgotten."""
    text = "x" * 1_000_000
    assert query(proxied, "SELECT %s", [text]) == ((text,),)
    assert proxy.connections == 1
    connections[proxied].close()
    wait_for(lambda: proxy.connections == 0)


def test_proxy_cut(proxy: Proxy, proxied: str, mariadb: Server) -> None:
    """After a cut both sides find the connection closed, and a new one works."""
    proxy.cut()
    assert proxy.connections == 0
    mariadb.wait_for_sessions(0)
    with pytest.raises(OperationalError) as error:
        query(proxied)
    assert error.value.args[0] == 2013
    connections[proxied].close()
    query(proxied)


def test_proxy_cut_is_an_orderly_close(proxy: Proxy) -> None:
    """A client that waits for data is told the end of them."""
    with raw(proxy) as client:
        assert client.recv(65536)
        proxy.cut()
        assert client.recv(65536) == b""


def test_proxy_reset(proxy: Proxy) -> None:
    """A client that waits for data gets a reset."""
    with raw(proxy) as client:
        assert client.recv(65536)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(65536)


def test_proxy_swallow(proxy: Proxy, proxied: str, mariadb: Server) -> None:
    """Nothing arrives any more while the connection stays open, even after the server's close."""
    proxy.swallow()
    [session] = mariadb.wait_for_sessions(1)
    mariadb.kill_connection(session.id)
    mariadb.wait_until_gone(session.id)
    with pytest.raises(OperationalError) as error:
        query(proxied)  # read_timeout
    assert error.value.args[0] == 2013
    connections[proxied].close()
    proxy.pass_through()
    query(proxied)


def test_proxy_swallows_a_close() -> None:
    """A server's close is swallowed too, and arrives when the way is free again."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy("127.0.0.1", listener.getsockname()[1]) as proxy,
        raw(proxy) as client,
    ):
        server, _ = listener.accept()
        proxy.swallow()
        server.close()
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert proxy.connections == 1
        proxy.pass_through()
        client.settimeout(5)
        assert client.recv(1) == b""


def test_proxy_delay(proxy: Proxy, proxied: str) -> None:
    """Each piece of data is late by the delay, in both directions."""
    proxy.delay(0.1)
    started = time.monotonic()
    query(proxied)
    assert time.monotonic() - started >= 0.2
    proxy.pass_through()

    def took() -> float:
        started = time.monotonic()
        query(proxied)
        return time.monotonic() - started

    wait_for(lambda: took() < 0.2)


def test_proxy_accept_silently(proxy: Proxy, proxied: str, mariadb: Server) -> None:
    """A new connection is accepted and hears nothing; those there are go on."""
    proxy.accept_silently()
    with raw(proxy) as client:
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        query(proxied)
        mariadb.wait_for_sessions(1)
    proxy.pass_through()
    with raw(proxy) as client:
        assert client.recv(65536)


def test_proxy_refuse(proxy: Proxy, proxied: str) -> None:
    """New connections are refused until it listens again, on the same port."""
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        raw(proxy)
    query(proxied)
    proxy.listen()
    assert proxy.port == port
    with raw(proxy) as client:
        assert client.recv(65536)


def test_proxy_hangs_up_when_the_server_is_down() -> None:
    """Without a server behind it the proxy accepts and closes."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Proxy("127.0.0.1", port) as proxy, raw(proxy) as client:
        assert client.recv(1) == b""


# The keeper

PRINT_SERVERS = """
    for server in servers:
        print(server.pid, server.directory, flush=True)
    print("ready", flush=True)
"""


def spawn(*command: str) -> subprocess.Popen[str]:
    """Start Python as a terminal would: in a group of its own, and without our run's directory."""
    env = {name: value for name, value in os.environ.items() if name != "DBHEALTH_TEST_RUN"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_servers(process: subprocess.Popen[str]) -> tuple[list[psutil.Process], list[Path]]:
    """Read what PRINT_SERVERS prints; return all processes and directories of the servers."""
    assert process.stdout is not None
    printed: list[str] = []
    for line in process.stdout:
        if line.strip().endswith("ready"):
            break
        printed.append(line.split()[-2:])
    servers = [psutil.Process(int(pid)) for pid, _ in printed]
    children = [child for server in servers for child in server.children(recursive=True)]
    keepers = [server.parent() for server in servers]
    return [*servers, *children, *keepers], [Path(directory).parent for _, directory in printed]


def assert_nothing_left(processes: list[psutil.Process], directories: list[Path]) -> None:
    """Wait for as long as it may take: the keeper grants 10 s, then it kills and removes."""
    assert len(processes) >= 2

    def left() -> list[psutil.Process]:
        return [process for process in processes if not is_gone(process)]

    wait_for(lambda: not left(), timeout=40, message=lambda: f"Left: {left()}")
    assert [directory for directory in directories if directory.exists()] == []


def test_sigkill_of_the_tests_leaves_nothing() -> None:
    """Servers, frozen ones too, and directories go when their user is killed."""
    script = """
    import time
    from tests.servers import MariaDBServer, PostgreSQLServer
    servers = [MariaDBServer(), PostgreSQLServer(), PostgreSQLServer()]
    for server in servers:
        server.start()
    servers[-1].freeze()
    """
    with spawn("-c", textwrap.dedent(script + PRINT_SERVERS + "    time.sleep(60)")) as process:
        processes, directories = read_servers(process)
        process.kill()
        assert_nothing_left(processes, directories)


def test_forked_children_do_not_keep_the_servers() -> None:
    """A forked child that outlives the tests does not hold the keeper's pipe open."""
    script = """
    import os, time
    from tests.servers import MariaDBServer
    servers = [MariaDBServer()]
    servers[0].start()
    if not os.fork():
        time.sleep(60)
        os._exit(0)
    """
    with spawn("-c", textwrap.dedent(script + PRINT_SERVERS + "    time.sleep(60)")) as process:
        processes, directories = read_servers(process)
        keeper = processes[-1]
        [child] = set(psutil.Process(process.pid).children()) - {keeper}
        process.kill()
        try:
            assert_nothing_left(processes, directories)
            assert child.is_running()
        finally:
            child.kill()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C stops the shared and the private servers, after the test's own teardown."""
    test = """
    import time

    def test_sleep(mariadb, new_server):
        servers = [mariadb, new_server("postgresql")]
        try:
    """
    end = """
            time.sleep(60)
        finally:
            print([server.execute("SELECT 1") for server in servers])
    """
    body = textwrap.indent(PRINT_SERVERS, "        ") + end
    path = tmp_path / "test_sleep.py"
    path.write_text(textwrap.dedent(test + body))
    options = ["-q", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    with spawn("-m", "pytest", *options, *config, str(path)) as process:
        processes, directories = read_servers(process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert "[[(1,)], [(1,)]]" in process.stdout.read()
        assert process.wait(20) == pytest.ExitCode.INTERRUPTED
        assert_nothing_left(processes, directories)
