"""The health endpoint: the truth, in time, for everybody, and nothing that is nobody's business."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections
from django.test import Client, RequestFactory, override_settings

from django_dbhealth import health
from django_dbhealth.views import health_detail
from tests.conftest import register, unregister
from tests.served import served
from tests.servers import Proxy, wait_for
from tests.servers.base import PASSWORD, USER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.served import Site
    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["mariadb", "postgresql"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Serve tests/site.py in this process, and begin with nothing that another test has found."""
    health._probes.clear()
    with override_settings(ROOT_URLCONF="tests.site"):
        yield


def ask(*aliases: str) -> tuple[int, dict[str, Any]]:
    """Return the answer anew, not one of less than a second ago."""
    health._probes.clear()
    response = Client().get("/health/", {"alias": aliases})
    return response.status_code, json.loads(response.content)


PASS = (200, {"status": "pass"})
WARN = (200, {"status": "warn"})
FAIL = (503, {"status": "fail"})


# The answer


@pytest.mark.parametrize("kind", KINDS)
def test_pass(kind: str, new_server: Any, add_database: Any) -> None:
    """A server that answers passes, on a connection that is closed again, and is not a pool's."""
    server = new_server(kind)
    alias = add_database(server.django())
    assert ask(alias) == PASS
    assert connections[alias].connection is None
    server.wait_for_sessions(0, USER)


def test_pool_is_left_alone(new_server: Any, add_database: Any) -> None:
    """The probe takes no connection of a pool, whose size it could exhaust, and opens no pool."""
    server = new_server("postgresql")
    alias = add_database(server.django(), OPTIONS={"pool": {"min_size": 1, "max_size": 1}})
    with connections[alias].cursor():  # the pool's only one
        assert ask(alias) == PASS


@pytest.mark.parametrize("engine", ["tests.pymysql_backend", "django.db.backends.sqlite3"])
def test_other_engines(engine: str, new_server: Any, add_database: Any, tmp_path: Any) -> None:
    """PyMySQL is asked like mysqlclient; an SQLite passes when it answers."""
    sqlite = engine.endswith("sqlite3")
    settings = {"NAME": tmp_path / "db"} if sqlite else new_server("mariadb").django()
    register("other", {**settings, "ENGINE": engine})
    assert ask("other") == PASS
    connections.settings["other"]["NAME"] = tmp_path / "nowhere" / "db"
    assert ask("other") == FAIL
    unregister("other")


def test_every_alias_unless_told(mariadb: Server, postgresql: Server) -> None:
    """Without ?alias= all databases are asked; an alias that is {} is none."""
    register("nothing", {})
    assert {"default", "postgresql", "sqlite"} <= set(health.aliases())
    assert "nothing" not in health.aliases()
    assert ask() == PASS
    assert ask("default", "sqlite", "default") == PASS
    unregister("nothing")


def test_unknown_alias() -> None:
    """A mistyped alias is no healthy database."""
    for aliases in (["nowhere"], ["sqlite", "nowhere"]):
        assert ask(*aliases) == (404, {"error": "DATABASES has no such alias."})


def test_read_only(new_server: Any, add_database: Any) -> None:
    """A server that takes no writes is a warning."""
    mariadb, postgresql = new_server("mariadb"), new_server("postgresql")
    first = add_database(mariadb.django(), "first")
    second = add_database(postgresql.django(), "second")
    assert ask(first, second) == PASS
    mariadb.set(read_only=1)
    assert ask(first) == WARN
    postgresql.set(default_transaction_read_only="on")
    assert ask(second) == WARN
    mariadb.stop()
    assert ask(first, second) == FAIL  # the worst counts


def test_no_free_slot(new_server: Any, add_database: Any) -> None:
    """An account without a free slot fails, at once also where others would wait for one."""
    server = new_server("mariadb")
    alias = add_database(server.django())
    server.grant_limit(USER, 1)
    with override_settings(DBHEALTH={"CONNECT_RETRY_TIMEOUT": 60}):
        assert ask(alias) == PASS
        connections[alias].ensure_connection()
        assert ask(alias) == FAIL


