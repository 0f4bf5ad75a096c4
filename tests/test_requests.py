"""No connection to be had is a 503 with Retry-After; every other error is what it was."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.base import BaseHandler
from django.core.signals import got_request_exception
from django.db import OperationalError, connections
from django.test import AsyncClient, AsyncRequestFactory, Client, override_settings

from django_dbhealth.faults import Kind
from django_dbhealth.health import Status
from django_dbhealth.views import OUR_PAGE, RETRY_AFTER, TEMPLATE
from tests.conftest import create_tables, register, unregister
from tests.served import served
from tests.servers.base import USER
from tests.site import QueryingMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.served import Site
    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["mariadb", "postgresql"]
OURS = "django_dbhealth.middleware.DatabaseUnavailableMiddleware"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]


@pytest.fixture(autouse=True)
def _site() -> Iterator[None]:
    with override_settings(ROOT_URLCONF="tests.site", MIDDLEWARE=[OURS], TEMPLATES=TEMPLATES):
        yield


def get(path: str, **headers: str) -> Any:
    return Client(raise_request_exception=False).get(path, headers=headers)


def get_async(path: str, **headers: str) -> Any:
    client = AsyncClient(raise_request_exception=False)
    return async_to_sync(client.get)(path, headers=headers)


WAYS = [pytest.param(get, "", id="sync"), pytest.param(get_async, "/async", id="async")]


@pytest.fixture
def down(new_server: Any, add_database: Any) -> str:
    """The alias of a MariaDB that is down."""
    server = new_server("mariadb")
    alias: str = add_database(server.django())
    server.stop()
    return alias


@contextmanager
def full(server: Server, add_database: Any) -> Iterator[str]:
    """Give an alias whose account has no free slot left."""
    alias = add_database(server.django())
    server.grant_limit(USER, 1)
    register("holder", server.django())
    connections["holder"].ensure_connection()
    yield alias
    unregister("holder")


def assert_is_503(response: Any) -> None:
    assert response.status_code == 503
    assert response["Retry-After"] == str(RETRY_AFTER)
    assert "no-store" in response["Cache-Control"]


# Which errors


@pytest.mark.parametrize(("get", "prefix"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_server_down(kind: str, get: Any, prefix: str, new_server: Any, add_database: Any) -> None:
    """A view that finds no server is a 503; once the server is back, the same request works."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.stop()
    assert_is_503(get(f"{prefix}/count/{alias}/"))
    server.start()
    assert get(f"{prefix}/count/{alias}/").content == b"0 rows"


