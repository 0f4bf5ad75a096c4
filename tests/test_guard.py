"""What the guard says, what it costs, and what it leaves alone. Outcomes are in their own file."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import time
import unittest
import weakref
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest
from django.db import Error, OperationalError, connections, transaction
from django.db.backends.signals import connection_created
from django.db.backends.utils import CursorWrapper
from django.db.utils import load_backend
from django.test import TestCase, override_settings

from django_dbhealth import wrappers
from django_dbhealth.signals import connection_healed, connection_lost
from django_dbhealth.watch import watch_of
from django_dbhealth.wrappers import watch_connection
from tests.app.models import Row
from tests.conftest import Database, close_connections
from tests.outcomes import INSERT
from tests.servers.base import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.watch import Watch


def connection_of(database: Database) -> Any:
    return connections[database.alias]


def session_of(connection: BaseDatabaseWrapper) -> int:
    handle: Any = connection.connection
    return handle.thread_id() if connection.vendor == "mysql" else handle.info.backend_pid


def lose(database: Database, connection: Any = None) -> int:
    """Have the server end the connection's session; return which one it was."""
    connection = connection or connection_of(database)
    connection.ensure_connection()
    session = session_of(connection)
    database.server.kill_connection(session)
    database.server.wait_until_gone(session)
    return session


def rows(database: Database) -> list[str]:
    """Return what is in the table, as a second connection sees it."""
    found = database.server.execute("SELECT name FROM app_row ORDER BY id", database="rows")
    return [name for (name,) in found]


def create(name: str) -> None:
    Row.objects.using("database").create(name=name)


def run(sql: str) -> list[Any]:
    with connections["database"].cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


TEMPORARY_TABLE = "CREATE TEMPORARY TABLE shelf (id int)"


# What is said


@contextmanager
def received() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    seen: list[tuple[str, dict[str, Any]]] = []

    def lost(signal: Any, **arguments: Any) -> None:
        seen.append(("lost", arguments))

    def healed(signal: Any, **arguments: Any) -> None:
        seen.append(("healed", arguments))

    connection_lost.connect(lost)
    connection_healed.connect(healed)
    yield seen
    connection_lost.disconnect(lost)
    connection_healed.disconnect(healed)


