"""What a use of the database meets after a loss: the table of the guard, cell by cell.

Each cell is looked at from a second connection: which rows are there, and how often.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.db import Error, connections
from django.db.backends.signals import connection_created
from django.db.utils import DEFAULT_DB_ALIAS
from django.http import HttpResponse
from django.test import AsyncRequestFactory, RequestFactory, override_settings
from django.urls import path

from tests.app.models import Row
from tests.outcomes import (
    INSERT,
    MARIADB,
    POSTGRESQL,
    Batches,
    Case,
    Cell,
    Services,
    Steps,
    Uses,
    in_a_thread,
    session_id,
)
from tests.servers.base import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

    Pause = Callable[[], None]

ROOT = Path(__file__).resolve().parent.parent

healed = Uses()


# Healed: nothing is lost with the session


@healed()
def orm_query(case: Case) -> Steps:
    case.add("before")
    yield
    assert [row.name for row in case.objects.all()] == ["before"]


@healed()
def save(case: Case) -> Steps:
    case.add("before")
    yield
    Row(name="after").save(using=case.alias)
    assert case.rows() == ["before", "after"]


@healed()
def save_again(case: Case) -> Steps:
    row = case.objects.create(name="before")
    yield
    row.name = "after"
    row.save()
    assert case.rows() == ["after"]


@healed()
def bulk_create(case: Case) -> Steps:
    case.add("before")
    yield
    case.objects.bulk_create([Row(name=name) for name in "abc"], batch_size=2)
    assert case.rows() == ["before", "a", "b", "c"]


@healed()
def get_or_create(case: Case) -> Steps:
    case.add("before")
    yield
    assert not case.objects.get_or_create(name="before")[1]
    assert case.objects.get_or_create(name="after")[1]
    assert case.rows() == ["before", "after"]


@healed()
def raw_cursor(case: Case) -> Steps:
    case.add("before")
    yield
    with case.connection.cursor() as cursor:
        cursor.execute(INSERT, ["after"])
        cursor.execute("SELECT name FROM app_row ORDER BY id")
        assert [name for (name,) in cursor.fetchall()] == ["before", "after"]


@healed()
def held_cursor_execute(case: Case) -> Steps:
    with case.connection.cursor() as cursor:
        cursor.execute(INSERT, ["before"])
        yield
        cursor.execute(INSERT, ["after"])
        assert cursor.rowcount == 1
        cursor.execute("SELECT name FROM app_row ORDER BY id")
        assert [name for (name,) in cursor] == ["before", "after"] == case.rows()


@healed()
def held_cursor_executemany(case: Case) -> Steps:
    with case.connection.cursor() as cursor:
        cursor.execute(INSERT, ["before"])
        yield
        cursor.executemany(INSERT, [["a"], ["b"]])
        assert cursor.rowcount == 2
    assert case.rows() == ["before", "a", "b"]


ADD_ROW = {
    "mysql": "CREATE OR REPLACE PROCEDURE {0}.add_row(name VARCHAR(9))"
    " INSERT INTO {0}.app_row (name, number) VALUES (name, 0)",
    "postgresql": "CREATE OR REPLACE FUNCTION {0}.add_row(name text) RETURNS int LANGUAGE sql"
    " SECURITY DEFINER AS 'INSERT INTO {0}.app_row (name, number) VALUES ($1, 0) RETURNING 1'",
}


@healed()
def held_cursor_callproc(case: Case) -> Steps:
    case.service.execute(ADD_ROW[case.vendor].format(case.schema))
    with case.connection.cursor() as cursor:
        cursor.callproc("add_row", ["before"])
        yield
        cursor.callproc("add_row", ["after"])
    assert case.rows() == ["before", "after"]


# Healed: a transaction in which no statement has run


@healed(callbacks=0)
@healed("on-commit", callbacks=1)
@healed("durable", callbacks=0, durable=True)
@healed("durable-on-commit", callbacks=1, durable=True)
def atomic(case: Case, callbacks: int, **options: Any) -> Steps:
    case.add("before")
    with case.atomic(**options):
        if callbacks:
            case.on_commit()
        yield
        case.add("after")
        assert case.rows() == ["before"]  # a transaction it is
        case.add("after")
        assert case.callbacks == 0
    assert case.rows() == ["before", "after", "after"]
    assert case.callbacks == callbacks


@healed()
def atomic_rolled_back(case: Case) -> Steps:
    """What the program undoes itself is undone in the new session too."""
    case.add("before")
    with suppress(ZeroDivisionError), case.atomic():
        case.on_commit()
        yield
        case.add("after")
        raise ZeroDivisionError
    assert case.rows() == ["before"]
    assert case.callbacks == 0


@healed()
def atomic_held_cursor(case: Case) -> Steps:
    case.add("before")
    with case.atomic(), case.connection.cursor() as cursor:
        case.on_commit()
        yield
        cursor.execute(INSERT, ["after"])
        assert case.rows() == ["before"]
    assert case.rows() == ["before", "after"]
    assert case.callbacks == 1


@healed()
def select_for_update_first(case: Case) -> Steps:
    case.add("stock")
    with case.atomic():
        case.on_commit()
        yield
        row = case.objects.select_for_update().get()
        row.name = "sold"
        row.save()
        assert case.rows() == ["stock"]
    assert case.rows() == ["sold"]
    assert case.callbacks == 1


@healed(callbacks=0)
@healed("on-commit", callbacks=2)
def savepoint_first(case: Case, callbacks: int) -> Steps:
    """The first statement after the loss is the SAVEPOINT of an inner block."""
    case.add("before")
    with case.atomic():
        if callbacks:
            case.on_commit()
        yield
        with case.atomic():
            case.add("inner")
            if callbacks:
                case.on_commit()
        assert case.rows() == ["before"]
    assert case.rows() == ["before", "inner"]
    assert case.callbacks == callbacks


@healed(callbacks=0)
@healed("on-commit", callbacks=2)
@healed("without-savepoint", callbacks=0, savepoint=False)
@healed("without-savepoint-on-commit", callbacks=2, savepoint=False)
def nested(case: Case, callbacks: int, **options: Any) -> Steps:
    """The inner block was entered before the loss, its SAVEPOINT sent."""
    case.add("before")
    with case.atomic():
        if callbacks:
            case.on_commit()
        with case.atomic(**options):
            if callbacks:
                case.on_commit()
            yield
            case.add("inner")
        case.add("outer")
        assert case.rows() == ["before"]
    assert case.rows() == ["before", "inner", "outer"]
    assert case.callbacks == callbacks


@healed()
def nested_select_for_update_first(case: Case) -> Steps:
    case.add("stock")
    with case.atomic(), case.atomic():
        case.on_commit()
        yield
        case.objects.select_for_update().get()
        case.add("after")
    assert case.rows() == ["stock", "after"]
    assert case.callbacks == 1


@healed()
def nested_rolled_back(case: Case) -> Steps:
    """The savepoints of the new session are those of the old one: undone is the inner block."""
    case.add("before")
    with case.atomic():
        case.on_commit()
        with case.atomic():
            with suppress(ZeroDivisionError), case.atomic():
                case.on_commit()
                yield
                case.add("undone")
                raise ZeroDivisionError
            case.add("middle")
        case.add("outer")
    assert case.rows() == ["before", "middle", "outer"]
    assert case.callbacks == 1


@healed()
def after_commit(case: Case) -> Steps:
    """Between COMMIT and SET autocommit=1: committed is committed."""

    def work(pause: Pause) -> None:
        connection = case.connection
        commit = connection._commit

        # On the wire the two follow each other at once: no event of the server's tells when.
        def commit_and_pause() -> None:
            commit()
            del connection._commit
            pause()

        connection._commit = commit_and_pause
        with case.atomic():
            case.on_commit()
            case.add("committed")
        assert case.callbacks == 1
        assert case.rows() == ["committed"]
        case.add("after")
        assert case.rows() == ["committed", "after"]

    yield from in_a_thread(case, work)


# Healed: in requests

VIEWS: dict[str, Callable[..., Any]] = {}


def view(request: Any, alias: str) -> Any:
    return VIEWS[alias](request)


async def async_view(request: Any, alias: str) -> Any:
    return await VIEWS[alias](request)


urlpatterns = [path("async/<alias>/", async_view), path("<alias>/", view)]


@pytest.fixture(scope="module", autouse=True)
def _urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["testserver"]):
        yield


def answer(case: Case, handler: WSGIHandler, answering: Callable[[Any], None]) -> None:
    """Let the handler answer a request as a WSGI server does."""

    def answered(request: Any) -> HttpResponse:
        answering(request)
        return HttpResponse("done")

    VIEWS[case.alias] = answered
    environ = RequestFactory().get(f"/{case.alias}/").environ
    with closing(handler(environ, lambda *args: None)) as response:
        assert (response.status_code, response.content) == (200, b"done")


@healed(settings={"CONN_MAX_AGE": None})
def atomic_requests(case: Case) -> Steps:
    settings = connections.settings[case.alias]
    settings["ATOMIC_REQUESTS"] = True

    def work(pause: Pause) -> None:
        def answering(request: Any) -> None:
            settings["ATOMIC_REQUESTS"] = False  # the requests of other cells have their own
            case.on_commit()
            pause()
            case.add("after")
            assert case.rows() == []

        answer(case, WSGIHandler(), answering)
        assert case.callbacks == 1
        assert case.rows() == ["after"]

    yield from in_a_thread(case, work)


SET_SESSION = {"mysql": "SET SESSION sql_mode = ''", "postgresql": "SET statement_timeout = '9s'"}


def set_session(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A middleware that sets something in the sessions of its requests."""

    def middleware(request: Any) -> Any:
        alias = request.path.strip("/")
        with connections[alias].cursor() as cursor:
            cursor.execute(SET_SESSION[connections[alias].vendor])
        return get_response(request)

    return middleware


