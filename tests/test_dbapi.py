"""dbapi.Connection: healed where nothing is lost with it, on real servers, over each driver."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import MySQLdb
import MySQLdb.cursors
import psycopg
import psycopg.sql
import pytest

from django_dbhealth import Kind, Outcome, classify, open_connections
from django_dbhealth.dbapi import Connection, InterfaceError
from django_dbhealth.signals import connection_healed, connection_lost
from tests.faults import BEGIN, DRIVERS, INSERT, SESSION_ID, Bench, Driver
from tests.servers.base import PASSWORD, USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

LOCK = {
    "mariadb": ("SELECT GET_LOCK('shelf', 10)", "lock by GET_LOCK"),
    "postgresql": ("SELECT pg_advisory_lock(7)", "advisory lock"),
}
TEMPORARY = "CREATE TEMPORARY TABLE shelf (id int)"
SLEEP = {"mariadb": "SELECT SLEEP(30)", "postgresql": "SELECT pg_sleep(30)"}


@dataclass
class Place:
    """A server, and a driver that connects to it."""

    bench: Bench
    driver: Driver
    opened: list[Connection] = field(default_factory=list)

    def account(self, **options: Any) -> dict[str, Any]:
        name = "database" if self.driver.kind == "mariadb" else "dbname"
        address = {"host": self.bench.server.host, "port": self.bench.server.port}
        account = {"user": USER, "password": PASSWORD, name: "test", "connect_timeout": 5}
        return account | address | options

    def connect(self, **options: Any) -> Any:
        return __import__(self.driver.module).connect(**self.account(**options))

    def open(self, *, through_proxy: bool = False, **options: Any) -> Connection:
        way = {"port": self.bench.proxy.port} if through_proxy else {}
        connection = Connection(lambda: self.connect(**way), **options)
        self.opened.append(connection)
        return connection

    @property
    def error(self) -> type[Exception]:
        error: type[Exception] = __import__(self.driver.module).Error
        return error

    def session_id(self, db: Connection) -> int:
        return int(db.query(SESSION_ID[self.driver.kind])[0][0])

    def lose(self, db: Connection) -> None:
        session = self.session_id(db)
        self.bench.server.kill_connection(session)
        self.bench.server.wait_until_gone(session)

    def rows(self) -> list[str]:
        """Return what is stored, with what is stored twice."""
        return [name for (name,) in self.bench.execute("SELECT name FROM happened ORDER BY 1")]


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[str, Bench]]:
    benches = {kind: Bench(kind) for kind in ("mariadb", "postgresql")}
    yield benches
    for bench in benches.values():
        bench.remove()


def place_of(benches: dict[str, Bench], name: str) -> Iterator[Place]:
    driver = DRIVERS[name]
    place = Place(benches[driver.kind], driver)
    place.bench.reset()
    yield place
    for db in place.opened:
        db.close()


@pytest.fixture(params=list(DRIVERS))
def place(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Iterator[Place]:
    yield from place_of(benches, request.param)


@pytest.fixture
def mysqlclient(benches: dict[str, Bench]) -> Iterator[Place]:
    yield from place_of(benches, "mysqlclient")


@pytest.fixture
def psycopg3(benches: dict[str, Bench]) -> Iterator[Place]:
    yield from place_of(benches, "psycopg")


# Healed


def test_lost_while_idle(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The next statement has a new session, and the log says so."""
    db = place.open(name="importer")
    before = place.session_id(db)
    place.lose(db)
    with caplog.at_level(logging.INFO, "django_dbhealth.guard"):
        assert place.session_id(db) != before
    [record] = caplog.records
    assert record.getMessage().startswith("The connection 'importer' was lost and healed")
    db.query(INSERT, ["first"])
    assert place.rows() == ["first"]


def test_idleness_begins_with_the_answer(place: Place) -> None:
    db = place.open()
    sleep = "SLEEP" if place.driver.kind == "mariadb" else "pg_sleep"
    with db.cursor() as cursor:
        began = time.monotonic()
        cursor.execute(f"SELECT {sleep}(0.1)")
        assert db._link is not None
        assert db._link.last_used >= began + 0.09


