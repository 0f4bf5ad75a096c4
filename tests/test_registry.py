"""open_connections(): every open connection of the process, and who opened it where."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import sysconfig
import threading
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import django
import pytest
from django.db import connections, transaction
from django.test import override_settings

from django_dbhealth import open_connections
from django_dbhealth.registry import MANY_FILES, _kinds, _learn_kind
from tests.app.models import Row
from tests.servers.base import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_dbhealth import OpenConnection
    from tests.conftest import Database

ROOT = Path(__file__).resolve().parent.parent


def next_line() -> str:
    """Return the place of the line after the one that calls this."""
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + 1}"


def opened() -> list[OpenConnection]:
    """Return the test's: async code of other tests may have left some, in a thread of its own."""
    return [each for each in open_connections() if each.alias == "database"]


def count() -> int:
    return Row.objects.using("database").count()


def run(sql: str) -> None:
    with connections["database"].cursor() as cursor:
        cursor.execute(sql)


def code_in(file: Path | str, source: str) -> Callable[..., object]:
    """Return the function `call` that stands in another file, which need not exist."""
    namespace: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), namespace)
    call: Callable[..., object] = namespace["call"]
    return call


# What a thread does. Not in this file, or a line of the project's would be below all that it calls.
IN_THE_THREAD = """
def call(work, ready, over, close):
    work()
    ready.set()
    over.wait(10)
    close()
"""


@contextmanager
def in_a_thread(work: Callable[[], object], name: str | None = None) -> Iterator[None]:
    """Do some work in a thread that holds its connection until the block ends."""
    ready, over = threading.Event(), threading.Event()
    target = code_in("<frozen thread>", IN_THE_THREAD)
    arguments = (work, ready, over, connections.close_all)
    thread = threading.Thread(target=target, args=arguments, name=name)
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        over.set()
        thread.join()


# What is told


def test_one_connection(database: Database) -> None:
    """It is there with all figures, from its first query until it is closed."""
    assert opened() == []
    place = next_line()
    Row.objects.using("database").count()
    [found] = opened()
    assert found.opened_at == place
    assert (found.alias, found.thread_name) == ("database", "MainThread")
    assert found.thread_id == threading.get_ident()
    assert 0 <= found.idle_seconds <= found.age_seconds < 5
    connections["database"].close()
    assert opened() == []


def test_figures_grow_and_a_query_ends_idleness(database: Database) -> None:
    count()
    [first] = opened()
    wait_for(lambda: opened()[0].idle_seconds > first.idle_seconds + 0.02)
    [idle] = opened()
    began = monotonic()
    count()
    [used] = opened()
    assert first.age_seconds < idle.age_seconds < used.age_seconds
    assert used.idle_seconds < monotonic() - began


def test_in_transaction(database: Database) -> None:
    """An atomic block, autocommit turned off, and a transaction of raw SQL are transactions."""
    connection = connections["database"]
    count()
    assert not opened()[0].in_transaction
    with transaction.atomic("database"):
        assert opened()[0].in_transaction
    connection.set_autocommit(False)
    assert opened()[0].in_transaction
    connection.set_autocommit(True)
    run("BEGIN")
    assert opened()[0].in_transaction
    run("COMMIT")
    assert not opened()[0].in_transaction


def test_threads(database: Database) -> None:
    """Those of other threads are there, by the threads' names, the oldest first."""
    count()
    with in_a_thread(count, "importer"), in_a_thread(count, "mailer"):
        assert [each.thread_name for each in opened()] == ["MainThread", "importer", "mailer"]
        assert len({each.thread_id for each in opened()}) == 3
    assert [each.thread_name for each in opened()] == ["MainThread"]


@pytest.mark.parametrize("checks_health", [False, True])
def test_healed_connection(database: Database, checks_health: bool) -> None:
    """It has another age, and the place of the one that was lost: the program opened that."""
    place = next_line()
    Row.objects.using("database").count()
    for session in database.server.sessions():
        database.server.kill_connection(session.id)
        database.server.wait_until_gone(session.id)
    connections["database"].health_check_enabled = checks_health
    connections["database"].health_check_done = False
    began = monotonic()
    count()
    [healed] = opened()
    assert healed.opened_at == place
    assert healed.age_seconds <= monotonic() - began
    connections["database"].close()
    place = next_line()
    Row.objects.using("database").count()
    [again] = opened()
    assert again.opened_at == place


