"""A forked child forgets its parent's connections, without a byte to the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import empty
from tests.served import served
from tests.servers.base import USER

ROOT = Path(__file__).resolve().parent.parent

# A child does what `actions` says, and ends with status 0 if it met no surprise.
BEGIN = """
import gc, json, os, sys, threading, warnings
import django
from django.conf import settings
from django.db import connection, connections, transaction

database, app, options = json.loads(sys.argv[1])
if options.get("psycopg2"):
    sys.modules["psycopg"] = None  # Django then takes psycopg2
if options.get("collect"):
    os.register_at_fork(after_in_child=gc.collect)  # another library's, called before ours
settings.configure(
    DATABASES={"default": database},
    DBHEALTH=options.get("DBHEALTH", {}),
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django_dbhealth", "tests.app"] if app else ["tests.app"],
    USE_TZ=True,
)
django.setup()
from tests.app.models import Row

ID = "SELECT CONNECTION_ID()" if connection.vendor == "mysql" else "SELECT pg_backend_pid()"
PAUSE = "SELECT SLEEP(%s)" if connection.vendor == "mysql" else "SELECT pg_sleep(%s)"

def execute(sql, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchone()[0]

def ends():
    pass

def exits():
    sys.exit(0)  # unwinds the blocks that the parent is in

def closes():
    connection.close()
    connections.close_all()

def collects():
    del connections["default"]
    gc.collect()

def queries():
    assert execute(ID) != mine
    with transaction.atomic():
        assert not Row.objects.filter(name="parent").exists()
        Row.objects.create(name="child")
    connection.close()

actions = [ends, closes, collects, queries, exits]

def fork(action):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        action()
        status = 0
    except Exception:
        import traceback
        traceback.print_exc()
        status = 1
    os._exit(status)

def fork_50_times():
    for action in actions * 10:
        status = fork(action)
        assert status == 0, (action, status)
        assert execute(ID) == mine, action
"""

IN_A_ROW = """
mine = execute(ID)
fork_50_times()
with transaction.atomic():
    Row.objects.create(name="parent")
    fork_50_times()
    assert Row.objects.filter(name="parent").count() == 1
assert Row.objects.filter(name="parent").count() == 1
assert Row.objects.filter(name="child").count() == 20
"""

CONFIGURATIONS = [
    pytest.param("mariadb", "django.db.backends.mysql", {}, id="mysqlclient"),
    pytest.param("mariadb", "tests.pymysql_backend", {}, id="pymysql"),
    pytest.param("postgresql", "django.db.backends.postgresql", {}, id="psycopg"),
    pytest.param("postgresql", "django.db.backends.postgresql", {"psycopg2": True}, id="psycopg2"),
]
every_driver = pytest.mark.parametrize(("kind", "engine", "options"), CONFIGURATIONS)


@pytest.fixture
def run_script(request: pytest.FixtureRequest, add_database: Any) -> Any:
    """Run a script in a process of its own, on an empty table; return what it said."""

    def run(
        text: str, kind: str, settings: dict[str, Any], *, app: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        server = request.getfixturevalue(kind)
        add_database(server.django(), alias="rows")
        server.execute("DELETE FROM app_row", database="test")
        arguments = json.dumps([{**server.django(), **settings}, app, options])
        warnings = ["-W", "error", "-W", FORK_WITH_THREADS]
        return subprocess.run(
            [sys.executable, *warnings, "-c", BEGIN + text, arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


FORK_WITH_THREADS = "ignore:This process:DeprecationWarning"  # Python 3.12's


def passed(run: subprocess.CompletedProcess[str]) -> bool:
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return True


@every_driver
def test_50_children_in_a_row(run_script: Any, kind: str, engine: str, options: Any) -> None:
    """The parent keeps its session and its transaction, whatever the children do."""
    assert passed(run_script(IN_A_ROW, kind, {"ENGINE": engine}, **options))


def test_without_the_app(run_script: Any) -> None:
    """It is needed: one child that closes ends its parent's session."""
    text = "mine = execute(ID); fork(closes); execute(ID)"
    run = run_script(text, "mariadb", {}, app=False)
    assert run.returncode == 1
    assert "OperationalError: (20" in run.stderr


def test_without_the_guard(run_script: Any) -> None:
    """It needs nobody who watches."""
    text = "mine = execute(ID)\nfor action in actions: fork(action); assert execute(ID) == mine"
    assert passed(run_script(text, "mariadb", {}, DBHEALTH={"GUARD": False}))


NOT_A_BYTE = """
def received():
    with connection.cursor() as cursor:
        cursor.execute("SHOW SESSION STATUS LIKE 'Bytes_received'")
        return int(cursor.fetchone()[1])

mine = execute(ID)
first, second = received(), received()
for action in actions:
    fork(action)
third = received()
assert third - second == second - first, (first, second, third)
"""


@pytest.mark.parametrize("engine", ["django.db.backends.mysql", "tests.pymysql_backend"])
def test_not_a_byte(run_script: Any, engine: str) -> None:
    """The server hears nothing of the children on the parent's session."""
    assert passed(run_script(NOT_A_BYTE, "mariadb", {"ENGINE": engine}))


DAEMON = """
def closes_descriptors():
    os.closerange(3, 1000)
    with transaction.atomic():
        mine = execute(ID)
        Row.objects.create(name="a")
    time.sleep(0.01)
    assert execute(ID) == mine
    assert execute(ID) == mine

import time
mine = execute(ID)
KILL = "KILL %s" if connection.vendor == "mysql" else "SELECT pg_terminate_backend(%s)"
other = connection.copy()
with other.cursor() as cursor:
    cursor.execute(KILL, [mine])
other.close()
from django_dbhealth.watch import watch_of
watch = watch_of(connection)
until = time.monotonic() + 20
while not watch.has_hung_up(()) and time.monotonic() < until:
    time.sleep(0.01)
assert execute(ID) != mine  # healed, and the lost one not let go yet
assert fork(closes_descriptors) == 0
assert Row.objects.count() == 1
"""


@every_driver
def test_child_that_closes_all_descriptors(
    run_script: Any, kind: str, engine: str, options: Any
) -> None:
    """As a daemon does: its new connection is not closed with the handle its parent had lost."""
    assert passed(run_script(DAEMON, kind, {"ENGINE": engine}, **options))


# What the child finds

STATE = """
from django_dbhealth import open_connections
from django_dbhealth.watch import watch_of

def finds():
    assert connection.connection is None and not connection.in_atomic_block
    assert open_connections() == []
    transaction.on_commit(lambda: ran.append("child"))
    with transaction.atomic():
        Row.objects.create(name="child")
    assert ran == ["child"], ran
    assert connection.get_autocommit()
    assert len(open_connections()) == 1
    state = watch_of(connection).session_state()
    assert state == (), state

ran = []
mine = execute(ID)
connection.set_autocommit(False)
assert fork(finds) == 0
connection.rollback()
connection.set_autocommit(True)
with connection.cursor() as cursor:
    cursor.execute("CREATE TEMPORARY TABLE shelf (id int)")
with transaction.atomic(), transaction.atomic():
    transaction.on_commit(lambda: ran.append("parent"))
    assert fork(finds) == 0
assert ran == ["parent"], ran
execute("SELECT COUNT(*) FROM shelf")
assert watch_of(connection).session_state()
assert len(open_connections()) == 1
"""


CALLBACKS = """
ran = []
child = None
with transaction.atomic():
    transaction.on_commit(lambda: ran.append(os.getpid()))
    Row.objects.create(name="parent")
    child = os.fork()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ran == [os.getpid()], ran
else:
    Row.objects.create(name="child")
    os._exit(0 if ran == [] else 1)
"""


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_callbacks_run_in_the_parent_alone(run_script: Any, kind: str) -> None:
    """A child that leaves its parent's block and goes on does not run the block's callbacks."""
    assert passed(run_script(CALLBACKS, kind, {}))


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_what_the_child_finds(run_script: Any, kind: str) -> None:
    """No transaction, no callbacks, no session state: nothing of its parent's."""
    assert passed(run_script(STATE, kind, {}))


GRANDCHILD = """
def has_a_child():
    mine = execute(ID)
    for action in (ends, closes, collects, queries):
        assert fork(action) == 0
        assert execute(ID) == mine

mine = execute(ID)
assert fork(has_a_child) == 0
assert execute(ID) == mine
"""


def test_grandchild(run_script: Any) -> None:
    assert passed(run_script(GRANDCHILD, "mariadb", {}))


# Threads

THREADS = """
ready, over = threading.Barrier(4), threading.Event()
failed = []

def use():
    try:
        theirs = execute(ID)
        ready.wait(10)
        while not over.is_set():
            execute(PAUSE, 0.005)
            assert execute(ID) == theirs
    except BaseException as error:
        failed.append(error)

def forks():
    global mine
    mine = execute(ID)
    ready.wait(10)
    for action in (ends, closes, collects, queries) * 5:
        assert fork(action) == 0
        assert execute(ID) == mine

def work():
    try:
        forks()
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=use) for _ in range(3)]
for thread in threads:
    thread.start()
forking = threading.Thread(target=work)
forking.start()
forking.join()
over.set()
for thread in threads:
    thread.join()
assert failed == [], failed
"""


@every_driver
def test_fork_in_a_thread(run_script: Any, kind: str, engine: str, options: Any) -> None:
    """While other threads are in a query: theirs are forgotten too, and nobody is disturbed."""
    assert passed(run_script(THREADS, kind, {"ENGINE": engine}, collect=True, **options))


# Pools

POOL = """
def returns_and_borrows():
    for _ in range(3):
        assert execute(ID) not in parents  # of a pool of its own
        connection.close()
    connection.close_pool()

parents = [execute(ID)]
mine = parents[0]

def other():
    parents.append(execute(ID))

thread = threading.Thread(target=other)
thread.start()
thread.join()  # one of the two is idle in the pool
for action in (ends, closes, collects, returns_and_borrows, exits) * 3:
    assert fork(action) == 0, action
    assert execute(ID) == mine

taken, over = threading.Event(), threading.Event()

def take_the_lock():
    with connection.pool._lock:
        taken.set()
        over.wait(20)

thread = threading.Thread(target=take_the_lock)
thread.start()
taken.wait(20)
assert fork(exits) == 0  # and does not wait for that thread, which it does not have
over.set()
thread.join()
connection.close()
seen = set()
for _ in range(4):
    seen.add(execute(ID))
    connection.close()
assert seen <= set(parents), (seen, parents)
connection.close_pool()
"""


def test_pool(run_script: Any) -> None:
    """The child has a pool of its own, and the parent's goes on with its connections."""
    options = {"pool": {"min_size": 1, "max_size": 2}}
    assert passed(run_script(POOL, "postgresql", {"OPTIONS": options}))


# What is exempt, and what is not ours

SQLITE = """
with connection.cursor() as cursor:
    cursor.execute("CREATE TABLE shelf (id int)")

def reads():
    execute("SELECT COUNT(*) FROM shelf")

assert fork(reads) == 0
execute("SELECT COUNT(*) FROM shelf")
"""


def test_sqlite(run_script: Any) -> None:
    """A database in memory is the child's too."""
    settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:", "OPTIONS": {}}
    assert passed(run_script(SQLITE, "mariadb", settings))


REUSED = """
mine = execute(ID)
handle = connection.connection
descriptor = handle.fileno()
reader, writer = os.pipe()
os.dup2(writer, descriptor)  # the library has given it up, and the number is somebody else's now

def writes():
    assert connection.connection is None
    os.write(descriptor, b"still mine")

assert fork(writes) == 0
assert os.read(reader, 100) == b"still mine"
os._exit(0)
"""


def test_number_that_is_used_again(run_script: Any) -> None:
    """A descriptor that was a lost connection's is left to whom it belongs now."""
    assert passed(run_script(REUSED, "mariadb", {}))


MULTIPROCESSING = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def theirs(number):
    return execute(ID)

mine = execute(ID)
context = multiprocessing.get_context("fork")
with transaction.atomic():
    Row.objects.create(name="parent")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        ids = set(executor.map(theirs, range(10)))
    assert execute(ID) == mine and mine not in ids, (mine, ids)
"""


def test_multiprocessing(run_script: Any) -> None:
    """Its workers query on connections of their own."""
    assert passed(run_script(MULTIPROCESSING, "mariadb", {}))


def test_preloaded_application(mariadb: Any, add_database: Any) -> None:
    """The master of gunicorn keeps its session, whatever its workers close."""
    add_database(mariadb.django(), alias="rows")
    empty(mariadb)
    with served("gunicorn sync", {"default": mariadb.django()}, PRELOADED) as site:
        [masters] = mariadb.wait_for_sessions(1, USER)
        for _ in range(20):
            assert site.get("/count/default/").status == 200
        [left] = mariadb.wait_for_sessions(1, USER)
        assert left.id == masters.id


PRELOADED = "--config=python:tests.preloaded"

TEST_CASES = """
from django.test import TestCase
from tests.app.models import Row

class Case:
    def test_row(self):
        Row.objects.create(name="row")
        self.assertEqual(Row.objects.count(), 1)

class One(Case, TestCase):
    pass

class Two(Case, TestCase):
    pass
"""


def test_parallel_test_runner(postgresql: Any, tmp_path: Path) -> None:
    """Django's own forks with the connections of the test databases open."""
    (tmp_path / "test_rows.py").write_text(TEST_CASES)
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.job_settings",
        "DATABASE_URL": postgresql.url("parallel"),  # the suite has test_test itself
        "PYTHONPATH": str(ROOT),
    }
    options = ["--parallel=2", "--noinput", "--verbosity=0"]
    run = subprocess.run(
        [sys.executable, "-m", "django", "test", *options, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Ran 2 tests" in run.stderr