def test_signals_and_log(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A healed loss is two signals with all figures, and one record at INFO."""
    caplog.set_level(logging.INFO, "django_dbhealth")
    lose(database)
    time.sleep(0.05)
    with received() as seen:
        create("a")
    assert [name for name, _ in seen] == ["lost", "healed"]
    for _, arguments in seen:
        assert arguments["sender"] is type(connection_of(database))
        assert arguments["alias"] == "database"
        assert arguments["reason"] == "closed by the server"
        assert 0.05 <= arguments["idle_seconds"] < 5
        assert 0 < arguments["duration"] < 5
    assert seen[0][1]["duration"] <= seen[1][1]["duration"]
    [record] = caplog.records
    assert (record.levelname, record.name) == ("INFO", "django_dbhealth.guard")
    assert record.alias == "database"  # type: ignore[attr-defined]
    assert re.match(
        r"The connection 'database' was lost and healed after \d\.\d s of idleness", record.message
    )


def test_a_loss_that_is_not_healed(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """In a transaction it is one signal, and one record at WARNING."""
    caplog.set_level(logging.INFO, "django_dbhealth")
    with received() as seen, pytest.raises(OperationalError), transaction.atomic("database"):
        create("a")
        lose(database)
        create("b")
    assert [(name, arguments["reason"]) for name, arguments in seen] == [
        ("lost", "a statement failed")
    ]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "It was in a transaction, which is rolled back." in record.message
    assert rows(database) == []


def test_receivers_may_use_the_connection(database: Database) -> None:
    """A receiver that writes to the very database does so once, on the new connection."""

    def note(signal: Any, alias: str, **arguments: Any) -> None:
        create(f"lost {alias}")

    connection_lost.connect(note)
    try:
        lose(database)
        create("a")
        create("b")
    finally:
        connection_lost.disconnect(note)
    assert rows(database) == ["lost database", "a", "b"]


def test_receiver_that_fails(database: Database) -> None:
    """What a receiver raises does not reach the program."""

    def fail(signal: Any, **arguments: Any) -> None:
        raise LookupError

    connection_healed.connect(fail)
    try:
        lose(database)
        create("a")
    finally:
        connection_healed.disconnect(fail)
    assert rows(database) == ["a"]


@pytest.mark.parametrize(
    ("policy", "level"), [("raise", "WARNING"), ("warn", "WARNING"), ("ignore", "INFO")]
)
def test_loss_of_session_state(
    database: Database, policy: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error, once, or a warning that names what was lost, or nothing."""
    caplog.set_level(logging.INFO, "django_dbhealth.guard")
    with override_settings(DBHEALTH={"ON_SESSION_STATE_LOSS": policy}):
        run(TEMPORARY_TABLE)
        lose(database)
        if policy == "raise":
            with pytest.raises(OperationalError) as caught:
                create("a")
            [note] = caught.value.__notes__
            assert "lost with its session: temporary table shelf" in note
        else:
            create("a")
        create("b")
    assert rows(database) == ([] if policy == "raise" else ["a"]) + ["b"]
    assert caplog.records[0].levelname == level
    assert ("temporary table shelf" in caplog.text) is (policy != "ignore")


def test_state_lost_after_a_commit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed block ends well; that its temporary table is gone, the next use says."""
    connection = connection_of(database)
    committed: list[str] = []
    plain_commit = connection._commit

    def commit() -> None:
        plain_commit()
        lose(database)

    with monkeypatch.context() as patch, transaction.atomic("database"):
        run(TEMPORARY_TABLE)
        create("a")
        transaction.on_commit(lambda: committed.append("callback"), using="database")
        # The moment between two packets cannot be met from outside.
        patch.setattr(connection, "_commit", commit)
    assert (committed, rows(database)) == (["callback"], ["a"])
    with pytest.raises(OperationalError) as caught:
        create("b")
    assert "temporary table shelf" in caught.value.__notes__[0]
    create("c")
    assert rows(database) == ["a", "c"]


# What it costs


def questions() -> int:
    return int(run("SHOW SESSION STATUS LIKE 'Questions'")[0][1])


def test_healthy_connection_costs_no_round_trip(mariadb: Any, add_database: Any) -> None:
    """The server counts the statements that the program sent; after a pause one probe more."""
    alias = add_database(mariadb.django(), alias="database")
    before = questions()
    for _ in range(10):
        run("SELECT 1")
    assert questions() - before == 11  # the counting itself is one
    found = watch_of(connections[alias])
    assert found is not None

    def be_idle() -> None:
        found.last_used -= 31  # PING_AFTER is 30
        found.last_seen -= 31

    be_idle()
    before = questions()  # a probe, and this one
    be_idle()
    assert questions() - before == 2
    with override_settings(DBHEALTH={"PING_AFTER": 3600}):
        before = questions()
        be_idle()
        assert questions() - before == 1


def test_probe_after_an_error_only_once(mariadb: Any, add_database: Any) -> None:
    """An error may mean anything, so the next use asks; then the connection is believed again."""
    add_database(mariadb.django(), alias="database")
    before = questions()
    with pytest.raises(Error):
        run("SELECT nonsense")
    assert questions() - before == 3  # the wrong one, a probe, the counting
    assert questions() - before == 4


SLEEP = {"mysql": "SELECT SLEEP({})", "postgresql": "SELECT pg_sleep({})"}


def noted_looks(found: Watch, note: Callable[[float], float]) -> list[float]:
    """Return the list to which each look at the socket from now on adds its note."""
    look, notes = found.make_poll(), []

    def noting(timeout: float) -> Any:
        notes.append(note(timeout))
        return look(timeout)

    found.poll = noting
    return notes


def test_idleness_begins_with_the_answer(database: Database, monkeypatch: Any) -> None:
    """So after a long statement nothing is asked, and nothing looked at."""
    connection = connection_of(database)
    run("SELECT 1")
    found = watch_of(connection)
    assert found is not None
    looks = noted_looks(found, lambda timeout: timeout)
    monkeypatch.setattr(wrappers, "JUST_NOW", 20)
    found.last_seen -= 20
    began = time.monotonic()
    run(SLEEP[connection.vendor].format(0.2))
    assert min(found.last_used, found.last_seen) >= began + 0.19
    assert looks == [0]
    run("SELECT 1")
    assert looks == [0]
    found.last_seen -= 20
    run("SELECT 1")
    assert looks == [0, 0]


@pytest.mark.parametrize("parameters", [[], ()])
def test_executemany_of_nothing_is_no_answer(database: Database, parameters: Any) -> None:
    """MySQL's drivers send nothing then: it tells nothing of the connection."""
    connection = connection_of(database)
    create("a")
    found = watch_of(connection)
    assert found is not None
    with connection.cursor() as cursor:
        found.last_used = found.last_seen = began = time.monotonic() - 20
        cursor.executemany(INSERT, parameters)
        assert found.last_used == began
        assert found.last_seen > began  # it was looked at
        cursor.executemany(INSERT, [("b",)])
        assert found.last_used > began
    assert rows(database) == ["a", "b"]


@pytest.mark.parametrize("ending", ["look", "close", "failed", "failed in a block"])
def test_lost_handle_is_let_go(database: Database, ending: str) -> None:
    """Not while somebody waits for the first query after the loss, but at the next look."""
    connection = connection_of(database)
    create("a")
    lost = weakref.ref(connection.connection)
    lose(database)
    if "failed" in ending:
        connection.settings_dict["PASSWORD"] = "another"
        block = transaction.atomic("database") if "block" in ending else nullcontext()
        with suppress(OperationalError), block:
            create("b")
        connection.close()
        gc.collect()
        assert lost() is None
        return
    create("b")
    if ending == "close":
        connection.close()
    else:
        time.sleep(0.001)
        create("c")
    gc.collect()
    assert lost() is None


def test_descriptor_that_the_program_closed(database: Database) -> None:
    """As a daemon does with all that it has: the number is the next connection's."""
    connection = connection_of(database)
    create("a")
    found = watch_of(connection)
    assert found is not None
    descriptor = found.driver.descriptor(connection.connection)
    assert descriptor is not None
    os.close(descriptor)
    time.sleep(0.001)
    for name in "bcd":
        create(name)
        session = session_of(connection)
        time.sleep(0.001)
        create(name)
        assert session_of(connection) == session
    assert rows(database) == list("abbccdd")


# What is left alone


def test_shared_connection_is_its_makers_to_look_at(database: Database) -> None:
    """Two threads that look through one poll object at a time are a RuntimeError."""
    connection = connection_of(database)
    run("SELECT 1")
    found = watch_of(connection)
    assert found is not None
    lookers = noted_looks(found, lambda timeout: threading.get_ident())

    def use() -> None:
        found.last_seen -= 1
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    connection.inc_thread_sharing()
    try:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    finally:
        connection.dec_thread_sharing()
    assert lookers == []
    use()
    assert lookers == [threading.get_ident()]


def test_blocks_of_a_test_case(database: Database) -> None:
    """They belong to the test: a loss in them is an error, though nothing has run yet."""
    tested: list[bool] = []

    class InATestCase(TestCase):
        databases = {"database"}

        def test_loss(self) -> None:
            lose(database)
            with pytest.raises(OperationalError):
                create("a")
            tested.append(True)

    result = unittest.TestResult()
    unittest.TestSuite([InATestCase("test_loss")]).run(result)
    assert (tested, result.failures) == ([True], [])
    close_connections()
    assert rows(database) == []


def test_shared_connection_is_left_alone(database: Database) -> None:
    """Another thread may be using it: the error comes."""
    connection = connection_of(database)
    lose(database)
    connection.inc_thread_sharing()
    with pytest.raises(OperationalError):
        create("a")
    connection.dec_thread_sharing()
    create("b")
    assert rows(database) == ["b"]


def test_another_threads_connection(database: Database) -> None:
    """Django refuses it, and nothing is replaced behind its owner's back."""
    connection = connection_of(database)
    session = lose(database)
    errors: list[str] = []

    def use() -> None:
        try:
            connection.cursor()
        except Error as error:
            errors.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "can only be used in that same thread" in errors[0]
    assert session_of(connection) == session


def test_rollback_that_was_asked_for_stays_quiet(database: Database) -> None:
    """set_rollback(True) after a loss ends the block without an error, as it does without one."""
    with transaction.atomic("database"):
        create("a")
        lose(database)
        with pytest.raises(OperationalError):
            create("b")
        transaction.set_rollback(True, using="database")
    create("c")
    assert rows(database) == ["c"]


def test_no_limit_where_django_would_connect(database: Database) -> None:
    """Where CONN_HEALTH_CHECKS is due, plain Django waits for a slow connect; so it does here."""
    connection = connection_of(database)
    connection.settings_dict["CONN_HEALTH_CHECKS"] = True
    bounds: list[bool] = []

    def note(**arguments: Any) -> None:
        bounds.append("connect_timeout" in connection.get_connection_params())

    connection_created.connect(note)
    try:
        for is_due in (False, True):
            lose(database)
            connection.health_check_done = not is_due
            bounds.clear()
            create("a")
            assert bounds == [not is_due]
    finally:
        connection_created.disconnect(note)


@pytest.mark.parametrize("in_a_block", [False, True], ids=["alone", "in-a-block"])
def test_backend_with_a_close_of_its_own(database: Database, in_a_block: bool) -> None:
    """A backend's wrapper may remember what it has set in a session: close() makes it forget."""
    connection = connection_of(database)
    closed: list[Any] = []

    class Forgetful(type(connection)):  # type: ignore[misc]
        def close(self) -> None:
            closed.append(self.connection)
            super().close()

    connection.__class__ = Forgetful
    lose(database)
    handle = connection.connection
    with transaction.atomic("database") if in_a_block else nullcontext():
        create("a")
    assert closed == [handle]
    assert rows(database) == ["a"]


def test_limits_of_the_users_own_stay(database: Database) -> None:
    """A connect_timeout in OPTIONS is not changed for the connect that heals."""
    connection = connection_of(database)
    for options, expected in (({}, 5), ({"connect_timeout": 9}, 9)):
        connection.settings_dict["OPTIONS"] |= options
        watch = connection.dbhealth_watch
        assert connection.get_connection_params().get("connect_timeout") == options.get(
            "connect_timeout"
        )
        watch.bounded = True
        assert connection.get_connection_params()["connect_timeout"] == expected
        watch.bounded = False


@pytest.mark.parametrize("engine", ["django.db.backends.mysql", "tests.pymysql_backend"])
def test_autocommit_of_a_healed_session(engine: str, new_server: Any, add_database: Any) -> None:
    """It is on, whatever the server's init_connect does, though the connect sends less for it."""
    server = new_server("mariadb", init_connect="SET autocommit=0")
    alias = add_database(server.django() | {"ENGINE": engine}, alias="database")
    database = Database(alias, server)
    lose(database)
    create("a")
    assert run("SELECT @@autocommit") == [(1,)]
    assert server.execute("SELECT name FROM app_row", database="test") == [("a",)]


def test_connection_that_was_long_in_its_pool_is_asked(new_server: Any, add_database: Any) -> None:
    """A firewall may have forgotten it: past PING_AFTER it is asked before it is handed out."""
    server = new_server("postgresql")
    pool = {"min_size": 1, "max_size": 1, "timeout": 20}
    alias = add_database(server.django("test") | {"OPTIONS": {"pool": pool}}, alias="database")
    with override_settings(DBHEALTH={"PING_TIMEOUT": 1}):
        create("a")
        connections[alias].dbhealth_watch.last_used -= 100
        silent = session_of(connections[alias])
        connections[alias].close()
        wait_for(lambda: connections[alias].pool.get_stats()["pool_available"] == 1)
        os.kill(silent, signal.SIGSTOP)
        rescue = threading.Timer(10, os.kill, [silent, signal.SIGCONT])
        rescue.start()
        try:
            create("b")
            assert session_of(connections[alias]) != silent
            assert rescue.is_alive()
        finally:
            rescue.cancel()
            os.kill(silent, signal.SIGCONT)


def test_pool_takes_no_dead_connection_back(new_server: Any, add_database: Any) -> None:
    """Whoever borrows from Django's pool past the guard gets no connection that it found lost."""
    server = new_server("postgresql")
    options = {"pool": {"min_size": 2, "max_size": 2, "timeout": 20}}
    alias = add_database(server.django() | {"OPTIONS": options}, alias="database")
    connections[alias].ensure_connection()
    pool = connections[alias].pool
    wait_for(lambda: pool.get_stats()["pool_available"] == 1)  # what the guard gets instead
    lose(Database(alias, server))
    create("a")
    connections[alias].close()
    borrowed = [pool.getconn() for _ in range(2)]
    for connection in borrowed:
        connection.execute("SELECT 1")
        pool.putconn(connection)


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_server_that_is_down_while_a_block_begins(
    kind: str, new_server: Any, add_database: Any
) -> None:
    """The block fails in the end, though the error was caught and the server is back."""
    server = new_server(kind)
    add_database(server.django(), alias="database")
    called: list[str] = []
    with pytest.raises(Error), transaction.atomic("database"):
        server.stop()
        with pytest.raises(Error), transaction.atomic("database"):
            transaction.on_commit(lambda: called.append("callback"), using="database")
            create("a")
        assert connections["database"].in_atomic_block
        server.start()
        with pytest.raises(Error):
            create("b")
    assert called == []
    create("c")
    assert server.execute("SELECT name FROM app_row", database="test") == [("c",)]


def test_callbacks_wait_for_their_block(database: Database) -> None:
    """A transaction of a connection_created receiver does not run those of the block it heals."""
    called: list[str] = []

    def receiver(connection: Any, **arguments: Any) -> None:
        if connection.alias == "database":
            with transaction.atomic("database"):
                run("SELECT 1")

    connection_of(database).ensure_connection()
    connection_created.connect(receiver)
    try:
        with pytest.raises(LookupError), transaction.atomic("database"):
            transaction.on_commit(lambda: called.append("callback"), using="database")
            lose(database)
            create("a")
            raise LookupError
    finally:
        connection_created.disconnect(receiver)
    assert (called, rows(database)) == ([], [])


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_the_blocks_own_error_is_not_hidden(kind: str, new_server: Any, add_database: Any) -> None:
    """The server goes away in a transaction: its error is raised, not that of a connect after."""
    server = new_server(kind)
    add_database(server.django(), alias="database")
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create("a")
        server.stop()
        create("b")
    text = str(caught.value)
    assert "Server has gone away" in text or "terminating connection" in text
    server.start()
    create("c")


# Engines of others


def test_backend_with_cursors_of_its_own(database: Database) -> None:
    """A backend that makes its own cursors and closes them in its own way keeps doing so."""
    backend = load_backend(connection_of(database).settings_dict["ENGINE"])
    closed: list[str] = []

    class Cursor(CursorWrapper):
        def close(self) -> None:
            closed.append("closed")
            self.cursor.close()

    class Wrapper(backend.DatabaseWrapper):  # type: ignore[name-defined, misc]
        def make_cursor(self, cursor: Any) -> Cursor:
            return Cursor(cursor, self)

    connection = Wrapper(connections.settings["database"], "database")
    watch_connection(connection)
    cursor = connection.cursor()
    assert isinstance(cursor, Cursor)
    cursor.execute("SELECT 1")
    lose(database, connection)
    cursor.execute("SELECT 2")
    assert cursor.fetchone() == (2,)
    closed.clear()
    cursor.close()
    assert closed == ["closed"]
    connection.close()


def test_copy_in_a_block_is_a_statement(postgresql: Any, add_database: Any) -> None:
    """psycopg's copy() passes Django by; what it wrote in a block is not lost silently."""
    add_database(postgresql.django(), alias="database")
    database = Database("database", postgresql)
    with (
        pytest.raises(OperationalError),
        transaction.atomic("database"),
        transaction.atomic("database"),
        connections["database"].cursor() as cursor,
    ):
        with cursor.copy("COPY app_row (name, number) FROM STDIN") as copy:
            copy.write_row(("copied", 1))
        lose(database)
        cursor.execute("SELECT 1")
    lose(database)
    with connections["database"].cursor() as cursor, cursor.copy("COPY app_row TO STDOUT") as copy:
        assert list(copy.rows()) == []


def test_held_cursors_are_no_result_that_is_read(database: Database) -> None:
    """To mysqlclient's handle both look alike: a loss is healed all the same."""
    connection = connection_of(database)
    with connection.cursor() as held, connection.cursor() as another:
        held.execute("SELECT 1")
        another.execute("SELECT 2")
        create("a")  # MariaDB: INSERT … RETURNING, a result
        lose(database)
        create("b")
    assert rows(database) == ["a", "b"]


def test_log_handler_that_writes_to_the_database(new_server: Any, add_database: Any) -> None:
    """It fails as with plain Django, and does not try again inside each try."""
    server = new_server("mariadb")
    add_database(server.django(), alias="database")
    server.stop()
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.message if hasattr(record, "message") else record.msg)
            with suppress(Error):
                create("record")

    handler = Handler()
    logging.getLogger("django_dbhealth").addHandler(handler)
    try:
        with (
            override_settings(DBHEALTH={"CONNECT_RETRY_TIMEOUT": 6}),
            pytest.raises(OperationalError),
        ):
            create("a")
    finally:
        logging.getLogger("django_dbhealth").removeHandler(handler)
    assert 1 < len(records) < 20