def test_wrong_options(new_server: Any, add_database: Any, caplog: Any) -> None:
    """Options that the driver does not take are no reason for a 500."""
    alias = add_database(new_server("mariadb").django())
    connections.settings[alias]["OPTIONS"]["nonsense"] = 1
    assert ask(alias) == FAIL


# The protocol


def test_get_and_head_only() -> None:
    url = "/health/?alias=sqlite"
    assert Client().get(url).status_code == 200
    assert Client().head(url).status_code == 200
    for method in ("post", "put", "delete", "patch", "options"):
        response = getattr(Client(), method)(url)
        assert response.status_code == 405
        assert "no-store" in response["Cache-Control"]


def test_never_cached() -> None:
    response = Client().get("/health/?alias=sqlite")
    assert response["Content-Type"] == "application/json"
    assert "no-store" in response["Cache-Control"]


def test_logs(new_server: Any, add_database: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The reason is logged, as a warning, and not the 503 as an error: Django would mail each."""
    server = new_server("mariadb")
    alias = add_database(server.django())
    server.stop()
    assert ask(alias) == FAIL
    records = {record.name: record for record in caplog.records}
    assert records.keys() == {"django_dbhealth.health", "django.request"}
    assert {record.levelname for record in records.values()} == {"WARNING"}
    assert records["django_dbhealth.health"].alias == alias  # type: ignore[attr-defined]
    assert "2002" in records["django_dbhealth.health"].getMessage()


# Who asks

# In a process of its own, because django.contrib.auth is not installed in this one.
WITH_ACCOUNTS = """
import django
from django.conf import settings

from tests import site_settings

AUTH = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
]
own = {name: value for name, value in vars(site_settings).items() if name.isupper()}
settings.configure(
    **own | {"INSTALLED_APPS": site_settings.INSTALLED_APPS + AUTH, "MIDDLEWARE": MIDDLEWARE}
)
django.setup()

from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext, setup_test_environment

setup_test_environment()
call_command("migrate", verbosity=0)


def answer(client, path):
    with CaptureQueriesContext(connection) as queries:
        response = client.get(path)
    return response.status_code, len(queries), response.content.decode()


client = Client()
assert answer(client, "/health/") == (200, 0, '{"status": "pass"}')
assert answer(client, "/health/detail/")[0] == 302  # to the login page

with override_settings(MIDDLEWARE=MIDDLEWARE[:2]):
    client = Client()
    assert answer(Client(), "/health/detail/")[0] == 404
    for account in ({}, {"is_staff": True, "is_active": False}, {"is_staff": True}):
        User.objects.all().delete()
        client.force_login(User.objects.create(username="someone", **account))
        assert answer(client, "/health/") == (200, 0, '{"status": "pass"}')
        status, _, text = answer(client, "/health/detail/")
        assert status == (200 if account == {"is_staff": True} else 404), (account, status)
    assert text == '{"status": "pass", "databases": {"default": {"status": "pass", "reason": ""}}}'
with override_settings(MIDDLEWARE=[]):
    assert answer(Client(), "/health/detail/")[0] == 404