@pytest.mark.parametrize(("get", "prefix"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_free_slot(kind: str, get: Any, prefix: str, new_server: Any, add_database: Any) -> None:
    """So is one whose account has all its connections in use already."""
    with full(new_server(kind), add_database) as alias:
        assert_is_503(get(f"{prefix}/count/{alias}/"))


def test_atomic_requests(new_server: Any, add_database: Any) -> None:
    """So is one that cannot even begin its transaction."""
    server = new_server("mariadb")
    add_database(server.django(), ATOMIC_REQUESTS=True)
    server.stop()
    assert_is_503(get("/"))


def test_other_errors_are_left_alone(add_database: Any, mariadb: Server, tmp_path: Path) -> None:
    """Bugs, wrong SQL, wrong credentials and a missing page stay what they are."""
    wrong = add_database(mariadb.django(), "wrong")
    connections.settings[wrong]["PASSWORD"] = "another"
    for path in ("/bug/", f"/wrong-sql/{wrong}/", "/wrong-sql/default/"):
        response = get(path)
        assert response.status_code == 500, path
        assert "Retry-After" not in response
    assert get("/nowhere/").status_code == 404


def test_error_in_middleware(down: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a middleware is a 503 by handler500; a bug stays a 500."""
    monkeypatch.setattr(QueryingMiddleware, "alias", down)
    with override_settings(MIDDLEWARE=[OURS, "tests.site.QueryingMiddleware"]):
        assert_is_503(get("/"))
        assert_is_503(get_async("/async/"))
    assert get("/bug/").status_code == 500


def test_without_the_middleware(down: str) -> None:
    """handler500 alone does it too: Django has no better place for an error of any kind."""
    with override_settings(MIDDLEWARE=[]):
        assert_is_503(get(f"/count/{down}/"))


# What is told


@pytest.mark.parametrize(("get", "prefix"), WAYS)
def test_error_trackers(get: Any, prefix: str, down: str, caplog: pytest.LogCaptureFixture) -> None:
    """They get what they get for a 500: the signal, with the error current, and one record."""
    seen: list[tuple[Any, Any, Any]] = []

    def receiver(sender: Any, request: Any, **arguments: Any) -> None:
        seen.append((sender, request, sys.exc_info()[1]))

    got_request_exception.connect(receiver)
    try:
        assert get(f"{prefix}/count/{down}/").status_code == 503
    finally:
        got_request_exception.disconnect(receiver)
    [(sender, request, error)] = seen
    assert sender is None
    assert request.path == f"{prefix}/count/{down}/"
    assert isinstance(error, OperationalError)
    [record] = [each for each in caplog.records if each.name == "django.request"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"Service Unavailable: {prefix}/count/{down}/"
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert record.status_code == 503  # type: ignore[attr-defined]
    assert record.request.path == request.path  # type: ignore[attr-defined]


# The page


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/html; charset=utf-8"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("text/html, application/json;q=0.5", "text/html; charset=utf-8"),
        ("image/png", "text/html; charset=utf-8"),
        ("nonsense", "text/html; charset=utf-8"),
    ],
)
def test_html_or_json(accept: str, content_type: str, down: str) -> None:
    response = get(f"/count/{down}/", accept=accept)
    assert_is_503(response)
    assert response["Content-Type"] == content_type
    if content_type == "application/json":
        assert json.loads(response.content) == {"error": "The database is unavailable."}


def test_page_is_overridable(down: str, tmp_path: Path) -> None:
    """A project's own template counts; one that needs the database itself gives way to ours."""
    folder = tmp_path / "django_dbhealth"
    folder.mkdir()
    (folder / "503.html").write_text("<p>Closed for lunch.</p>")
    templates = [{**TEMPLATES[0], "DIRS": [tmp_path]}]
    with override_settings(TEMPLATES=templates):
        assert get(f"/count/{down}/").content == b"<p>Closed for lunch.</p>"
    querying = [{**templates[0], "OPTIONS": {"builtins": ["tests.querying_tags"]}}]
    (folder / "503.html").write_text("{% rows %}")
    with override_settings(TEMPLATES=querying):
        response = get(f"/count/{down}/")
        assert_is_503(response)
        assert response.content == OUR_PAGE.read_bytes()


def test_page_without_templates(down: str) -> None:
    """A project without any TEMPLATES has the page all the same."""
    with override_settings(TEMPLATES=[]):
        assert get(f"/count/{down}/").content == OUR_PAGE.read_bytes()


def test_page_needs_nothing_else() -> None:
    """It loads no style, script or picture: nothing else may work either."""
    page = OUR_PAGE.read_text()
    assert "src=" not in page
    assert "url(" not in page
    assert "<link" not in page


def test_what_the_docs_say() -> None:
    """The number, the names and the bodies that docs/requests.md shows are those of the code."""
    text = " ".join((ROOT / "docs/requests.md").read_text().split())
    assert f"`Retry-After: {RETRY_AFTER}`" in text
    assert f"`{json.dumps({'error': 'The database is unavailable.'})}`" in text
    assert OURS in text
    assert f"`{TEMPLATE}`" in text
    [detail] = re.findall(r"```json (.+?) ```", text)
    assert json.loads(detail)["databases"]["default"]["reason"] in {each.value for each in Kind}
    for status in Status:
        assert f"| `{status.name.lower()}` |" in text


# Sync and async


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts what is handed to other threads."""

    hops = 0

    def run_in_executor(self, *arguments: Any) -> Any:
        self.hops += 1
        return super().run_in_executor(*arguments)


def hops(middleware: list[str], path: str) -> int:
    """Return how many times a request leaves the event loop's thread."""
    with override_settings(MIDDLEWARE=middleware):
        handler = BaseHandler()
        handler.load_middleware(is_async=True)
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        response = runner.run(handler.get_response_async(AsyncRequestFactory().get(path)))
        assert response.status_code == 200
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop)
        return loop.hops


def test_no_thread_hop() -> None:
    """Under ASGI the middleware adds none to a request, and an async view stays in its thread."""
    assert hops([OURS], "/async/") == hops([], "/async/") == 0
    assert hops([OURS], "/") == hops([], "/") == 1


@pytest.mark.parametrize(("get", "prefix"), WAYS)
def test_among_other_middleware(get: Any, prefix: str, down: str) -> None:
    """Others around it and inside of it take it for what it is, sync or async."""
    around = "django.middleware.security.SecurityMiddleware"
    inside = "django.middleware.common.CommonMiddleware"
    with override_settings(MIDDLEWARE=[around, OURS, inside]):
        response = get(f"{prefix}/")
        assert response.status_code == 200
        assert response["X-Content-Type-Options"] == "nosniff"
        assert_is_503(get(f"{prefix}/count/{down}/"))


# Under load

CLIENTS = 20


def answers_to(site: Site, path: str) -> list[tuple[int, str | None]]:
    """Return the status and Retry-After of each answer to clients that come all at once."""
    ready = threading.Barrier(CLIENTS)

    def ask(_number: int) -> tuple[int, str | None]:
        ready.wait()
        response = site.get(path)
        return response.status, response.getheader("Retry-After")

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(ask, range(CLIENTS)))


@pytest.mark.parametrize(
    ("by", "options", "path", "max_age", "left"),
    [
        pytest.param("gunicorn sync", [], "/slow/", 0, [0], id="gunicorn sync"),
        pytest.param("gunicorn gthread", [], "/slow/", 0, [0], id="gunicorn gthread"),
        pytest.param("uvicorn", [], "/async/slow/", 0, [0], id="uvicorn"),
        pytest.param(
            "gunicorn sync", ["--workers=2"], "/slow/", 60, [1, 2], id="gunicorn, persistent"
        ),
    ],
)
def test_few_slots(
    by: str,
    options: list[str],
    path: str,
    max_age: int,
    left: list[int],
    new_server: Any,
) -> None:
    """Twenty clients, two slots: each gets an answer or a 503, and no connection is left over."""
    server = new_server("mariadb")
    register("site", server.django())
    create_tables("site")
    server.grant_limit(USER, 2)
    databases = {"default": server.django(CONN_MAX_AGE=max_age)}
    with served(by, databases, *options, CONNECT_RETRY_TIMEOUT=20) as site:
        assert site.get("/").status == 200  # it is up
        began = time.monotonic()
        answers = answers_to(site, path)
        seconds = time.monotonic() - began
        print(by, {each: answers.count(each) for each in set(answers)}, f"{seconds:.1f} s")
        assert set(answers) <= {(200, None), (503, str(RETRY_AFTER))}
        assert answers.count((200, None)) >= CLIENTS / 3
        sessions = server.sessions(USER) if max_age else server.wait_for_sessions(0, USER)
        assert len(sessions) in left
    unregister("site")