def test_loop_that_is_left_is_no_interruption(database: Database) -> None:
    """break in a loop over a cursor leaves nothing behind to doubt."""
    watch = watch_of(connection_of(database))
    assert watch is not None
    create("a")
    create("b")
    with connection_of(database).cursor() as cursor:
        cursor.execute("SELECT name FROM app_row")
        for _ in cursor:
            break
    assert not watch.interrupted
    assert not watch.in_doubt


def test_cursor_that_others_make_of_our_class(database: Database) -> None:
    """django-debug-toolbar makes its cursors with type(cursor)(…): they work and are healed."""
    connection = connection_of(database)
    with connection.cursor() as cursor:
        made = type(cursor)(cursor.cursor, connection)
        made.execute("SELECT 1")
        lose(database)
        made.execute("SELECT 2")
        assert list(made.fetchall()) == [(2,)]


def test_cursor_stays_closed_with_its_connection(database: Database) -> None:
    """After the program's own close() a held cursor is dead, as in plain Django."""
    connection = connection_of(database)
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    connection.close()
    create("a")
    with pytest.raises(Error):
        cursor.execute("SELECT 2")


def test_connect_that_was_forbidden_leaves_no_limit(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test's blocker keeps healing from its connect: the program's own is not limited then."""
    connection: Any = connection_of(database)
    lose(database)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "connect", lambda: pytest.fail("no connects here"))
        with pytest.raises(pytest.fail.Exception):
            run("SELECT 1")
    assert "connect_timeout" not in connection.get_connection_params()


@pytest.mark.parametrize("engine", ["mysqlclient", "PyMySQL", "psycopg"])
def test_held_cursor_after_healing_has_failed(
    engine: str, new_server: Any, add_database: Any
) -> None:
    """The server was down meanwhile: the cursor is dead, or follows. It never breaks."""
    server = new_server("postgresql" if engine == "psycopg" else "mariadb")
    settings = server.django(transport="tcp")
    if engine == "PyMySQL":
        settings["ENGINE"] = "tests.pymysql_backend"
    connection = connections[add_database(settings)]
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        server.stop()
        for _ in range(2):
            with pytest.raises(Error):
                cursor.execute("SELECT 2")
        server.start()
        cursor.execute("SELECT 3")
        assert list(cursor.fetchall()) == [(3,)]


def test_healed_before_a_cursor_is_made(database: Database) -> None:
    """Making a cursor is a use: a lost connection's would have to be made twice."""
    create("a")
    lost = lose(database)
    with connection_of(database).cursor():
        assert session_of(connection_of(database)) != lost


def test_look_in_vain_does_not_count(postgresql: Any, add_database: Any) -> None:
    """While autocommit is off nothing is healed; so the statement right after it looks again."""
    add_database(postgresql.django(), alias="database")
    database = Database("database", postgresql)
    connection = connection_of(database)
    connection.set_autocommit(False)
    run("SELECT 1")
    connection.commit()
    session = lose(database)
    connection.set_autocommit(True)
    run("SELECT 1")
    assert session_of(connection) != session


def test_autocommit_turned_off_twice(mariadb: Any, add_database: Any) -> None:
    """The second time begins nothing: what has run since the first is not forgotten."""
    add_database(mariadb.django(), alias="database")
    database = Database("database", mariadb)
    connection = connection_of(database)
    connection.set_autocommit(False)
    connection.commit()
    create("a")
    connection.set_autocommit(False)
    lose(database)
    with pytest.raises(OperationalError):
        connection.set_autocommit(True)


def test_asking_for_copy_is_no_statement(postgresql: Any, add_database: Any) -> None:
    """hasattr(cursor, "copy") runs nothing, so the block can still be healed."""
    add_database(postgresql.django(), alias="database")
    with transaction.atomic("database"), connections["database"].cursor() as cursor:
        assert hasattr(cursor, "copy")
        assert not hasattr(cursor, "copy_expert")  # psycopg2's
        lose(Database("database", postgresql))
        cursor.execute("SELECT 1")


def lose_session_state_in_a_statement(database: Database) -> None:
    """Make a temporary table, and leave its connection in the middle of a statement."""

    def interrupt(signum: int, frame: Any) -> None:
        raise TimeoutError

    run(TEMPORARY_TABLE)
    sleep = SLEEP[connection_of(database).vendor].format(3)  # mysqlclient waits for its end

    def send() -> None:
        database.server.wait_until_running(sleep)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)  # type: ignore[arg-type]

    thread = threading.Thread(target=send)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        thread.start()
        with pytest.raises(TimeoutError):
            run(sleep)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, previous)