"""


def test_who_asks(tmp_path: Path) -> None:
    """Nobody is looked up for the endpoint, logged in or not; the details are for active staff."""
    databases = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db")}}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITH_ACCOUNTS],
        cwd=ROOT,
        env={**os.environ, "DATABASES": json.dumps(databases)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_detail(new_server: Any, add_database: Any) -> None:
    """Staff see which database is the matter, and what the matter is."""
    mariadb, postgresql = new_server("mariadb"), new_server("postgresql")
    add_database(mariadb.django(), "first")
    add_database(postgresql.django(), "second")
    postgresql.set(default_transaction_read_only="on")
    connections.settings["first"]["PASSWORD"] = "another"
    request = RequestFactory().get("/", {"alias": ["first", "second", "sqlite"]})
    # Stands for a User, whose app is not installed here.
    request.user = SimpleNamespace(is_active=True, is_staff=True)  # type: ignore[assignment]
    response = health_detail(request)
    assert response.status_code == 503
    assert json.loads(response.content) == {
        "status": "fail",
        "databases": {
            "first": {"status": "fail", "reason": "credentials"},
            "second": {"status": "warn", "reason": "read-only"},
            "sqlite": {"status": "pass", "reason": ""},
        },
    }


# In time


def threads_of(alias: str) -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == f"dbhealth {alias}"]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_at_connect(kind: str, new_server: Any, add_database: Any) -> None:
    """A server that takes the connection and says nothing: one thread waits, and not for ever."""
    server = new_server(kind)
    alias = add_database(server.django(transport="tcp"))
    server.freeze()
    with override_settings(DBHEALTH=in_a_second(alias)):
        assert ask_at_leisure(alias) == FAIL
        for _ in range(3):  # while that thread waits, no other does
            assert Client().get("/health/", {"alias": alias}).status_code == 503
            assert len(threads_of(alias)) <= 1
        wait_for(lambda: not threads_of(alias), timeout=10, message="The thread still waits.")
    server.thaw()
    assert ask(alias) == PASS


def in_a_second(alias: str) -> dict[str, Any]:
    """Return a configuration in which one alias alone has a short PING_TIMEOUT."""
    return {"PING_TIMEOUT": 60, "DATABASES": {alias: {"PING_TIMEOUT": 1}}}


def ask_at_leisure(alias: str) -> tuple[int, dict[str, Any]]:
    began = time.monotonic()
    answer = ask(alias)
    assert time.monotonic() - began < 30
    return answer


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12's
def test_child_asks_anew(new_server: Any, add_database: Any) -> None:
    """A process that was forked while its parent asked does not wait for its parent's thread."""
    server = new_server("mariadb")
    alias = add_database(server.django())
    server.freeze()
    with override_settings(DBHEALTH={"PING_TIMEOUT": 2}), ThreadPoolExecutor(1) as other:
        answer = other.submit(Client().get, "/health/", {"alias": alias})
        wait_for(lambda: alias in health._probes)
        may_ask, thawed = os.pipe()
        is_well = False
        child = os.fork()
        if not child:
            try:
                os.read(may_ask, 1)
                with override_settings(DBHEALTH={"PING_TIMEOUT": 30}):
                    is_well = health.check_health([alias])[alias] == health.PASSING
            finally:
                os._exit(not is_well)
        answer.result(30)
        wait_for(lambda: not threads_of(alias), message="The thread still waits.")
        server.thaw()
        os.write(thawed, b"!")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(may_ask)
    os.close(thawed)


