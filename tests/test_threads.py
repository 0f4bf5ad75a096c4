"""A thread that ends gives its connections back, then and there."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import OperationalError, connections, transaction
from django.test import override_settings

from tests.app.models import Row
from tests.outcomes import session_id
from tests.servers.base import USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Database

ROOT = Path(__file__).resolve().parent.parent
ALIAS = "database"


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """Let nothing be closed because it was garbage."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count() -> int:
    return Row.objects.using(ALIAS).count()


def run_in_a_thread(work: Callable[[], object], **details: Any) -> None:
    thread = threading.Thread(target=work, **details)
    thread.start()
    thread.join()


def nobody_is_left(database: Database) -> bool:
    return not database.server.wait_for_sessions(0, USER)


@contextmanager
def other_thread(work: Callable[[], object]) -> Iterator[None]:
    """Have another thread do some work, and end when the block does."""
    ready, over = threading.Event(), threading.Event()

    def run() -> None:
        work()
        ready.set()
        over.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        over.set()
        thread.join()


# What Django says of a query before the apps are ready.
EARLY = "ignore:Accessing the database during app initialization"

# In a process of its own. Setup is called where the script says so.
BEGIN = """
import gc, json, os, sys, threading
import django
from django.conf import settings
from django.db import connection, connections

gc.disable()
database, app = json.loads(sys.argv[1])
settings.configure(
    DATABASES={"default": database},
    INSTALLED_APPS=["django_dbhealth"] if app else [],
    USE_TZ=True,
)

def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone() == (1,)

def end_threads(number):
    for _ in range(number):
        thread = threading.Thread(target=query)
        thread.start()
        thread.join()

def wait():
    print("done", flush=True)
    sys.stdin.readline()
    sys.stdout.flush()
    os._exit(0)
"""


@contextmanager
def script(text: str, settings: dict[str, Any], *, app: bool = True) -> Iterator[None]:
    """Run a script; the block begins when it calls `wait()`."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-W", EARLY, "-c", text, json.dumps([settings, app])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first = process.stdout.readline()  # type: ignore[union-attr]
        try:
            if first == "done\n":
                yield
        finally:
            _, errors = process.communicate("\n", timeout=30)
        assert (first, process.returncode, errors) == ("done\n", 0, "")


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_200_threads(new_server: Any, kind: str) -> None:
    """Nothing is left of 200 threads; without the app all connections are."""
    server = new_server(kind, max_connections=250)
    text = BEGIN + "django.setup(); end_threads(200); wait()"
    with script(text, server.django()):
        server.wait_for_sessions(0, USER)
    with script(text, server.django(), app=False):
        server.wait_for_sessions(200, USER)


def test_pool_gets_its_slots_back(postgresql: Any, add_database: Any) -> None:
    """Twenty threads have ended; the next one gets one of the two slots."""
    add_database(postgresql.django(), alias=ALIAS, OPTIONS={"pool": {"min_size": 0, "max_size": 2}})
    for _ in range(20):
        run_in_a_thread(count)
    answers: list[int] = []
    run_in_a_thread(lambda: answers.append(count()))
    assert answers == [0]
    pool: Any = connections[ALIAS].pool  # type: ignore[attr-defined]
    assert pool.get_stats().get("requests_errors", 0) == 0


# Before the app was there

BEFORE_SETUP = """
end_threads(3)
django.setup()
wait()
"""

WHILE_LOADING = """
import types
models = types.ModuleType("early.models")
sys.modules["early"], sys.modules["early.models"] = types.ModuleType("early"), models
from django.apps import AppConfig

class Early(AppConfig):
    name, path, default = "early", ".", True

    def import_models(self):
        end_threads(3)

sys.modules["early.apps"] = apps = types.ModuleType("early.apps")
apps.Early = Early
settings.INSTALLED_APPS.append("early.apps.Early")
django.setup()
wait()
"""


@pytest.mark.parametrize("text", [BEFORE_SETUP, WHILE_LOADING])
def test_threads_that_ended_before_ready(database: Database, text: str) -> None:
    """Before django.setup(), and while the apps were loading."""
    with script(BEGIN + text, database.server.django("rows")):
        assert nobody_is_left(database)


ALIVE = """
mine = connection
query()
handle = mine.connection
ready, over, answers = threading.Event(), threading.Event(), []

