"""Is this connection alive? Asked of every driver, on connections that were really lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from django_dbhealth.liveness import Liveness, check_liveness, seems_alive
from django_dbhealth.vendors import VENDORS
from tests.servers import Proxy
from tests.servers.base import PASSWORD, USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_dbhealth.vendors.base import Driver
    from tests.servers import Server
    from tests.servers.base import Transport

ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}


# What the drivers say of a handle that is lost.
GONE = r"2006|2013|closed|consuming|\(0, ''\)"


class Client:
    """One driver, and how it connects."""

    def __init__(self, vendor: str, module: str) -> None:
        self.vendor = vendor
        self.module = module
        self.handles: list[Any] = []
        self.driver: Driver = VENDORS[vendor].drivers[module]

    def connect(self, server: Server | Proxy, transport: Transport = "tcp") -> Any:
        connect = getattr(self, f"_{self.module}")
        if transport == "socket":
            handle = connect(socket=str(server.socket))  # type: ignore[union-attr]
        else:
            handle = connect(host=server.host, port=server.port)
        self.handles.append(handle)
        return handle

    def close(self) -> None:
        while self.handles:
            with contextlib.suppress(Exception):
                self.handles.pop().close()

    def _MySQLdb(self, socket: str = "", host: str = "", port: int = 0) -> Any:  # noqa: N802
        import MySQLdb

        where = {"unix_socket": socket} if socket else {"host": host, "port": port}
        return MySQLdb.connect(
            user=USER, passwd=PASSWORD, db="test", autocommit=True, connect_timeout=5, **where
        )

    def _pymysql(self, socket: str = "", host: str = "", port: int = 0) -> Any:
        import pymysql

        where: Any = {"unix_socket": socket} if socket else {"host": host, "port": port}
        return pymysql.connect(
            user=USER, password=PASSWORD, database="test", autocommit=True, **where
        )

    def _psycopg(self, socket: str = "", host: str = "", port: int = 5432) -> Any:
        import psycopg

        return psycopg.connect(
            user=USER,
            password=PASSWORD,
            dbname="test",
            host=socket or host,
            port=port,
            autocommit=True,
        )

    def _psycopg2(self, socket: str = "", host: str = "", port: int = 5432) -> Any:
        import psycopg2

        handle = psycopg2.connect(
            user=USER, password=PASSWORD, dbname="test", host=socket or host, port=port
        )
        handle.autocommit = True
        return handle

    def query(self, handle: Any, sql: str) -> Any:
        with contextlib.closing(handle.cursor()) as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0]


CLIENTS = [
    Client("mysql", "MySQLdb"),
    Client("mysql", "pymysql"),
    Client("postgresql", "psycopg"),
    Client("postgresql", "psycopg2"),
]
KINDS = {"mysql": "mariadb", "postgresql": "postgresql"}


@pytest.fixture(params=CLIENTS, ids=lambda client: client.module)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    yield request.param
    request.param.close()


@pytest.fixture
def pymysql() -> Iterator[Client]:
    yield CLIENTS[1]
    CLIENTS[1].close()


@pytest.fixture
def mysqlclient() -> Iterator[Client]:
    yield CLIENTS[0]
    CLIENTS[0].close()


@pytest.fixture
def psycopg() -> Iterator[Client]:
    yield CLIENTS[2]
    CLIENTS[2].close()


@pytest.fixture
def shared_server(client: Client, request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(KINDS[client.vendor])
    server.create_database("test")
    return server


@pytest.fixture(params=["socket", "tcp"])
def handle(client: Client, shared_server: Server, request: pytest.FixtureRequest) -> Any:
    return client.connect(shared_server, request.param)


def check(client: Client, handle: Any, *, suspect: bool = False, timeout: float = 5) -> Liveness:
    return check_liveness(client.driver, handle, suspect=suspect, timeout=timeout)


def test_new_connection_is_alive(client: Client, handle: Any) -> None:
    """By its socket alone, and when the server is asked."""
    assert seems_alive(client.driver, handle)
    assert check(client, handle) is Liveness.ALIVE
    for _ in range(3):
        assert check(client, handle, suspect=True) is Liveness.ALIVE
        assert client.query(handle, "SELECT 41 + 1") == 42


def test_probe_leaves_the_session_as_it_was(client: Client, handle: Any) -> None:
    """It is the same session afterwards, and in no transaction."""
    before = client.query(handle, ID[client.vendor])
    check(client, handle, suspect=True)
    assert client.query(handle, ID[client.vendor]) == before
    if client.module == "psycopg2":
        handle.autocommit = False
        assert check(client, handle, suspect=True) is Liveness.ALIVE
        assert handle.get_transaction_status() == 0


def test_killed_session(client: Client, handle: Any, shared_server: Server) -> None:
    """The socket shows that the server closed it; so does the probe, more than once."""
    session = client.query(handle, ID[client.vendor])
    shared_server.kill_connection(session)
    shared_server.wait_until_gone(session)
    wait_for(lambda: not seems_alive(client.driver, handle))
    assert check(client, handle) is Liveness.LOST
    assert check(client, handle, suspect=True) is Liveness.LOST


IDLE_TIMEOUT = {
    "mysql": "SET wait_timeout = 1",
    "postgresql": "SET idle_session_timeout = '1s'",
}


def test_idle_timeout(client: Client, handle: Any) -> None:
    """What the server drops for its idleness is lost."""
    with contextlib.closing(handle.cursor()) as cursor:
        cursor.execute(IDLE_TIMEOUT[client.vendor])
    wait_for(lambda: not seems_alive(client.driver, handle))
    assert check(client, handle) is Liveness.LOST


def test_restarted_server(client: Client, new_server: Callable[..., Server]) -> None:
    """A session does not survive its server."""
    server = new_server(KINDS[client.vendor])
    handle = client.connect(server)
    server.restart()
    assert check(client, handle) is Liveness.LOST


def test_closed_handle(client: Client, handle: Any) -> None:
    """A handle that somebody closed is lost, and has no socket to look at."""
    handle.close()
    assert client.driver.descriptor(handle) is None
    assert not seems_alive(client.driver, handle)
    assert check(client, handle) is Liveness.LOST


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_cut_wire(client: Client, shared_server: Server, fault: str) -> None:
    """A connection that something in between has closed or reset is lost."""
    with Proxy(shared_server.host, shared_server.port) as proxy:
        handle = client.connect(proxy)
        getattr(proxy, fault)()
        wait_for(lambda: not seems_alive(client.driver, handle))
        assert check(client, handle) is Liveness.LOST


@pytest.mark.parametrize("fault", ["swallow", "freeze", "trickle"])
def test_silence_is_bounded(client: Client, new_server: Callable[..., Server], fault: str) -> None:
    """Bytes that vanish, a server that hangs: no sign at the socket, and a probe that ends.

    Likewise with an answer of which the first byte alone comes in.
    """
    server = new_server(KINDS[client.vendor])
    with Proxy(server.host, server.port) as proxy:
        handle = client.connect(proxy)
        server.freeze() if fault == "freeze" else getattr(proxy, fault)()
        assert seems_alive(client.driver, handle)
        began = time.monotonic()
        assert check(client, handle, suspect=True, timeout=0.3) is Liveness.LOST
        assert 0.25 < time.monotonic() - began < 30  # without a bound it would be for ever
        if fault == "freeze":
            server.thaw()


def test_transaction_is_not_disturbed(client: Client, handle: Any) -> None:
    """psycopg tells of a transaction itself: it is busy, failed or not, and stays as it is."""
    if client.vendor == "mysql":
        return  # the drivers do not tell; whoever calls looks at Django's own flags first
    with contextlib.closing(handle.cursor()) as cursor:
        cursor.execute("BEGIN")
    assert check(client, handle, suspect=True) is Liveness.IN_TRANSACTION
    with pytest.raises(Exception, match="division"):
        client.query(handle, "SELECT 1 / 0")
    assert check(client, handle, suspect=True) is Liveness.IN_TRANSACTION


SLEEP = {"mysql": "SELECT SLEEP(60)", "postgresql": "SELECT pg_sleep(60)"}
CANCEL = {"mysql": "KILL QUERY %s", "postgresql": "SELECT pg_cancel_backend(%s)"}


def sleep(client: Client, handle: Any) -> None:
    with contextlib.suppress(Exception):  # it is cancelled
        client.query(handle, SLEEP[client.vendor])


def test_statement_of_another_thread(client: Client, handle: Any, shared_server: Server) -> None:
    """A handle that another thread is using is busy, not lost."""
    if client.module == "pymysql":
        return  # it keeps no count of its users; Django allows one thread a connection
    session = client.query(handle, ID[client.vendor])
    thread = threading.Thread(target=sleep, args=(client, handle))
    thread.start()
    try:
        shared_server.wait_until_running(SLEEP[client.vendor])
        if client.module != "psycopg2":  # its threads take turns: the probe would wait for its own
            assert check(client, handle, suspect=True) is Liveness.BUSY
    finally:
        shared_server.execute(CANCEL[client.vendor], [session])
        thread.join()
    assert check(client, handle, suspect=True) is Liveness.ALIVE


def test_interrupted_probe(client: Client, new_server: Callable[..., Server]) -> None:
    """A signal handler's exception in the middle of a probe leaves no answer for the next query."""

    class Interrupted(Exception):
        pass

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted

    server = new_server(KINDS[client.vendor])
    with Proxy(server.host, server.port) as proxy:
        handle = client.connect(proxy)
        proxy.pass_through()  # returns when all that it has carried is counted
        carried = proxy.carried

        def send() -> None:
            wait_for(lambda: proxy.carried > carried, message="No probe was sent.")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)  # type: ignore[arg-type]

        thread = threading.Thread(target=send)
        previous = signal.signal(signal.SIGALRM, interrupt)
        server.freeze()
        try:
            thread.start()
            with contextlib.suppress(Interrupted):  # psycopg2 waits, and sees a lost connection
                try:
                    check(client, handle, suspect=True, timeout=3)
                finally:
                    thread.join()
        finally:
            signal.signal(signal.SIGALRM, previous)
            server.thaw()
        with pytest.raises(
            Exception, match=r"2006|2013|lost|closed|terminated|EOF|consuming|\(0, ''\)"
        ):
            client.query(handle, "SELECT 'one'")