def test_interrupted_statement_with_session_state(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection left in the middle of a statement is no use: what was on it is told, once."""
    lose_session_state_in_a_statement(database)
    with received() as seen, pytest.raises(Error) as caught:
        create("a")
    assert "temporary table shelf" in caught.value.__notes__[0]
    assert [name for name, _ in seen] == ["lost"]
    [record] = caplog.records
    assert "Lost with it: temporary table shelf." in record.message
    create("b")
    assert rows(database) == ["b"]


def test_session_state_is_not_told_to_a_receiver_alone(database: Database) -> None:
    """The program hears of it, though a receiver makes a query before the error is there."""
    lose_session_state_in_a_statement(database)

    def query(**arguments: Any) -> None:
        run("SELECT 1")

    connection_lost.connect(query)
    try:
        with pytest.raises(Error) as caught:
            create("a")
    finally:
        connection_lost.disconnect(query)
    assert "temporary table shelf" in caught.value.__notes__[0]
    assert rows(database) == []
    create("b")
    assert rows(database) == ["b"]


def test_refused_statement_is_no_sign_of_life(database: Database) -> None:
    """Django sends none in a block that must roll back: the next use looks at the socket again."""
    create("a")
    found = watch_of(connection_of(database))
    assert found is not None
    last_used = found.last_used
    with transaction.atomic("database"):
        transaction.set_rollback(True, "database")
        with pytest.raises(transaction.TransactionManagementError):
            run("SELECT 1")
    assert found.last_used == last_used
