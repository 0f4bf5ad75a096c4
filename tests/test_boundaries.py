"""Boundaries on real servers: what they give back, and what they leave alone."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import signal
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import (
    ThreadSensitiveContext,
    async_to_sync,
    iscoroutinefunction,
    sync_to_async,
)
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.core.signals import request_started
from django.db import Error, IntegrityError, OperationalError, connections
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError, atomic
from django.test import override_settings
from django.utils.connection import ConnectionDoesNotExist

from django_dbhealth import (
    aclose_old_connections,
    close_old_connections,
    connection_boundary,
    connections_released,
)
from tests.app.models import Row
from tests.conftest import register
from tests.servers.base import USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Database

ALIAS = "database"
SESSION_ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}


def wrapper() -> Any:
    return connections[ALIAS]


def execute(sql: str, *params: Any) -> Any:
    with wrapper().cursor() as cursor:
        cursor.execute(sql, params or None)
        return cursor.fetchall() if cursor.description else None


def session_id() -> int:
    return execute(SESSION_ID[wrapper().vendor])[0][0]


def is_open() -> bool:
    return wrapper().connection is not None


def insert(name: str) -> None:
    Row.objects.using(ALIAS).create(name=name)


def stored(database: Database) -> list[str]:
    """Return the rows as a second connection sees them."""
    rows = database.server.execute("SELECT name FROM app_row ORDER BY id", database="rows")
    return [name for (name,) in rows]


def kill_session(database: Database) -> None:
    """End our session from the server's side. Django has not noticed."""
    ours = session_id()
    database.server.kill_connection(ours)
    database.server.wait_until_gone(ours)


def no_sessions(database: Database) -> bool:
    return not database.server.wait_for_sessions(0, USER)


# Every form in which a boundary can be used: each runs `work` inside of one.


def form_with(work: Callable[[], Any]) -> Any:
    with connection_boundary():
        return work()


def form_with_alias(work: Callable[[], Any]) -> Any:
    with connection_boundary(using=ALIAS):
        return work()


def form_with_aliases(work: Callable[[], Any]) -> Any:
    with connection_boundary(using=["sqlite", ALIAS]):
        return work()


def form_function(work: Callable[[], Any]) -> Any:
    @close_old_connections
    def function() -> Any:
        return work()

    return function()


def form_factory(work: Callable[[], Any]) -> Any:
    @connection_boundary(using=ALIAS)
    def function() -> Any:
        return work()

    return function()


class Worker:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work

    @close_old_connections
    def method(self) -> Any:
        return self.work()

    @close_old_connections
    @classmethod
    def outside_classmethod(cls, work: Callable[[], Any]) -> Any:
        return work()

    @classmethod
    @close_old_connections
    def inside_classmethod(cls, work: Callable[[], Any]) -> Any:
        return work()

    @close_old_connections
    @staticmethod
    def static(work: Callable[[], Any]) -> Any:
        return work()

    @close_old_connections
    async def coroutine(self) -> Any:
        return await sync_to_async(self.work)()

    @close_old_connections
    def generator(self) -> Iterator[Any]:
        yield self.work()

    @close_old_connections
    async def async_generator(self) -> Any:
        yield await sync_to_async(self.work)()

    def __call__(self) -> Any:
        return self.work()


def form_method(work: Callable[[], Any]) -> Any:
    return Worker(work).method()


def form_outside_classmethod(work: Callable[[], Any]) -> Any:
    return Worker.outside_classmethod(work)


def form_inside_classmethod(work: Callable[[], Any]) -> Any:
    return Worker.inside_classmethod(work)


def form_static(work: Callable[[], Any]) -> Any:
    return Worker.static(work)


def form_partial(work: Callable[[], Any]) -> Any:
    return close_old_connections(functools.partial(lambda argument: argument(), work))()


def form_callable_object(work: Callable[[], Any]) -> Any:
    return close_old_connections(Worker(work))()


def form_generator(work: Callable[[], Any]) -> Any:
    return list(Worker(work).generator())[0]


def form_generator_return(work: Callable[[], Any]) -> Any:
    @close_old_connections
    def inner() -> Any:
        yield
        return work()

    def outer() -> Any:
        result.append((yield from inner()))

    result: list[Any] = []
    list(outer())
    return result[0]