def test_what_asks_nobody_is_no_answer(place: Place) -> None:
    """Rows that are here already, and MySQL's batch of nothing: idleness goes on."""
    db = place.open()
    with db.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert db._link is not None
        db._link.last_used = began = time.monotonic() - 20
        cursor.fetchall()
    with db.cursor() as cursor:
        cursor.executemany(INSERT, [])
    assert db._link.last_used == began
    with db.cursor() as cursor:
        cursor.executemany(INSERT, [["first"]])
    assert db._link.last_used > began


def test_lost_again_and_again(place: Place) -> None:
    db = place.open()
    for number in range(5):
        place.lose(db)
        db.query(INSERT, [str(number)])
    assert place.rows() == ["0", "1", "2", "3", "4"]


def test_lost_before_a_transaction(place: Place) -> None:
    db = place.open()
    place.lose(db)
    with db.transaction():
        db.query(INSERT, ["first"])
    assert place.rows() == ["first"]


def test_server_restarted(place: Place) -> None:
    db = place.open()
    before = place.session_id(db)
    place.bench.server.restart()
    assert place.session_id(db) is not None
    db.query(INSERT, ["first"])
    assert place.rows() == ["first"]
    assert before


def test_held_cursor_follows(place: Place) -> None:
    """A cursor that was made before the loss works after it."""
    db = place.open()
    with db.cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchall() == [(1,)]
        place.lose(db)
        assert cursor.execute("SELECT 2").fetchone() == (2,)


def test_silently_dropped(place: Place) -> None:
    """What no socket shows is found by a probe that is bounded: after ping_after seconds."""
    ports = iter([place.bench.proxy.port, place.bench.server.port])
    db = Connection(
        lambda: place.connect(port=next(ports)),
        ping_after=0,
        ping_timeout=0.3,
    )
    before = place.session_id(db)
    place.bench.proxy.swallow()
    assert place.session_id(db) != before
    db.close()


def test_alive_after_a_long_time(place: Place) -> None:
    """A probe that is answered changes nothing."""
    db = place.open(ping_after=0)
    before = place.session_id(db)
    assert place.session_id(db) == before


def test_signals(place: Place) -> None:
    seen: list[tuple[str, Any, str]] = []

    def note(sender: Any, alias: str, signal: Any, **kwargs: Any) -> None:
        seen.append(("lost" if signal is connection_lost else "healed", sender, alias))

    db = place.open(name="importer")
    place.lose(db)
    for each in (connection_lost, connection_healed):
        each.connect(note)
    try:
        db.query("SELECT 1")
    finally:
        for each in (connection_lost, connection_healed):
            each.disconnect(note)
    assert seen == [("lost", Connection, "importer"), ("healed", Connection, "importer")]


# Session state


def test_session_state_is_named(place: Place) -> None:
    """A lost lock and a lost temporary table are an error that names them, once."""
    db = place.open()
    sql, words = LOCK[place.driver.kind]
    db.query(sql)
    db.query(TEMPORARY)
    place.lose(db)
    with pytest.raises(place.error) as caught:
        db.query(INSERT, ["never"])
    [note] = caught.value.__notes__
    assert f"lost with its session: {words}, temporary table shelf (the next use" in note
    assert PASSWORD not in note
    db.query(INSERT, ["next"])
    assert place.rows() == ["next"]


def test_session_state_that_was_given_back(place: Place) -> None:
    db = place.open()
    db.query(TEMPORARY)
    db.query("DROP TABLE shelf")
    place.lose(db)
    db.query(INSERT, ["next"])
    assert place.rows() == ["next"]