@pytest.mark.parametrize("engine", ["mysqlclient", "PyMySQL", "psycopg"])
def test_frozen_afterwards(
    engine: str, new_server: Any, add_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that freezes in the middle of it all: the answer is in time, the thread ends."""
    server = new_server("postgresql" if engine == "psycopg" else "mariadb")
    with Proxy(server.host, server.port) as proxy:
        settings = server.django(transport="tcp", PORT=str(proxy.port))
        alias = add_database(settings)
        if engine == "PyMySQL":
            connections.settings[alias]["ENGINE"] = "tests.pymysql_backend"
        ask_it = health._health_of

        def freeze_and_ask(*arguments: Any) -> health.Health:
            server.freeze()
            return ask_it(*arguments)

        monkeypatch.setattr(health, "_health_of", freeze_and_ask)
        with override_settings(DBHEALTH=in_a_second(alias)):
            assert ask_at_leisure(alias) == FAIL
            wait_for(lambda: not threads_of(alias), timeout=10, message="The thread still waits.")
        server.thaw()


# On the wire


SECRETS = [USER, PASSWORD, "ledger", "127.0.0.1", "MariaDB", "PostgreSQL", "mysql", "psycopg"]
TIMEOUT = 4  # seconds


@contextmanager
def account_refused(server: Server) -> Iterator[None]:
    account = f"USER {USER}@'%'" if server.vendor == "mysql" else f"ROLE {USER}"
    word = "IDENTIFIED BY" if server.vendor == "mysql" else "PASSWORD"
    server.execute(f"ALTER {account} {word} 'another'")
    yield
    server.execute(f"ALTER {account} {word} '{PASSWORD}'")


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    server.stop()
    yield
    server.start()


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    server.freeze()
    yield
    server.thaw()


@contextmanager
def read_only(server: Server) -> Iterator[None]:
    name = "read_only" if server.vendor == "mysql" else "default_transaction_read_only"
    server.set(**{name: 1})
    yield
    server.set(**{name: 0})


def check_answer(site: Site, path: str, status: int, word: str, secrets: Sequence[str]) -> None:
    began = time.monotonic()
    answer = site.raw(path)
    seconds = time.monotonic() - began
    print(f"{path}: {status} {word} in {seconds:.2f} s")
    assert seconds < TIMEOUT + 10  # a frozen server would be waited for for ever
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body) == {"status": word}
    assert [each for each in secrets if each.encode() in answer] == []


@pytest.mark.parametrize(
    ("kind", "by"), [("mariadb", "gunicorn gthread"), ("postgresql", "uvicorn")]
)
def test_on_the_wire(kind: str, by: str, new_server: Any) -> None:
    """Whatever is the matter, the answer is in time, right, and carries nothing but its word.

    With ATOMIC_REQUESTS too, where Django would begin a transaction on each alias first.
    """
    server = new_server(kind)
    server.create_database("ledger")
    ((version,),) = server.execute("SELECT VERSION()")
    secrets = [*SECRETS, str(server.port), re.search(r"\d+\.\d+", version)[0]]  # type: ignore[index]
    databases = {
        "default": server.django("ledger", "tcp", ATOMIC_REQUESTS=True),
        "replica": server.django("ledger", "tcp", ATOMIC_REQUESTS=True),
        "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(server.directory / "db")},
    }
    with served(by, databases, PING_TIMEOUT=TIMEOUT) as site:
        assert site.get("/health/?alias=other").status == 200
        check_answer(site, "/health/", 200, "pass", secrets)
        for trouble, status, word in (
            (stopped, 503, "fail"),
            (frozen, 503, "fail"),
            (account_refused, 503, "fail"),
            (read_only, 200, "warn"),
        ):
            with trouble(server):
                time.sleep(health.SHARED_FOR)  # for so long holds what was found before
                check_answer(site, "/health/", status, word, secrets)
                check_answer(site, "/health/?alias=default", status, word, secrets)
                check_answer(site, "/health/?alias=other", 200, "pass", secrets)
                head = site.raw("/health/", "HEAD")
                assert int(head.split()[1]) == status
                assert head.endswith(b"\r\n\r\n")  # and no body


# A flood

REQUESTS, CLIENTS = 500, 50


def test_flood(new_server: Any) -> None:
    """However many ask, there is one connection at a time, and one a second."""
    server = new_server("mariadb")
    databases = {"default": server.django()}
    with served("gunicorn gthread", databases, "--keep-alive=60") as site:
        assert site.get("/").status == 200  # it is up
        before = server.status("Connections")
        began = time.monotonic()

        def ask(_number: int) -> list[int]:
            with site.client() as client:
                return [status_of(client) for _ in range(REQUESTS // CLIENTS)]

        with ThreadPoolExecutor(CLIENTS) as clients:
            statuses = [each for some in clients.map(ask, range(CLIENTS)) for each in some]
        seconds = time.monotonic() - began
        count = server.status("Connections") - before - 1  # this look's own
        print(f"{len(statuses)} requests in {seconds:.2f} s, {count} connections opened")
        assert statuses == [200] * REQUESTS
        assert 1 <= count <= max(2, 1 + seconds / health.SHARED_FOR)
        server.wait_for_sessions(0, USER)


def status_of(client: Any) -> int:
    client.request("GET", "/health/")
    response = client.getresponse()
    response.read()
    return int(response.status)


def test_one_at_a_time(new_server: Any, add_database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the server takes its time: those who come later wait for the same answer."""
    server = new_server("mariadb")
    alias = add_database(server.django())
    before = server.status("Connections")
    monkeypatch.setattr(health, "SHARED_FOR", 60)  # some may come a second after the answer
    server.freeze()
    with ThreadPoolExecutor(20) as clients:
        answers = [clients.submit(Client().get, "/health/", {"alias": alias}) for _ in range(20)]
        wait_for(lambda: threads_of(alias))
        assert len(threads_of(alias)) == 1
        server.thaw()
        assert {answer.result(30).status_code for answer in answers} == {200}
    assert server.status("Connections") - before == 2  # this look's own is one