def work():
    query()
    ready.set()
    over.wait(10)
    answers.append(query())

thread = threading.Thread(target=work)
thread.start()
ready.wait(10)
django.setup()
over.set()
thread.join()
assert answers == [True], answers
assert connection.connection is handle and query()
wait()
"""


def test_threads_that_are_alive_keep_theirs(database: Database) -> None:
    """What is in use when the app is loaded stays in use."""
    with script(BEGIN + ALIVE, database.server.django("rows")):
        pass


# Whatever the thread was doing


def in_a_transaction() -> None:
    transaction.atomic(ALIAS).__enter__()
    Row.objects.using(ALIAS).create(name="never committed")


def with_autocommit_off() -> None:
    connections[ALIAS].set_autocommit(False)
    Row.objects.using(ALIAS).create(name="never committed")


def with_session_state() -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE shelf (id int)")


def in_an_iterator() -> None:
    Row.objects.using(ALIAS).bulk_create(Row(name=str(each)) for each in range(10))
    rows = Row.objects.using(ALIAS).iterator(chunk_size=2)
    next(rows)


def in_an_error() -> None:
    count()
    raise ArithmeticError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "work", [in_a_transaction, with_autocommit_off, with_session_state, in_an_iterator, in_an_error]
)
def test_end_of_a_thread(database: Database, work: Callable[[], None]) -> None:
    """Its connection is closed, whatever was open on it: nobody can use it any more."""
    run_in_a_thread(work)
    assert nobody_is_left(database)
    assert not Row.objects.using(ALIAS).filter(name="never committed").exists()


def test_lost_connection(database: Database) -> None:
    """A thread that ends with a dead connection says nothing."""

    def work() -> None:
        ours = session_id(connections[ALIAS])
        database.server.kill_connection(ours)
        database.server.wait_until_gone(ours)

    run_in_a_thread(work)
    assert nobody_is_left(database)


def test_log_of_the_end(database: Database) -> None:
    """What the end logs has the thread's name, and leaves no thread behind in threading's list."""
    names: list[str] = []

    def close() -> None:
        names.append(threading.current_thread().name)
        raise OperationalError

    def work() -> None:
        connection = connections[ALIAS]
        connection.ensure_connection()
        kept.append(connection.connection)
        connection._close = close  # type: ignore[method-assign]

    kept: list[Any] = []
    before = threading.enumerate()
    run_in_a_thread(work, name="importer")
    assert names == ["importer"]
    assert threading.enumerate() == before
    kept[0].close()


def test_nothing_is_left_in_memory(database: Database) -> None:
    """Not even 64 bytes, which CPython 3.11 takes for each look for a running event loop."""
    run_in_a_thread(count)
    tracemalloc.start(1)
    try:
        for _ in range(20):
            run_in_a_thread(count)
        gc.collect()
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    looks = tracemalloc.Filter(True, "*/django/utils/asyncio.py")
    assert snapshot.filter_traces([looks]).statistics("lineno") == []


def test_several_aliases(
    database: Database, postgresql: Any, add_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be closed does not keep the others open."""
    add_database(postgresql.django(), alias="broken")

    def work() -> None:
        for alias in (ALIAS, "broken", "sqlite"):
            connections[alias].ensure_connection()
        # Django does not close a SQLite in memory; Python warns of one that is never closed.
        kept.extend(connections[alias].connection for alias in ("broken", "sqlite"))
        connections["broken"]._close = fail  # type: ignore[method-assign]

    def fail() -> None:
        raise ArithmeticError

    kept: list[Any] = []
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    run_in_a_thread(work)
    assert [each.exc_type for each in unraisable] == [ArithmeticError]
    for handle in kept:
        handle.close()
    assert nobody_is_left(database)


def test_without_the_guard(database: Database) -> None:
    """It needs nobody who watches."""
    with override_settings(DBHEALTH={"GUARD": False}):
        run_in_a_thread(count)
    assert nobody_is_left(database)


# What stays