@healed(settings={"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True})
def set_session_in_an_earlier_request(case: Case) -> Steps:
    def work(pause: Pause) -> None:
        with override_settings(MIDDLEWARE=[f"{__name__}.set_session"]):
            handler = WSGIHandler()
        answer(case, handler, lambda request: case.add("before"))
        pause()
        answer(case, WSGIHandler(), lambda request: case.add("after"))
        assert case.rows() == ["before", "after"]

    yield from in_a_thread(case, work)


@healed()
def in_an_async_view(case: Case) -> Steps:
    def work(pause: Pause) -> None:
        async def answering(request: Any) -> HttpResponse:
            await case.objects.acreate(name="before")
            pause()
            await case.objects.acreate(name="after")
            return HttpResponse("done")

        VIEWS[case.alias] = answering
        assert asyncio.run(answer_async(f"/async/{case.alias}/")) == [200]
        assert case.rows() == ["before", "after"]

    yield from in_a_thread(case, work)


async def answer_async(url: str) -> list[int]:
    """Let Django answer a request as an ASGI server does; return the status."""
    messages = [{"type": "http.request", "body": b""}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    statuses = []

    async def send(message: dict[str, Any]) -> None:
        if "status" in message:
            statuses.append(message["status"])

    await ASGIHandler()(AsyncRequestFactory().get(url).scope, receive, send)
    return statuses


# Healed: elsewhere than in the main thread


@healed()
def in_another_thread(case: Case) -> Steps:
    def work(pause: Pause) -> None:
        case.add("before")
        pause()
        case.add("after")
        assert case.rows() == ["before", "after"]

    yield from in_a_thread(case, work)


@healed()
def through_sync_to_async(case: Case) -> Steps:
    async def main(pause: Pause) -> None:
        await sync_to_async(case.add)("before")
        pause()
        await sync_to_async(case.add)("after")

    yield from in_a_thread(case, lambda pause: asyncio.run(main(pause)))
    assert case.rows() == ["before", "after"]


GEVENT = """\
from gevent import monkey; monkey.patch_all()
import json, sys
import django, gevent
from django.conf import settings
from django.db import connection
from django.db.backends.signals import connection_created
from gevent.event import Event

settings.configure(
    DATABASES={"default": json.loads(sys.argv[1])},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django_dbhealth", "tests.app"],
    USE_TZ=True,
)
django.setup()
from tests.app.models import Row

connects = []
connection_created.connect(lambda **kwargs: connects.append(kwargs), weak=False)

def work(name):
    Row.objects.create(name=f"{name} before")
    lost.wait()
    Row.objects.create(name=f"{name} after")
    connection.close()

lost = Event()
greenlets = [gevent.spawn(work, name) for name in ("one", "two")]
while len(connects) < 2 or Row.objects.count() < 2:
    gevent.sleep(0.01)
connection.close()
print("ready", flush=True)
sys.stdin.readline()
connects.clear()
lost.set()
gevent.joinall(greenlets, raise_error=True)
print(len(connects))
"""


@healed(reconnects=None)
def gevent(case: Case) -> Steps:
    with subprocess.Popen(
        [sys.executable, "-c", GEVENT, json.dumps(connections.settings[case.alias])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
        yield
        output = process.communicate("\n", timeout=30)[0]
    assert process.returncode == 0
    assert output == "2\n"  # each greenlet has connected again
    assert sorted(case.rows()) == ["one after", "one before", "two after", "two before"]


# Healed: what only looks like session state

ASKED = {"mysql": "SELECT @@lock_wait_timeout", "postgresql": "SHOW lock_timeout"}


@healed(configurations=MARIADB, session={"lock_wait_timeout": 77}, value=77)
@healed("options", configurations=(POSTGRESQL,), session={"lock_timeout": 77}, value="77ms")
def init_command(case: Case, value: Any) -> Steps:
    assert case.execute(ASKED[case.vendor]) == value
    yield
    assert case.execute(ASKED[case.vendor]) == value


@healed(configurations=MARIADB, sql="SET SESSION lock_wait_timeout = 77", value=77)
@healed("pg", configurations=(POSTGRESQL,), sql="SET lock_timeout = 77", value="77ms")
def connection_created_receiver(case: Case, sql: str, value: Any) -> Steps:
    def receiver(connection: Any, **kwargs: Any) -> None:
        if connection.alias == case.alias:
            with connection.cursor() as cursor:
                cursor.execute(sql)

    connection_created.connect(receiver)
    assert case.execute(ASKED[case.vendor]) == value
    yield
    assert case.execute(ASKED[case.vendor]) == value


@healed(configurations=(POSTGRESQL,))
def set_local(case: Case) -> Steps:
    with case.atomic():
        case.execute("SET LOCAL lock_timeout = 77")
        case.add("before")
    yield
    case.add("after")
    assert case.rows() == ["before", "after"]


@healed(configurations=MARIADB)
def foreign_key_checks_put_back(case: Case) -> Steps:
    with case.connection.constraint_checks_disabled():
        case.add("before")
    yield
    case.add("after")
    assert case.execute("SELECT @@foreign_key_checks") == 1
    assert case.rows() == ["before", "after"]


@healed(configurations=MARIADB)
@healed("pg", configurations=(POSTGRESQL,), settings={"DISABLE_SERVER_SIDE_CURSORS": True})
def client_side_iterator(case: Case) -> Steps:
    """It has all rows already: it goes on to the last one."""
    case.objects.bulk_create([Row(name=name) for name in "abcde"])
    rows = case.objects.order_by("id").iterator(chunk_size=2)
    assert next(rows).name == "a"
    yield
    assert [row.name for row in rows] == list("bcde")
    case.add("f")
    assert case.rows() == list("abcdef")


@healed(configurations=MARIADB)
@healed("pg", configurations=(POSTGRESQL,), settings={"DISABLE_SERVER_SIDE_CURSORS": True})
def client_side_iterator_left_early(case: Case) -> Steps:
    """It is closed in silence, in the middle of what is now another session."""
    case.objects.bulk_create([Row(name=name) for name in "abcde"])
    rows = case.objects.order_by("id").iterator(chunk_size=2)
    assert next(rows).name == "a"
    yield
    case.add("f")
    rows.close()
    assert case.rows() == list("abcdef")


@healed(configurations=MARIADB)
@healed("pg", configurations=(POSTGRESQL,), settings={"DISABLE_SERVER_SIDE_CURSORS": True})
def save_inside_a_client_side_iterator(case: Case) -> Steps:
    case.objects.bulk_create([Row(name=name) for name in "abcde"])
    rows = case.objects.order_by("id").iterator(chunk_size=2)
    first = next(rows)
    yield
    for row in (first, *rows):
        row.name *= 2
        row.save()
    assert case.rows() == ["aa", "bb", "cc", "dd", "ee"]


# Healed: more than one connection


@healed()
def two_aliases(case: Case) -> Steps:
    """The other one stays as it is."""
    other = connections["postgresql" if case.vendor == "postgresql" else DEFAULT_DB_ALIAS]
    try:
        before = session_id(other)
        case.add("before")
        yield
        assert session_id(other) == before
        case.add("after")
        assert session_id(other) == before
        assert case.rows() == ["before", "after"]
    finally:
        other.close()


def pooled(pool: Any) -> dict[str, Any]:
    return {
        "configurations": (POSTGRESQL,),
        "settings": {"OPTIONS": {"pool": pool}},
        "reconnects": None,
    }


SMALL_POOL = {"min_size": 2, "max_size": 3, "timeout": 20}


@healed(**pooled(SMALL_POOL))
@healed("true", **pooled(True))
def pool(case: Case) -> Steps:
    case.add("before")
    pool = case.connection.pool
    wait_for(lambda: pool.get_stats()["pool_available"] >= pool.min_size - 1)
    yield
    case.add("after")
    assert case.rows() == ["before", "after"]
    check_slots(case)


@healed(**pooled(SMALL_POOL))
def pool_in_a_block(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        yield
        case.add("after")
    assert case.rows() == ["after"]
    assert case.callbacks == 1
    check_slots(case)


@healed(**pooled(SMALL_POOL))
def pool_after_the_error_of_a_block(case: Case) -> Steps:
    with pytest.raises(Error), case.atomic():
        case.add("undone")
        yield
        case.add("never sent")
    case.add("after")
    assert case.rows() == ["after"]
    check_slots(case)


def check_slots(case: Case) -> None:
    """Borrow all connections that the pool can have, at once."""
    pool = case.connection.pool
    case.connection.close()
    borrowed = [pool.getconn(timeout=20) for _ in range(pool.max_size)]
    for connection in borrowed:
        pool.putconn(connection)


# The tests


@pytest.fixture(scope="module")
def batches(
    request: pytest.FixtureRequest, mariadb: Server, postgresql: Server
) -> Iterator[Batches]:
    """Give the cells of this module, in batches; their second aliases are on shared servers."""
    with (
        closing(Services()) as services,
        closing(Batches(services, request.session.items)) as batches,
    ):
        yield batches


@pytest.fixture(autouse=True)
def _closed_connections() -> None:
    """Leave the connections open between the tests of a batch."""


@pytest.fixture
def case(request: pytest.FixtureRequest, batches: Batches, cell: Cell) -> Iterator[Case]:
    """Give the cell's case: its connection is lost."""
    case = batches.case(request.node)
    yield case
    batches.close_case(request.node)


@pytest.mark.parametrize("cell", healed.cells(), ids=str)
def test_healed(cell: Cell, case: Case) -> None:
    """The use goes on, in one new session, and what it does is done once."""
    case.go_on()
    assert cell.use.reconnects in (None, case.connects)