def test_composed_sql(psycopg3: Place) -> None:
    """SQL that is no text counts too."""
    db = psycopg3.open()
    db.query(psycopg.sql.SQL("CREATE TEMP TABLE {} (id int)").format(psycopg.sql.Identifier("a")))
    psycopg3.lose(db)
    with pytest.raises(psycopg.Error) as caught:
        db.query("SELECT 1")
    assert "temporary table a" in caught.value.__notes__[0]


def test_server_side_cursor(psycopg3: Place) -> None:
    """Its rows are on the server: it is session state until it is closed."""
    db = psycopg3.open()
    cursor = db.cursor("shelf", withhold=True)
    cursor.execute("SELECT generate_series(1, 9)")
    psycopg3.lose(db)
    with pytest.raises(psycopg.Error) as caught:
        db.query("SELECT 1")
    assert "a server-side cursor" in caught.value.__notes__[0]
    cursor.close()
    cursor = db.cursor("shelf", withhold=True)
    cursor.execute("SELECT generate_series(1, 9)")
    assert len(cursor.fetchall()) == 9
    cursor.close()
    psycopg3.lose(db)
    assert db.query("SELECT 1") == [(1,)]


def test_unbuffered_result(mysqlclient: Place) -> None:
    """One that is being read is busy, and not lost."""
    db = mysqlclient.open(ping_after=0)
    before = mysqlclient.session_id(db)
    cursor = db.cursor(MySQLdb.cursors.SSCursor)
    assert len(list(cursor.execute("SELECT seq FROM seq_1_to_10000"))) == 10_000
    assert cursor.execute("SELECT seq FROM seq_1_to_10000").fetchone() == (1,)
    for _ in range(2):
        with pytest.raises(MySQLdb.ProgrammingError, match="2014"):
            db.query("SELECT 1")
    with pytest.raises(MySQLdb.ProgrammingError, match="2014"):
        cursor.close()  # the driver's own answer to a reader that was disturbed
    assert mysqlclient.session_id(db) == before


# Transactions


def test_transaction(place: Place) -> None:
    """Autocommit without one; all or nothing with one."""
    db = place.open()
    db.query(INSERT, ["alone"])
    with db.transaction():
        db.query(INSERT, ["first"])
        assert place.rows() == ["alone"]
    with pytest.raises(ZeroDivisionError), db.transaction():
        db.query(INSERT, ["undone"])
        raise ZeroDivisionError
    db.query(INSERT, ["last"])
    assert place.rows() == ["alone", "first", "last"]


def test_lost_in_a_transaction(place: Place) -> None:
    """It is an error, nothing of it is stored, and the next use works."""
    db = place.open()
    with pytest.raises(place.error) as caught, db.transaction():
        db.query(INSERT, ["undone"])
        place.lose(db)
        db.query(INSERT, ["never"])
    assert "Not healed: it was in a transaction." in caught.value.__notes__[0]
    db.query(INSERT, ["next"])
    assert place.rows() == ["next"]


def test_lost_in_a_transaction_and_caught(place: Place) -> None:
    """Whoever catches the error inside meets another one at the end."""
    db = place.open()
    with pytest.raises((place.error, InterfaceError)), db.transaction():
        db.query(INSERT, ["undone"])
        place.lose(db)
        for _ in range(2):
            with suppress(place.error, InterfaceError):
                db.query(INSERT, ["never"])
    db.query(INSERT, ["next"])
    assert place.rows() == ["next"]


def test_lost_before_commit(place: Place) -> None:
    db = place.open()
    with pytest.raises(place.error), db.transaction():
        db.query(INSERT, ["undone"])
        place.lose(db)
    assert place.rows() == []


def test_lost_during_commit(place: Place) -> None:
    """Nobody knows whether it was committed, and the error says so."""
    db = place.open(through_proxy=True)

    def cut() -> None:
        wait_for(lambda: db._link is not None and db._link.committing, interval=0.001)
        time.sleep(0.2)  # COMMIT is on its way, and will not arrive
        place.bench.proxy.cut()

    thread = threading.Thread(target=cut)
    try:
        with pytest.raises(place.error) as caught, db.transaction():
            db.query(INSERT, ["perhaps"])
            place.bench.proxy.swallow()
            thread.start()
    finally:
        thread.join()
        place.bench.proxy.pass_through()
    fault = classify(caught.value)
    assert fault is not None
    assert fault.outcome is Outcome.UNKNOWN
    assert "Whether the transaction was committed is unknown." in caught.value.__notes__[0]