def form_async_with(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        async with connection_boundary():
            return await sync_to_async(work)()

    return async_to_sync(main)()


def form_coroutine(work: Callable[[], Any]) -> Any:
    @close_old_connections
    async def main() -> Any:
        return await sync_to_async(work)()

    return async_to_sync(main)()


def form_coroutine_method(work: Callable[[], Any]) -> Any:
    return async_to_sync(Worker(work).coroutine)()


def form_coroutine_partial(work: Callable[[], Any]) -> Any:
    async def main(argument: Callable[[], Any]) -> Any:
        return await sync_to_async(argument)()

    return async_to_sync(close_old_connections(functools.partial(main, work)))()


def form_async_generator(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return [item async for item in Worker(work).async_generator()][0]

    return async_to_sync(main)()


FORMS = {name[5:]: form for name, form in list(globals().items()) if name.startswith("form_")}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
def test_gives_back_what_was_opened_inside(form: Any, database: Database) -> None:
    """The connection that the work opened is closed at the end, CONN_MAX_AGE or not."""
    wrapper().settings_dict["CONN_MAX_AGE"] = 600
    inside = form(session_id)
    assert inside
    assert not is_open()
    assert no_sessions(database)


@every_form
def test_leaves_the_callers_connection(form: Any, database: Database) -> None:
    """A connection that was open before is neither replaced nor closed, with CONN_MAX_AGE=0."""
    wrapper().settings_dict["CONN_MAX_AGE"] = 0
    before = session_id()
    assert form(session_id) == before
    assert session_id() == before


@every_form
def test_atomic_block_is_left_alone(form: Any, database: Database) -> None:
    """Inside atomic() nothing is closed, and what the block wrote is there afterwards."""
    with atomic(using=ALIAS):
        insert("before")
        before = session_id()
        assert form(session_id) == before
        insert("after")
    assert stored(database) == ["before", "after"]


@every_form
def test_autocommit_off_is_left_alone(form: Any, database: Database) -> None:
    """With autocommit off nothing is closed, and the commit finds everything."""
    wrapper().set_autocommit(False)
    insert("before")
    form(functools.partial(insert, "inside"))
    wrapper().commit()
    wrapper().set_autocommit(True)
    assert stored(database) == ["before", "inside"]


@every_form
def test_lost_connection_is_found(form: Any, database: Database) -> None:
    """A connection that the server closed is replaced, though no error was recorded on it."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    kill_session(database)
    assert not wrapper().errors_occurred
    form(functools.partial(insert, "inside"))
    assert stored(database) == ["inside"]


@every_form
def test_error_passes_through(form: Any, database: Database) -> None:
    """The work's own error arrives as it is, and the connection is given back all the same."""

    def fail() -> None:
        insert("inside")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        form(fail)
    assert not is_open()
    assert stored(database) == ["inside"]


@every_form
def test_transaction_opened_inside_is_left_alone(form: Any, database: Database) -> None:
    """Autocommit that the work turned off means work that is not committed: it stays open."""

    def begin() -> None:
        wrapper().set_autocommit(False)
        insert("inside")

    form(begin)
    assert is_open()
    wrapper().commit()
    assert stored(database) == ["inside"]


# What a session can carry. Every statement here is MySQL's or PostgreSQL's own.

CARRIED = {
    "mysql": [
        "SELECT GET_LOCK('nightly', 0)",
        "CREATE TEMPORARY TABLE shelf (id int)",
        "SET @cursor = 7",
        "SET SESSION sql_mode = ''",
        "LOCK TABLES app_row READ",
        "PREPARE p FROM 'SELECT 1'",
    ],
    "postgresql": [
        "SELECT pg_advisory_lock(7)",
        "CREATE TEMPORARY TABLE shelf (id int)",
        "SELECT set_config('shop.tenant', 'a', false)",
        "SET statement_timeout = '5s'",
        "LISTEN prices",
        "PREPARE p AS SELECT 1",
        f"SET ROLE {USER}",
    ],
}


def carried() -> list[str]:
    return CARRIED[wrapper().vendor]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("form", [form_with, form_async_with, form_generator])
def test_session_state_survives(form: Any, number: int, database: Database) -> None:
    """What only this session has is still there after a boundary and a released step."""
    if number >= len(carried()):
        return
    statement = carried()[number]

    def work() -> int:
        execute(statement)
        return session_id()

    with connections_released():
        inside = form(work)
        with connections_released():
            pass
    assert session_id() == inside
    close_old_connections()
    assert session_id() == inside


def test_server_side_cursor_survives(database: Database) -> None:
    """The rows that a server-side cursor has not sent yet are not lost."""
    Row.objects.using(ALIAS).bulk_create([Row(name=str(n)) for n in range(30)])
    rows = Row.objects.using(ALIAS).iterator(chunk_size=10)
    first = next(rows)
    before = session_id()
    with connections_released(), connection_boundary():
        close_old_connections()
    assert session_id() == before
    assert len([first, *rows]) == 30


def test_named_cursor_ends_its_hold(database: Database) -> None:
    """Once a server-side cursor was read to its end, the connection can be given back again."""
    with connection_boundary():
        Row.objects.using(ALIAS).create(name="one")
        assert len(list(Row.objects.using(ALIAS).iterator())) == 1
    assert not is_open()


def test_unfinished_result_survives(mariadb: Any, add_database: Any) -> None:
    """An unbuffered result that is being read on the driver's own cursor is not cut off."""
    from MySQLdb.cursors import SSCursor

    connection = connections[add_database(mariadb.django())]
    with connections_released(), connection_boundary():
        connection.ensure_connection()
        cursor = connection.connection.cursor(SSCursor)
        cursor.execute("SELECT seq FROM seq_1_to_50000")
        cursor.fetchone()
        with connections_released():
            close_old_connections()
        assert len(cursor.fetchall()) == 49999


def test_given_back_state_is_no_hold(database: Database) -> None:
    """A lock that was released, a table that was dropped: the connection is free again."""
    if wrapper().vendor == "mysql":
        pairs = [
            ("SELECT GET_LOCK(%s, 0)", "SELECT RELEASE_LOCK(%s)", ["nightly"]),
            ("CREATE TEMPORARY TABLE shelf (id int)", "DROP TABLE shelf", []),
        ]
    else:
        pairs = [
            ("SELECT pg_advisory_lock(%s)", "SELECT pg_advisory_unlock(%s)", [7]),
            ("CREATE TEMPORARY TABLE shelf (id int)", "DROP TABLE shelf", []),
        ]
    for hold, free, params in pairs:
        with connection_boundary():
            execute(hold, *params)
            execute(free, *params)
        assert not is_open()


# Lost, and something was lost with it


def test_loss_of_session_state_is_not_hidden(database: Database) -> None:
    """A boundary leaves a lost connection that held a lock: its next use must fail, once."""
    execute(carried()[0])
    kill_session(database)
    close_old_connections()
    with pytest.raises(OperationalError):
        insert("unlocked")
    close_old_connections()
    insert("told")
    assert stored(database) == ["told"]


def test_loss_in_a_transaction_is_not_hidden(database: Database) -> None:
    """Inside atomic() a lost connection stays lost: the block fails as a whole."""
    with pytest.raises(Error), atomic(using=ALIAS):
        insert("first")
        kill_session(database)
        with connection_boundary():
            close_old_connections()
        insert("second")
    insert("afterwards")
    assert stored(database) == ["afterwards"]


def test_state_on_a_slow_server_is_not_risked(
    new_server: Any, add_database: Any, database: Database
) -> None:
    """A connection that holds a lock is not asked anything: a server that stalls keeps it."""
    server = new_server("mariadb" if wrapper().vendor == "mysql" else "postgresql")
    connection = connections[add_database(server.django("test", transport="tcp"))]
    with connection.cursor() as cursor:
        cursor.execute(carried()[0])
    server.freeze()
    try:
        with override_settings(DBHEALTH={"PING_TIMEOUT": 0.2}), connections_released():
            pass
    finally:
        server.thaw()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 'one'")
        assert cursor.fetchone() == ("one",)


def begin_and_end() -> None:
    with connection_boundary():
        pass


def release() -> None:
    with connections_released():
        pass


moments = pytest.mark.parametrize("at_boundary", [close_old_connections, begin_and_end, release])


@moments
def test_loss_of_state_is_told_after_another_error(at_boundary: Any, database: Database) -> None:
    """An error that was not about the loss has not told of it: the next use must."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    execute(carried()[0])
    with pytest.raises(Error):
        execute("SELECT nonsense")
    kill_session(database)
    at_boundary()
    with pytest.raises(OperationalError):
        execute("SELECT 1")
    execute("SELECT 1")


def test_transaction_is_not_split_after_another_error(database: Database) -> None:
    """Autocommit is off, and an error was not about the loss: what was written is not forgotten."""
    wrapper().set_autocommit(False)
    insert("first")
    with pytest.raises(Error):
        execute("SELECT nonsense")
    kill_dead_transaction(database)
    close_old_connections()
    with pytest.raises(Error):
        insert("second")
    assert stored(database) == []


def kill_dead_transaction(database: Database) -> None:
    """End our session, which PostgreSQL would not let us ask for its number now."""
    handle = wrapper().connection
    ours = handle.thread_id() if wrapper().vendor == "mysql" else handle.info.backend_pid
    database.server.kill_connection(ours)
    database.server.wait_until_gone(ours)


@moments
def test_health_check_does_not_hide_the_loss_of_state(at_boundary: Any, database: Database) -> None:
    """No boundary makes CONN_HEALTH_CHECKS due on a connection that carries something."""
    wrapper().settings_dict.update(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True)
    execute(carried()[0])
    kill_session(database)
    at_boundary()
    with pytest.raises(OperationalError):
        execute("SELECT 1")


def test_dead_connection_with_autocommit_off(database: Database) -> None:
    """It is left to fail once; then it is given up, as Django does."""
    wrapper().set_autocommit(False)
    kill_session(database)
    close_old_connections()
    with pytest.raises(OperationalError):
        insert("lost")
    assert is_open()
    close_old_connections()
    assert not is_open()
    insert("kept")
    assert stored(database) == ["kept"]


def test_driver_error_in_a_raw_transaction(database: Database) -> None:
    """A parameter that cannot be sent ends no statement: the transaction goes on."""
    from psycopg.types.json import Jsonb

    if wrapper().vendor != "postgresql":
        return  # of MySQL's drivers neither tells of a transaction that it began itself
    wrapper().ensure_connection()
    with wrapper().connection.transaction():
        insert("kept")
        with pytest.raises(TypeError), wrapper().cursor() as cursor:
            cursor.execute("SELECT %s", [Jsonb({"a": object()})])
        close_old_connections()
        with connections_released():
            pass
    assert stored(database) == ["kept"]


def test_interrupted_probe_ends_the_connection(
    new_server: Any, add_database: Any, database: Database
) -> None:
    """A time limit that strikes during a probe costs the connection, not the next answer."""

    class TimeLimit(Exception):
        pass

    def strike(signum: int, frame: object) -> None:
        raise TimeLimit

    server = new_server("mariadb" if wrapper().vendor == "mysql" else "postgresql")
    connection = connections[add_database(server.django("test", transport="tcp"))]
    connection.ensure_connection()
    previous = signal.signal(signal.SIGALRM, strike)
    server.freeze()
    try:
        with pytest.raises(TimeLimit):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with connections_released():
                pass
    finally:
        signal.signal(signal.SIGALRM, previous)
        server.thaw()
    close_old_connections()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 'one'")
        assert cursor.fetchone() == ("one",)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg says that nobody closed them
def test_ended_threads_are_not_kept(database: Database) -> None:
    """A boundary does not keep the connections of threads that have ended inside it."""
    kept: list[weakref.ref[Any]] = []

    def work() -> None:
        session_id()
        kept.append(weakref.ref(wrapper()))

    async def main() -> None:
        async with connection_boundary():
            for _ in range(3):
                async with ThreadSensitiveContext():
                    await sync_to_async(work)()

    asyncio.run(main())
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    assert no_sessions(database)


def test_receiver_that_fails_once(database: Database) -> None:
    """A connection_created receiver that raises leaves nothing of the last session behind."""

    def receiver(**kwargs: Any) -> None:
        connection_created.disconnect(receiver)
        raise LookupError

    execute(carried()[0])
    wrapper().close()
    connection_created.connect(receiver)
    with pytest.raises(LookupError):
        insert("not yet")
    with connections_released():
        pass
    assert not is_open()


# close_old_connections(), the function


def test_function_closes_what_is_past_its_age(database: Database) -> None:
    """CONN_MAX_AGE=0 ends at once, 600 does not, None never."""
    for max_age, expected in [(0, False), (600, True), (None, True)]:
        wrapper().close()
        wrapper().settings_dict["CONN_MAX_AGE"] = max_age
        session_id()
        close_old_connections()
        assert is_open() is expected, max_age


def test_boundary_closes_the_callers_connection_past_its_age(database: Database) -> None:
    """A CONN_MAX_AGE above 0 that has run out ends the caller's connection too."""
    wrapper().settings_dict["CONN_MAX_AGE"] = 0.01
    before = session_id()
    time.sleep(0.02)
    with connection_boundary():
        assert session_id() != before


def test_function_closes_what_is_idle_past_the_limit(database: Database) -> None:
    """A connection idle for SERVER_IDLE_TIMEOUT is closed, though it still answers."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    session_id()
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 60}):
        close_old_connections()
        assert is_open()
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 0.01}):
        time.sleep(0.02)
        close_old_connections()
    assert not is_open()


def test_idle_limit_that_nobody_set(database: Database) -> None:
    """Without a SERVER_IDLE_TIMEOUT it is 300 s on MySQL and MariaDB, none on PostgreSQL."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    for seconds, expected in [(290, True), (301, wrapper().vendor == "postgresql")]:
        session_id()
        wrapper().dbhealth_watch.last_used -= seconds
        close_old_connections()
        assert is_open() is expected, seconds


def test_recorded_error_on_a_live_connection(database: Database) -> None:
    """After an error a connection that answers is kept, and no longer suspected."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    before = session_id()
    with pytest.raises(Error):
        execute("SELECT nonsense")
    assert wrapper().errors_occurred
    close_old_connections()
    assert not wrapper().errors_occurred
    assert session_id() == before


def test_statement_interrupted_by_an_exception(database: Database) -> None:
    """A connection left in the middle of a statement by a time limit is given up."""

    class TimeLimit(Exception):
        pass

    def interrupt(execute: Any, sql: str, params: Any, many: bool, context: Any) -> None:
        raise TimeLimit

    before = session_id()
    with pytest.raises(TimeLimit), wrapper().execute_wrapper(interrupt):
        insert("never")
    close_old_connections()
    with connection_boundary():
        insert("afterwards")
    assert stored(database) == ["afterwards"]
    assert before


def test_request_signal_receiver(database: Database) -> None:
    """It can be connected to request_started in place of Django's own."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    kill_session(database)
    request_started.connect(close_old_connections, dispatch_uid="test")
    try:
        request_started.send(sender=None)
    finally:
        request_started.disconnect(dispatch_uid="test")
    assert not is_open()


def test_health_check_is_due_again(database: Database) -> None:
    """As Django's own, it makes CONN_HEALTH_CHECKS look at the connection at its next use."""
    wrapper().settings_dict.update(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True)
    session_id()
    close_old_connections()
    assert wrapper().health_check_done is False


@every_form
def test_health_check_in_a_failed_transaction(form: Any, database: Database) -> None:
    """CONN_HEALTH_CHECKS does not cut a transaction that a savepoint will mend."""
    wrapper().settings_dict["CONN_HEALTH_CHECKS"] = True

    def fail() -> None:
        execute("INSERT INTO app_row (id, name, number) VALUES (1000000, 'twice', 0)")
        execute("INSERT INTO app_row (id, name, number) VALUES (1000000, 'twice', 0)")

    with atomic(using=ALIAS):
        insert("before")
        before = session_id()
        with pytest.raises(IntegrityError), atomic(using=ALIAS):
            form(fail)
        insert("after")
        assert session_id() == before
    assert stored(database) == ["before", "after"]


def test_arguments_of_the_function() -> None:
    """It takes no alias; the error names what does."""
    with pytest.raises(TypeError, match=r"no argument using.*connection_boundary\(using"):
        close_old_connections(using="default")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="'default' is not a function"):
        close_old_connections("default")  # type: ignore[type-var]


# Decorators


def test_class_is_refused() -> None:
    """A class cannot be decorated; the error says what can."""
    with pytest.raises(TypeError, match=r"Worker.*decorate the method that does the work"):
        close_old_connections(Worker)
    with pytest.raises(TypeError, match="decorate"):
        connection_boundary()(Worker)
    with pytest.raises(TypeError, match="decorate"):
        connections_released()(property(lambda self: 1))  # type: ignore[type-var]


@pytest.mark.parametrize("factory", [connection_boundary, connections_released])
def test_factory_without_parentheses(factory: Any) -> None:
    """The slip that is likeliest, because @close_old_connections has none."""
    with pytest.raises(TypeError, match=rf"parentheses: write @{factory.__name__}\(\)"):

        @factory
        def work() -> None: ...


def test_decorated_functions_keep_their_kind() -> None:
    """A coroutine function stays one, a generator function too; names and docs are kept."""
    assert iscoroutinefunction(Worker.coroutine)
    assert inspect.iscoroutinefunction(Worker.coroutine)
    assert inspect.isgeneratorfunction(Worker.generator)
    assert inspect.isasyncgenfunction(Worker.async_generator)
    assert Worker.method.__name__ == "method"
    assert Worker.method.__wrapped__  # type: ignore[attr-defined]


def test_calling_a_generator_function_does_nothing_yet(database: Database) -> None:
    """The boundary is around the iteration, not around the call."""
    wrapper().settings_dict["CONN_MAX_AGE"] = 0.001
    before = session_id()
    time.sleep(0.01)
    generator = Worker(session_id).generator()
    assert session_id() == before
    assert next(generator) != before
    generator.close()


def test_generator_is_transparent() -> None:
    """send(), throw(), close() and the return value reach the decorated generator."""
    seen: list[Any] = []

    @close_old_connections
    def echo() -> Any:
        try:
            while True:
                try:
                    seen.append((yield len(seen)))
                except KeyError as error:
                    seen.append(error)
                if len(seen) == 3:
                    return "done"
        finally:
            seen.append("closed")

    generator = echo()
    assert next(generator) == 0
    assert generator.send("a") == 1
    error = KeyError("b")
    assert generator.throw(error) == 2
    with pytest.raises(StopIteration, match="done"):
        generator.send("c")
    assert seen == ["a", error, "c", "closed"]
    other = echo()
    seen.clear()
    next(other)
    other.close()
    assert seen == ["closed"]


def test_async_generator_is_transparent() -> None:
    """asend(), athrow() and aclose() reach the decorated async generator."""
    seen: list[Any] = []

    @close_old_connections
    async def echo() -> Any:
        try:
            while True:
                try:
                    seen.append((yield len(seen)))
                except KeyError as error:
                    seen.append(error)
        finally:
            seen.append("closed")

    async def main() -> None:
        generator = echo()
        assert await anext(generator) == 0
        assert await generator.asend("a") == 1
        assert await generator.athrow(KeyError("b")) == 2
        await generator.aclose()

    asyncio.run(main())
    assert [str(item) for item in seen] == ["a", "'b'", "closed"]


def test_half_read_generator(database: Database) -> None:
    """A generator that is never read to its end neither keeps nor takes a connection."""

    @close_old_connections
    def numbers() -> Iterator[int]:
        session_id()
        yield from range(10)

    with connection_boundary():
        half_read = numbers()
        assert next(half_read) == 0
        wrapper().close()
        consumers = session_id()
        half_read.close()
        assert session_id() == consumers
        forgotten = numbers()
        next(forgotten)
        assert session_id() == consumers
    assert not is_open()
    del forgotten
    gc.collect()
    assert no_sessions(database)


def test_boundary_left_inside_a_suspended_generator(database: Database) -> None:
    """A `with` that a generator suspends does not take what is opened around it for ever."""

    def suspended() -> Iterator[None]:
        with connection_boundary():
            yield

    with connection_boundary():
        generator = suspended()
        next(generator)
        session_id()
    assert not is_open()
    generator.close()
    with connection_boundary():
        session_id()
    assert not is_open()


def test_nested_boundaries(database: Database) -> None:
    """The inner one leaves the connection of the outer one, which gives it back."""
    with connection_boundary():
        outer = session_id()
        with connection_boundary():
            assert session_id() == outer
        assert session_id() == outer
        wrapper().close()
        with connection_boundary():
            session_id()
        assert not is_open()
        session_id()
    assert not is_open()


def test_boundary_is_entered_once() -> None:
    """One object is for one `with` at a time; one after the other it can be used again."""
    boundary = connection_boundary()
    with boundary, pytest.raises(RuntimeError, match="make one for each"):
        boundary.__enter__()
    with boundary:
        pass


# Aliases


@pytest.mark.parametrize("boundary", [connection_boundary, connections_released])
def test_unknown_alias(boundary: Any) -> None:
    """An alias that does not exist is named when the boundary is entered, not before."""
    unknown = boundary(using="nope")
    with pytest.raises(ConnectionDoesNotExist, match=r"'nope' doesn't exist. DATABASES has: .*def"):
        unknown.__enter__()
    with boundary():
        pass

    @boundary(using=["default", "nope"])
    async def main() -> None: ...

    with pytest.raises(ConnectionDoesNotExist, match="nope"):
        asyncio.run(main())


def test_other_aliases_are_left_alone(database: Database) -> None:
    """using= limits what is given back, released, or closed as lost."""
    with connection_boundary(using="sqlite"):
        before = session_id()
    assert session_id() == before
    with connections_released(using="default"):
        assert session_id() == before
    with connections_released(using=ALIAS):
        assert not is_open()


def test_one_server_down_does_not_keep_the_others_open(
    database: Database, new_server: Any, add_database: Any
) -> None:
    """With one of two servers killed both aliases are given back, whichever comes first."""
    kind = "mariadb" if wrapper().vendor == "mysql" else "postgresql"
    other = new_server(kind)
    alias = add_database(other.django("test", transport="tcp"))
    with connection_boundary():
        connections[alias].ensure_connection()
        session_id()
        other.kill()
    assert not is_open()
    assert connections[alias].connection is None
    assert no_sessions(database)


def test_error_of_one_alias_does_not_keep_the_others_open(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is not the database's is raised, after every alias had its turn."""
    with pytest.raises(AssertionError, match="refused"), connection_boundary():
        session_id()
        connections["default"].ensure_connection()

        def refuse() -> None:
            raise AssertionError("refused")

        # A test blocker does this; nothing real raises here on purpose.
        monkeypatch.setattr(connections["default"], "close", refuse)
    monkeypatch.undo()
    assert not is_open()


def test_handle_closed_behind_django(database: Database) -> None:
    """A handle that somebody closed directly is dropped without an error."""
    session_id()
    wrapper().connection.close()
    close_old_connections()
    assert not is_open()
    with connections_released():
        session_id()
        wrapper().connection.close()
    assert not is_open()


def test_sqlite_and_dummy_are_left_alone(add_database: Any, tmp_path: Path) -> None:
    """An embedded database has no connection to give back, a dummy none at all."""
    register("dummy", {"ENGINE": "django.db.backends.dummy"})
    connections["dummy"]
    file = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "db.sqlite3"}
    connection = connections[add_database(file, CONN_MAX_AGE=0)]
    try:
        connection.ensure_connection()
        handle = connection.connection
        with connections_released(), connection_boundary():
            connections["dummy"]
        assert connection.connection is handle
        close_old_connections()  # as Django's own
        assert connection.connection is None
    finally:
        del connections["dummy"]
        del connections.settings["dummy"]


def test_shared_connection_is_left_alone(database: Database) -> None:
    """A connection that a live-server test shares between threads is not closed."""
    with connection_boundary():
        before = session_id()
        wrapper().inc_thread_sharing()
    try:
        with connections_released():
            assert session_id() == before
    finally:
        wrapper().dec_thread_sharing()


def test_frozen_server_does_not_hang(
    new_server: Any, add_database: Any, database: Database
) -> None:
    """A boundary over a connection to a server that hangs ends after PING_TIMEOUT."""
    server = new_server("mariadb" if wrapper().vendor == "mysql" else "postgresql")
    alias = add_database(server.django("test", transport="tcp"), CONN_MAX_AGE=None)
    connections[alias].ensure_connection()
    server.freeze()
    try:
        config = {"PING_TIMEOUT": 60, "DATABASES": {alias: {"PING_TIMEOUT": 0.5}}}
        with override_settings(DBHEALTH=config):
            began = time.monotonic()
            with connections_released(using=alias):
                assert connections[alias].connection is None
            assert 0.4 < time.monotonic() - began < 30
    finally:
        server.thaw()


def test_app_not_installed(database: Database) -> None:
    """Without the app nobody watches for session state, so the boundary refuses, and says so."""
    with (
        override_settings(INSTALLED_APPS=["tests.app"]),
        pytest.raises(ImproperlyConfigured, match="INSTALLED_APPS"),
        connection_boundary(),
    ):
        pass
    with (
        override_settings(INSTALLED_APPS=["tests.app"]),
        pytest.raises(ImproperlyConfigured, match="INSTALLED_APPS"),
    ):
        close_old_connections()


# connections_released()


@contextmanager
def nothing_held(database: Database) -> Iterator[None]:
    assert no_sessions(database)
    yield


def test_released_holds_nothing(database: Database) -> None:
    """It closes what was open, and at the end what was opened meanwhile."""
    wrapper().settings_dict["CONN_MAX_AGE"] = None
    session_id()
    with connections_released():
        assert no_sessions(database)
        session_id()
    assert no_sessions(database)


def test_released_as_a_decorator(database: Database) -> None:
    """Around a function, a coroutine function, a generator."""

    @connections_released()
    def work() -> bool:
        return no_sessions(database)

    @connections_released(using=ALIAS)
    async def awork() -> bool:
        return await sync_to_async(no_sessions)(database)

    @connections_released()
    def steps() -> Iterator[bool]:
        yield no_sessions(database)

    for function in (work, async_to_sync(awork), lambda: list(steps())):
        session_id()
        assert function()
        assert not is_open()


def test_released_in_the_callers_transaction(database: Database) -> None:
    """A transaction that was open before the enclosing boundary is the caller's: left alone."""
    with atomic(using=ALIAS):
        insert("caller")
        before = session_id()
        with connection_boundary(), connections_released():
            assert session_id() == before
        with connections_released():
            assert session_id() == before
    assert stored(database) == ["caller"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_released_in_a_transaction_of_the_same_code(database: Database, asynchronous: bool) -> None:
    """A transaction begun since is a mistake: the error says so, and nothing is closed."""

    async def release() -> None:
        async with connections_released():
            pass

    def work() -> None:
        if asynchronous:
            async_to_sync(release)()
        else:
            with connections_released():
                pass

    with (
        connection_boundary(),
        pytest.raises(TransactionManagementError, match="'database'.*End the atomic"),
        atomic(using=ALIAS),
    ):
        insert("rolled back")
        work()
    with atomic(using=ALIAS):
        insert("kept")
        with (
            connection_boundary(),
            atomic(using=ALIAS),
            pytest.raises(TransactionManagementError),
        ):
            work()
    assert stored(database) == ["kept"]


def test_released_with_autocommit_turned_off_since(database: Database) -> None:
    """Autocommit that the same code turned off is such a transaction too."""
    with connection_boundary():
        wrapper().set_autocommit(False)
        insert("kept")
        with pytest.raises(TransactionManagementError), connections_released():
            pass
        wrapper().commit()
        wrapper().set_autocommit(True)
    assert stored(database) == ["kept"]


def test_project_without_autocommit(database: Database) -> None:
    """With AUTOCOMMIT=False there is always a transaction: left alone, and no error."""
    wrapper().settings_dict["AUTOCOMMIT"] = False
    with connection_boundary():
        insert("one")
        with connections_released():
            insert("two")
        wrapper().commit()
    assert stored(database) == ["one", "two"]


# Async


def test_event_loop_is_refused(database: Database) -> None:
    """On a running event loop the plain forms raise and name the async ones."""

    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="await aclose_old_connections"):
            close_old_connections()
        with pytest.raises(SynchronousOnlyOperation, match="async with"):
            connection_boundary().__enter__()
        with pytest.raises(SynchronousOnlyOperation, match="async with"):
            connections_released().__enter__()

    asyncio.run(main())


def test_aclose_acts_on_the_thread_of_the_orm(database: Database) -> None:
    """It finds the lost connection where the ORM has it, not on the event loop."""

    async def main() -> None:
        orm = await sync_to_async(wrapper)()
        orm.settings_dict["CONN_MAX_AGE"] = None
        await sync_to_async(kill_session)(database)
        assert orm.connection is not None
        await aclose_old_connections()
        assert orm.connection is None
        await sync_to_async(insert)("afterwards")
        await sync_to_async(orm.close)()

    asyncio.run(main())
    assert stored(database) == ["afterwards"]


def test_concurrent_tasks(database: Database) -> None:
    """Fifty tasks, each with its boundary: every row is there, no connection is left."""

    @close_old_connections
    async def task(number: int) -> None:
        for part in range(3):
            await Row.objects.using(ALIAS).acreate(name=f"{number:02}.{part}")
            await asyncio.sleep(0.001)

    async def main() -> None:
        await asyncio.gather(*map(task, range(50)))

    asyncio.run(main())
    assert sorted(stored(database)) == [f"{n:02}.{part}" for n in range(50) for part in range(3)]
    assert no_sessions(database)


def test_task_leaves_another_tasks_connection(database: Database) -> None:
    """A task that ends gives back what it opened, not what another one did."""

    async def main() -> None:
        opened, ended = asyncio.Event(), asyncio.Event()

        @close_old_connections
        async def owner() -> tuple[int, int]:
            before = await sync_to_async(session_id)()
            opened.set()
            await ended.wait()
            return before, await sync_to_async(session_id)()

        @close_old_connections
        async def guest() -> None:
            await opened.wait()
            await sync_to_async(session_id)()

        running = asyncio.create_task(owner())
        await asyncio.create_task(guest())
        ended.set()
        before, after = await running
        assert before == after

    asyncio.run(main())
    assert no_sessions(database)


def test_cancellation_cannot_skip_the_end(database: Database) -> None:
    """A cancelled task gives its connection back, cancelled twice too."""

    async def main() -> None:
        opened = asyncio.Event()

        @close_old_connections
        async def work() -> None:
            await sync_to_async(session_id)()
            opened.set()
            await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await opened.wait()
        blocker = asyncio.create_task(sync_to_async(time.sleep)(0.2))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        task.cancel()  # while the end waits for the ORM's thread
        with pytest.raises(asyncio.CancelledError):
            await task
        await blocker

    asyncio.run(main())
    assert no_sessions(database)


def test_cancelled_while_beginning(database: Database) -> None:
    """A task cancelled before its boundary has begun leaves no boundary behind."""

    async def main() -> None:
        @close_old_connections
        async def work() -> None:
            raise AssertionError("never runs")

        over = threading.Event()
        blocker = asyncio.create_task(sync_to_async(over.wait)(30))
        await asyncio.sleep(0.05)
        task = asyncio.create_task(work())
        await asyncio.sleep(0.05)
        task.cancel()
        over.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await blocker

    asyncio.run(main())
    with connection_boundary():
        session_id()
    assert not is_open()


def test_abandoned_async_generator(database: Database) -> None:
    """An async generator left by `break` gives its connection back when it is closed."""

    @close_old_connections
    async def rows() -> Any:
        yield await sync_to_async(session_id)()
        yield 2

    async def main() -> None:
        async for _ in rows():
            break
        gc.collect()

    asyncio.run(main())
    assert no_sessions(database)


# Threads


def test_threads_have_boundaries_of_their_own(database: Database) -> None:
    """A boundary acts on its own thread: another's connection is neither seen nor closed."""
    before = session_id()
    seen: list[bool] = []

    @close_old_connections
    def work() -> None:
        seen.append(session_id() != before)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 5
    assert session_id() == before
    database.server.wait_for_sessions(1, USER)


def test_boundary_does_not_reach_into_worker_threads(database: Database) -> None:
    """asyncio.to_thread() copies the boundary, not the thread: each closes its own."""

    async def main() -> None:
        async with connection_boundary():
            await sync_to_async(session_id)()
            inner = await asyncio.to_thread(close_old_connections(session_id))
            assert inner

    asyncio.run(main())
    assert no_sessions(database)


def test_threads_that_are_not_the_orms(database: Database) -> None:
    """With thread_sensitive=False the boundary is put around what the thread does."""

    async def main() -> None:
        work = sync_to_async(close_old_connections(session_id), thread_sensitive=False)
        ids = await asyncio.gather(*(work() for _ in range(5)))
        assert len(set(ids)) == 5
        await sync_to_async(database.server.wait_for_sessions)(0, USER)

    asyncio.run(main())


def test_thread_of_a_request(database: Database) -> None:
    """Under ASGI each request has a thread of its own: its boundaries act there, cancelled too."""

    async def request(over: asyncio.Event) -> None:
        async with ThreadSensitiveContext():
            async with connection_boundary():
                opened.append(await sync_to_async(session_id)())
                if len(opened) == 3:
                    both.set()
                await over.wait()
            await aclose_old_connections()
            assert not await sync_to_async(is_open)()

    opened: list[int] = []
    both = asyncio.Event()

    async def main() -> None:
        over, never = asyncio.Event(), asyncio.Event()
        requests = [asyncio.create_task(request(each)) for each in (over, over, never)]
        await both.wait()
        assert len(set(opened)) == 3
        over.set()
        requests[2].cancel()
        ends = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(each) for each in ends] == [type(None), type(None), asyncio.CancelledError]
        await sync_to_async(database.server.wait_for_sessions)(0, USER)

    asyncio.run(main())