def test_late_answer_is_nobodys(client: Client, new_server: Callable[..., Server]) -> None:
    """After a probe that timed out the handle says that it is lost, not the answer of before."""
    server = new_server(KINDS[client.vendor])
    handle = client.connect(server)
    server.freeze()
    assert check(client, handle, suspect=True, timeout=0.2) is Liveness.LOST
    server.thaw()
    with pytest.raises(
        Exception, match=r"2006|2013|lost|closed|terminated|EOF|consuming|\(0, ''\)"
    ):
        client.query(handle, "SELECT 'one'")


def test_quota_is_an_answer(mysqlclient: Client, new_server: Callable[..., Server]) -> None:
    """An account that has used up its queries of the hour is refused by a server that is alive."""
    server = new_server("mariadb")
    server.execute(f"GRANT USAGE ON *.* TO {USER} WITH MAX_QUERIES_PER_HOUR 5")
    handle = mysqlclient.connect(server, "socket")
    with pytest.raises(Exception, match="1226"):
        for _ in range(10):
            mysqlclient.query(handle, "SELECT 1")
    assert check(mysqlclient, handle, suspect=True) is Liveness.ALIVE


def test_pymysql_pending_result_sets(pymysql: Client, mariadb: Server) -> None:
    """The further results of a procedure are not thrown away."""
    mariadb.execute("DROP PROCEDURE IF EXISTS two", database="test")
    mariadb.execute("CREATE PROCEDURE two() BEGIN SELECT 1; SELECT 2; END", database="test")
    handle = pymysql.connect(mariadb, "socket")
    cursor = handle.cursor()
    cursor.callproc("two")
    assert check(pymysql, handle, suspect=True) is Liveness.BUSY
    assert cursor.nextset()
    assert cursor.fetchall() == ((2,),)