def test_lost_during_a_statement(place: Place) -> None:
    """The outcome is unknown, and it is not sent again."""
    db = place.open()
    session = place.session_id(db)
    server = place.bench.server

    def kill() -> None:
        server.wait_until_running(SLEEP[place.driver.kind])
        server.kill_connection(session)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(place.error) as caught:
        db.query(SLEEP[place.driver.kind])
    thread.join()
    fault = classify(caught.value)
    assert fault is not None
    assert (fault.kind, fault.outcome) == (Kind.LOST, Outcome.UNKNOWN)
    assert "Whether the statement ran is unknown." in caught.value.__notes__[0]
    assert place.session_id(db) != session


def test_not_nested(place: Place) -> None:
    db = place.open()
    with db.transaction():
        db.query(INSERT, ["first"])
        with pytest.raises(InterfaceError, match="is in a transaction already"), db.transaction():
            pass
        db.query("SAVEPOINT a")
        db.query(INSERT, ["undone"])
        db.query("ROLLBACK TO SAVEPOINT a")
    assert place.rows() == ["first"]


def test_not_inside_a_raw_transaction(place: Place) -> None:
    """BEGIN would commit it on MySQL, without a word."""
    db = place.open()
    db.query(BEGIN[place.driver.kind])
    db.query(INSERT, ["undone"])
    with pytest.raises(InterfaceError, match="is in a transaction already"), db.transaction():
        pass
    db.query("ROLLBACK")
    with db.transaction():
        db.query(INSERT, ["first"])
    assert place.rows() == ["first"]


def test_raw_transaction_is_not_healed(place: Place) -> None:
    db = place.open()
    db.query(BEGIN[place.driver.kind])
    db.query(INSERT, ["undone"])
    place.lose(db)
    with pytest.raises(place.error) as caught:
        db.query(INSERT, ["never"])
    assert "transaction begun by raw SQL" in caught.value.__notes__[0]
    assert place.rows() == []


def test_failed_statement_in_a_transaction(place: Place) -> None:
    """MySQL goes on; PostgreSQL can only roll back, which is no quiet end."""
    db = place.open()

    def insert_twice() -> None:
        with db.transaction():
            db.query(INSERT, ["first"])
            with suppress(place.error):
                db.query("SELECT 1 FROM missing")

    if place.driver.kind == "mariadb":
        insert_twice()
        assert place.rows() == ["first"]
        return
    with pytest.raises(InterfaceError, match="can only roll it back"):
        insert_twice()
    db.query(INSERT, ["next"])
    assert place.rows() == ["next"]


@pytest.mark.parametrize("goes_on", [True, False])
def test_deadlock(goes_on: bool, mysqlclient: Place) -> None:
    """The server has rolled back: what follows must not be committed without what was before."""
    db = mysqlclient.open()
    for name in ("a", "b"):
        db.query(INSERT, [name])
    update = "UPDATE happened SET more = 'x' WHERE name = %s"
    mysqlclient.bench.execute("CREATE INDEX by_name ON happened (name)")
    begun, thread = threading.Event(), threading.Thread()

    def other() -> None:
        with closing(mysqlclient.connect()) as handle, closing(handle.cursor()) as cursor:
            cursor.execute("INSERT INTO happened (name) SELECT 'c' FROM seq_1_to_1000")
            cursor.execute(update, ["b"])
            begun.set()
            cursor.execute(update, ["a"])  # waits, and with so many rows it is not the victim
            handle.rollback()

    try:
        with pytest.raises(InterfaceError, match="rolled back by its server"), db.transaction():
            db.query(update, ["a"])
            thread = threading.Thread(target=other)
            thread.start()
            assert begun.wait(10)
            with pytest.raises(MySQLdb.OperationalError, match="1213"):
                db.query(update, ["b"])
            if goes_on:
                db.query(INSERT, ["never"])
    finally:
        thread.join()
        mysqlclient.bench.execute("DROP INDEX by_name ON happened")
    db.query(INSERT, ["next"])
    assert mysqlclient.rows() == ["a", "b", "next"]