def test_refused_connection_is_none(new_server: Any, add_database: Any) -> None:
    server = new_server("mariadb")
    add_database(server.django(), alias="database")
    server.stop()
    with pytest.raises(django.db.OperationalError):
        count()
    assert opened() == []


def test_forgotten_connection(database: Database) -> None:
    """Nothing is kept alive by being on the list."""
    count()
    watch = weakref.ref(connections["database"].dbhealth_watch)  # type: ignore[attr-defined]
    handle: Any = connections["database"].connection  # psycopg would warn that it was not closed
    del connections["database"]
    gc.collect()
    assert opened() == []
    assert watch() is None
    handle.close()


def test_pool_lends(postgresql: Any, add_database: Any) -> None:
    """Of a pool, what is lent is there, and what it keeps is not."""
    alias = add_database(postgresql.django(), alias="database", OPTIONS={"pool": {"min_size": 2}})
    count()
    assert len(opened()) == 1
    connections[alias].close()
    assert opened() == []


def test_what_nobody_guards(database: Database) -> None:
    """SQLite's and those with the guard turned off are not known."""
    connections["sqlite"].ensure_connection()
    with override_settings(DBHEALTH={"GUARD": False}):
        count()
    assert [each for each in open_connections() if each.alias in ("sqlite", "database")] == []
    connections["database"].close()
    del connections["database"]


def test_listing_while_threads_open_and_close(database: Database) -> None:
    """It never fails, and in the end nothing is left."""

    def open_and_close() -> None:
        for _ in range(25):
            count()
            connections["database"].close()
            del connections["database"]

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(len(opened()))
    assert 0 < max(seen) <= 4
    assert opened() == []


FORK = """
import os, sys
import django
django.setup()
from django.db import connection
from django_dbhealth import open_connections

connection.ensure_connection()
[before] = open_connections()
child = os.fork()
if not child:
    inherited = open_connections()
    other = connection.copy()
    other.ensure_connection()
    own = open_connections()
    os._exit(0 if (inherited, len(own)) == ([], 1) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
[after] = open_connections()
assert after.opened_at == before.opened_at
"""


def test_forked_child(database: Database) -> None:
    """Its parent's connections are none of its own."""
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.job_settings",
        "DATABASE_URL": database.server.url("rows"),
    }
    subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, env={**os.environ, **environment}, check=True
    )


# Where it was opened


SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
DJANGO = Path(django.__file__).parent


def from_file(file: Path | str, function: Callable[[], object]) -> Callable[[], object]:
    """Return what calls the function from line 2 of another file."""
    return partial(code_in(file, "def call(function):\n    return function()"), function)


# Django's own code alone: no line of this file is below it.
DJANGOS = Row.objects.using("database").count

PROJECT = Path("/srv/shop/orders.py")
LIBRARY = SITE_PACKAGES / "rest_framework" / "views.py"
CONTRIB = DJANGO / "contrib" / "sessions" / "backends" / "db.py"


@pytest.mark.parametrize(
    ("files", "best"),
    [
        ([PROJECT, DJANGO / "db" / "models" / "query.py"], PROJECT),
        ([PROJECT, LIBRARY, CONTRIB], PROJECT),
        ([LIBRARY, PROJECT, "/srv/shop/models.py"], "/srv/shop/models.py"),
        ([LIBRARY, CONTRIB], LIBRARY),
        (["/srv/shop/manage.py", CONTRIB], CONTRIB),
        ([Path(sysconfig.get_path("scripts")) / "rq", LIBRARY], LIBRARY),
        (["/srv/shop/manage.py"], "/srv/shop/manage.py"),
        (["<console>", CONTRIB], "<console>"),
        (["<stdin>"], "<stdin>"),
        (["<frozen runpy>"], None),
        ([], None),
    ],
)
def test_place(database: Database, files: list[Path | str], best: Path | str | None) -> None:
    """The project's innermost line counts, else a library's, else Django's outside its ORM."""
    function: Callable[[], object] = DJANGOS
    for file in reversed(files):
        function = from_file(file, function)
    with in_a_thread(function):
        [found] = opened()
    assert found.opened_at == (f"{best}:2" if best else "unknown")


def test_many_files() -> None:
    """A notebook gives each of its cells a name of its own: not all are remembered."""
    for number in range(MANY_FILES + 10):
        _learn_kind(f"<cell {number}>")
    assert len(_kinds) <= MANY_FILES