def test_pymysql_unfinished_result(pymysql: Client, mariadb: Server) -> None:
    """PyMySQL would read the rows of an unbuffered result away: busy, and every row is there."""
    from pymysql.cursors import SSCursor

    handle = pymysql.connect(mariadb, "socket")
    cursor = handle.cursor(SSCursor)
    cursor.execute("SELECT seq FROM seq_1_to_5000")
    cursor.fetchone()
    assert check(pymysql, handle, suspect=True) is Liveness.BUSY
    assert len(cursor.fetchall()) == 4999
    assert check(pymysql, handle, suspect=True) is Liveness.ALIVE


def test_notification_is_not_lost(psycopg: Client, postgresql: Server) -> None:
    """A notification makes the socket readable: alive, and still there for its reader."""
    postgresql.create_database("test")
    handle = psycopg.connect(postgresql, "socket")
    handle.execute("LISTEN prices")
    postgresql.execute("NOTIFY prices, 'new'", database="test")
    wait_for(lambda: not seems_alive(psycopg.driver, handle))
    assert check(psycopg, handle) is Liveness.ALIVE
    assert [n.payload for n in handle.notifies(timeout=1, stop_after=1)] == ["new"]


def test_pipeline_is_busy(psycopg: Client, postgresql: Server) -> None:
    """In psycopg's pipeline mode nothing may come in between."""
    handle = psycopg.connect(postgresql, "socket")
    with handle.pipeline():
        assert check(psycopg, handle, suspect=True) is Liveness.BUSY
    assert check(psycopg, handle, suspect=True) is Liveness.ALIVE


# Does it take writes?


def test_takes_writes(client: Client, handle: Any) -> None:
    """The server is asked, and the session is as before."""
    assert client.driver.takes_writes(handle, timeout=5)
    assert client.query(handle, "SELECT 41 + 1") == 42
    if client.vendor == "postgresql":
        handle.cursor().execute("SET default_transaction_read_only = on")
        assert not client.driver.takes_writes(handle, timeout=5)


@pytest.mark.parametrize("fault", ["swallow", "trickle"])
def test_no_answer_whether_it_takes_writes(
    client: Client, shared_server: Server, fault: str
) -> None:
    """The question is bounded in time, and then the handle is of no use."""
    with Proxy(shared_server.host, shared_server.port) as proxy:
        handle = client.connect(proxy)
        getattr(proxy, fault)()
        assert not client.driver.takes_writes(handle, timeout=0.2)
        proxy.pass_through()
        with pytest.raises(handle.Error if client.module != "psycopg" else Exception, match=GONE):
            client.query(handle, "SELECT 1")