class Stop(Exception):
    """What a signal handler raises."""


SLEEPING = {
    "mariadb": "SELECT id FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%'",
    "postgresql": "SELECT pid FROM pg_stat_activity"
    " WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'",
}


@contextmanager
def stopped(place: Place) -> Iterator[None]:
    """Have a signal handler's exception end the block, as soon as a statement of it sleeps."""

    def stop(*args: object) -> None:
        raise Stop

    def send() -> None:
        wait_for(lambda: place.bench.execute(SLEEPING[place.driver.kind]))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGALRM, stop)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(Stop):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["PyMySQL", "psycopg"])
@pytest.mark.parametrize("in_transaction", [False, True])
def test_interrupted(name: str, in_transaction: bool, benches: dict[str, Bench]) -> None:
    """A connection that was left in the middle of a statement is given up."""
    place = next(place_of(benches, name))
    db = place.open()
    before = place.session_id(db)
    if in_transaction:
        with stopped(place), db.transaction():
            db.query(INSERT, ["undone"])
            db.query(SLEEP[place.driver.kind])
    else:
        with stopped(place):
            db.query(SLEEP[place.driver.kind])
    assert place.session_id(db) != before
    db.query(INSERT, ["next"])
    with suppress(place.bench.server.operational_error):  # it has noticed by itself
        place.bench.server.kill_connection(before)
    place.bench.server.wait_until_gone(before)
    assert place.rows() == ["next"]
    db.close()


# Cursors


def test_query(place: Place) -> None:
    """Rows for a statement that has some, else none."""
    db = place.open()
    assert db.query(INSERT, ["first"]) == []
    assert db.query("SELECT name FROM happened WHERE name = %s", ["first"]) == [("first",)]
    assert db.query("SELECT name FROM happened WHERE name = %s", ["none"]) == []


def test_cursor(place: Place) -> None:
    db = place.open()
    with db.cursor() as cursor:
        cursor.executemany(INSERT, [["a"], ["b"], ["c"], ["d"]])
        assert cursor.rowcount == 4
        cursor.execute("SELECT name FROM happened ORDER BY 1")
        assert cursor.description[0][0] == "name"
        assert cursor.fetchone() == ("a",)
        assert cursor.fetchmany(2) == [("b",), ("c",)]
        assert list(cursor) == [("d",)]
        assert cursor.fetchone() is None


def test_lastrowid(mysqlclient: Place) -> None:
    db = mysqlclient.open()
    db.query("CREATE TEMPORARY TABLE shelf (id INT AUTO_INCREMENT PRIMARY KEY)")
    with db.cursor() as cursor:
        assert [cursor.execute("INSERT INTO shelf VALUES ()").lastrowid for _ in "ab"] == [1, 2]


def test_ordinary_error(place: Place) -> None:
    """It is the driver's own, without a note, and the connection stays."""
    db = place.open()
    before = place.session_id(db)
    with pytest.raises(place.error) as caught:
        db.query("SELECT nonsense")
    assert not hasattr(caught.value, "__notes__")
    assert place.session_id(db) == before


def test_error_of_a_later_statement(mysqlclient: Place) -> None:
    """Of several statements in one text: the cursor's close brings it up."""
    db = mysqlclient.open()
    with pytest.raises(MySQLdb.Error):
        db.query("INSERT INTO happened (name) VALUES ('first'); SELECT nonsense")


# Threads and forks