def test_other_threads_keep_theirs(database: Database) -> None:
    """A thread's end touches no connection of another one."""
    mine = session_id(connections[ALIAS])
    with other_thread(count):
        run_in_a_thread(count)
        database.server.wait_for_sessions(2, USER)
    database.server.wait_for_sessions(1, USER)
    assert session_id(connections[ALIAS]) == mine


def test_shared_connection_stays(database: Database) -> None:
    """A LiveServerTestCase's threads use, and open, the connection of the test."""
    mine = connections[ALIAS]
    mine.inc_thread_sharing()

    def work() -> None:
        connections[ALIAS] = mine
        count()

    try:
        run_in_a_thread(work)
        (session,) = database.server.sessions(USER)
        assert session_id(mine) == session.id
    finally:
        mine.dec_thread_sharing()


def test_own_connection_that_is_shared_stays(database: Database) -> None:
    """A thread has lent its connection, and ends first."""
    lent: list[Any] = []

    def work() -> None:
        connections[ALIAS].inc_thread_sharing()
        count()
        lent.append(connections[ALIAS])

    run_in_a_thread(work)
    (session,) = database.server.sessions(USER)
    assert session_id(lent[0]) == session.id
    lent[0].close()


def test_forgotten_connection(database: Database) -> None:
    """What the program has dropped is not kept alive until the thread ends."""
    count()
    dropped = weakref.ref(connections[ALIAS])
    connections[ALIAS].close()
    del connections[ALIAS]
    gc.collect()
    assert dropped() is None


# Whose threads


def test_executor(database: Database) -> None:
    """The threads of an executor keep theirs until it is shut down."""
    with ThreadPoolExecutor(3) as executor:
        barrier = threading.Barrier(3)
        list(executor.map(lambda _: (barrier.wait(10), count()), range(3)))
        database.server.wait_for_sessions(3, USER)
    assert nobody_is_left(database)


def test_asyncio(database: Database) -> None:
    """The loop's own threads end with it, and a request's with the request."""

    async def request() -> None:
        async with ThreadSensitiveContext():  # as around each request that is served under ASGI
            await sync_to_async(count)()
        await sync_to_async(database.server.wait_for_sessions)(0, USER)

    async def main() -> None:
        await request()
        await asyncio.to_thread(count)
        await sync_to_async(count, thread_sensitive=False)()

    asyncio.run(main())
    assert nobody_is_left(database)


EXIT = """
import warnings
warnings.simplefilter("ignore", ResourceWarning)  # psycopg's, of connections that are still open
django.setup()
query()
ready = threading.Barrier(3)

def work():
    query()
    ready.wait(10)
    while True:
        query()

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
ready.wait(10)
print("done", flush=True)
sys.exit()
"""


def test_end_of_the_process(database: Database) -> None:
    """Daemon threads that are in a query when the process ends cause no trouble."""
    with script(BEGIN + EXIT, database.server.django("rows")):
        pass
    assert nobody_is_left(database)


GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, time
"""
GREENLETS = """
query()
handle = connection.connection
django.setup()
assert connection.connection is handle

def work():
    query()
    time.sleep(0)
    assert query()

greenlets = [gevent.spawn(work) for _ in range(20)]
gevent.joinall(greenlets, raise_error=True)
gevent.sleep(0)  # the hub sees to the last one
assert query()
wait()
"""


@pytest.mark.parametrize("engine", ["django.db.backends.mysql", "tests.pymysql_backend"])
def test_greenlets(mariadb: Any, engine: str) -> None:
    """With gevent a greenlet is a thread: twenty have ended, the main one goes on."""
    mariadb.create_database("rows")
    settings = {**mariadb.django("rows", "tcp"), "ENGINE": engine}
    with script(GEVENT + BEGIN + GREENLETS, settings):
        mariadb.wait_for_sessions(1, USER)


def test_greenlets_with_a_pool(postgresql: Any) -> None:
    """Twenty greenlets share two slots."""
    settings = {**postgresql.django(), "OPTIONS": {"pool": {"min_size": 0, "max_size": 3}}}
    with script(GEVENT + BEGIN + GREENLETS, settings):
        pass