def test_thread_that_has_its_connection(mysqlclient: Place) -> None:
    """As an attribute: the connection goes with it, and no garbage collection is waited for."""

    class Worker(threading.Thread):
        def run(self) -> None:
            self.db = Connection(mysqlclient.connect)
            self.session = mysqlclient.session_id(self.db)

    gc.disable()
    try:
        worker = Worker()
        worker.start()
        worker.join()
        session = worker.session
        del worker
        mysqlclient.bench.server.wait_until_gone(session)
    finally:
        gc.enable()


def test_other_thread(place: Place) -> None:
    db = place.open(name="importer")
    db.query("SELECT 1")
    met: list[str] = []

    def use() -> None:
        for call in (lambda: db.query("SELECT 1"), db.close, db.transaction().__enter__):
            try:
                call()
            except InterfaceError as error:
                met.append(str(error))

    thread = threading.Thread(target=use, name="other")
    thread.start()
    thread.join()
    words = "The connection 'importer' was opened by the thread 'MainThread' and is used by 'other'"
    assert [each.startswith(words) for each in met] == [True] * 3
    assert db.query("SELECT 1") == [(1,)]


FORK = """
import gc, json, os, sys, warnings
from django.conf import settings
from django_dbhealth import open_connections
from django_dbhealth.dbapi import Connection, InterfaceError

driver, account, session, insert = json.loads(sys.argv[1])
module = __import__(driver)
db = Connection(lambda: module.connect(**account))
mine = db.query(session)

def ends():
    pass

def exits():
    sys.exit(0)

def closes():
    db.close()

def collects():
    global db
    del db
    gc.collect()

def queries():
    assert open_connections() == []
    assert db.query(session) != mine
    with db.transaction():
        db.query(insert, ["child"])
    db.close()

def goes_on():
    try:
        db.query(insert, ["never"])
    except InterfaceError as error:
        assert "not there any more: it was left behind by a fork" in str(error), error
        return
    raise AssertionError

def fork(action):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        action()
        status = 0
    except SystemExit:
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(status)

for action in (ends, closes, collects, queries, exits) * 3:
    assert fork(action) == 0, action
    assert db.query(session) == mine, action
with db.transaction():
    db.query(insert, ["parent"])
    for action in (ends, closes, collects, goes_on, exits) * 3:
        assert fork(action) == 0, action
    assert db.query(session) == mine
db.close()
assert not settings.configured
"""


def test_fork_without_settings(place: Place) -> None:
    """A child leaves its parent's session alone; and all of this needs no Django settings."""
    arguments = [
        place.driver.module,
        place.account(),
        SESSION_ID[place.driver.kind],
        INSERT,
    ]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK, json.dumps(arguments)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert place.rows() == ["child"] * 3 + ["parent"]


def test_open_connections(place: Place) -> None:
    db = place.open(name="importer")
    assert [each for each in open_connections() if each.alias == "importer"] == []
    db.query("SELECT 1")
    with db.transaction():
        [held] = [each for each in open_connections() if each.alias == "importer"]
        assert held.in_transaction
        assert held.thread_name == "MainThread"
        assert re.fullmatch(rf"{re.escape(__file__)}:\d+", held.opened_at)
    db.close()
    assert [each for each in open_connections() if each.alias == "importer"] == []


def test_no_free_slot(mysqlclient: Place) -> None:
    """The note of a refused connect lists what this process holds under the same name."""
    server = mysqlclient.bench.server
    server.grant_limit(USER, 1)
    try:
        first, second = mysqlclient.open(), mysqlclient.open()
        first.query("SELECT 1")
        with pytest.raises(MySQLdb.OperationalError, match="1226") as caught:
            second.query("SELECT 1")
        note = caught.value.__notes__[0]
        assert "No statement ran." in note
        assert "This process holds 1 there:\n- 'dbapi', thread 'MainThread'" in note
        first.close()
        wait_for(lambda: not server.sessions(USER))
        assert second.query("SELECT 1") == [(1,)]
    finally:
        server.grant_limit(USER, 0)


def test_nothing_is_left_without_a_close(mysqlclient: Place) -> None:
    """One that is forgotten is no longer held by anything of ours."""
    db = Connection(mysqlclient.connect)
    db.query("SELECT 1")
    del db
    gc.collect()
    mysqlclient.bench.server.wait_for_sessions(0, USER)


# Bad input


def test_no_function(place: Place) -> None:
    with closing(place.connect()) as handle, pytest.raises(TypeError, match="connect is a "):
        Connection(handle)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"ping_after": -1}, r"ping_after is -1\. Give a number of seconds from 0 to"),
        ({"ping_after": "30"}, r"ping_after is '30'\. Give"),
        ({"ping_timeout": 0}, r"ping_timeout is 0\. Give a number of seconds above 0"),
    ],
)
def test_bad_seconds(value: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Connection(lambda: None, **value)


def test_connect_returns_nothing() -> None:
    db = Connection(lambda: None, name="importer")
    for _ in range(2):
        with pytest.raises(InterfaceError, match=r"connect\(\) of 'importer' has returned None"):
            db.query("SELECT 1")


def test_connect_returns_a_closed_connection(place: Place) -> None:
    handle = place.connect()
    handle.close()
    with pytest.raises(InterfaceError, match="a connection that is closed already"):
        Connection(lambda: handle).query("SELECT 1")


def test_connect_returns_the_lost_connection(place: Place) -> None:
    """As a function does that opens one once and for all."""
    handle = place.connect()
    db = Connection(lambda: handle)
    place.lose(db)
    with pytest.raises(InterfaceError, match="Let it open a new one each time"):
        db.query("SELECT 1")
    with suppress(place.error):
        handle.close()


def test_unknown_driver() -> None:
    words = r"a sqlite3\.Connection, which .* Known are: MySQLdb, pymysql, psycopg, psycopg2\."
    with (
        closing(sqlite3.connect(":memory:")) as handle,
        pytest.raises(InterfaceError, match=words),
    ):
        Connection(lambda: handle).query("SELECT 1")


def test_coroutine(psycopg3: Place) -> None:
    """An async connect is one of those."""
    made: list[Any] = []

    def connect() -> Any:
        made.append(psycopg.AsyncConnection.connect(**psycopg3.account()))
        return made[-1]

    with pytest.raises(InterfaceError, match=r"has returned a builtins\.coroutine"):
        Connection(connect).query("SELECT 1")
    made[0].close()


def test_proxied_connection(place: Place) -> None:
    """An application monitor's proxy stands for the connection in it."""

    class Monitor:
        def __init__(self, handle: Any) -> None:
            self.__dict__["handle"] = handle

        @property
        def __class__(self) -> Any:
            return type(self.__dict__["handle"])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["handle"], name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.__dict__["handle"], name, value)

    db = Connection(lambda: Monitor(place.connect()))
    db.query(INSERT, ["first"])
    place.lose(db)
    db.query(INSERT, ["next"])
    db.close()
    assert place.rows() == ["first", "next"]


def test_closed(place: Place) -> None:
    """It stays closed; closing it again is nothing."""
    with place.open() as db:
        cursor = db.cursor()
        cursor.execute("SELECT 1")
    db.close()
    calls = [
        lambda: db.query("SELECT 1"),
        lambda: cursor.execute("SELECT 1"),
        cursor.fetchone,
        db.transaction().__enter__,
    ]
    for call in calls:
        with pytest.raises(InterfaceError, match="is closed. Make another Connection"):
            call()
    place.bench.server.wait_for_sessions(0, USER)


def test_closed_in_a_transaction(place: Place) -> None:
    db = place.open()
    with pytest.raises(InterfaceError, match="is closed"), db.transaction():
        db.query(INSERT, ["undone"])
        db.close()
    assert place.rows() == []


def test_cursor_without_a_statement(place: Place) -> None:
    db = place.open()
    with db.cursor() as cursor, pytest.raises(InterfaceError, match=r"Call execute\(\) first"):
        cursor.fetchone()
