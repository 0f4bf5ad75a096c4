"""A site that is served under ASGI, with a CONN_MAX_AGE that means nothing there."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.db import connections
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path

from tests.app.models import Row
from tests.served import ROOT, served
from tests.servers.base import USER

if TYPE_CHECKING:
    from django.http import HttpRequest

    from tests.conftest import Database

REQUESTS, CONCURRENCY = 300, 20


@pytest.fixture
def example(mariadb: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example project's environment, with its tables."""
    mariadb.create_database("example")
    mariadb.execute("DROP TABLE IF EXISTS example_project_product", database="example")
    mariadb.execute(
        "CREATE TABLE example_project_product"
        " (id INT PRIMARY KEY, sku CHAR(3), price DECIMAL(18, 10), updated DATE)",
        database="example",
    )
    monkeypatch.setenv("DATABASE_URL", mariadb.url("example"))
    monkeypatch.setenv("CONN_MAX_AGE", "60")
    return mariadb


def most_sessions(server: Any, url: str, requests: int) -> tuple[int, Counter[int]]:
    """Return the most sessions that were seen meanwhile, and how often which status came."""
    over, seen = threading.Event(), [0]

    def look() -> None:
        while not over.is_set():
            seen.append(len(server.sessions(USER)))

    with served("uvicorn", {}, settings="example_project.settings") as site:
        with ThreadPoolExecutor(CONCURRENCY) as clients, ThreadPoolExecutor(1) as observer:
            looking = observer.submit(look)
            try:
                statuses = list(clients.map(lambda _: site.get(url).status, range(requests)))
            finally:
                over.set()
            looking.result()
        seen.append(len(server.sessions(USER)))
    return max(seen), Counter(statuses)


@pytest.mark.parametrize("url", ["/", "/async/"])
def test_connections_do_not_accumulate(example: Any, url: str) -> None:
    """Never more than there are requests at once, and as many that the server sees to closing."""
    most, statuses = most_sessions(example, url, REQUESTS)
    assert statuses == {200: REQUESTS}
    assert 0 < most <= 2 * CONCURRENCY + 2


def test_without_the_app(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it they grow with the requests, until a garbage collection comes by."""
    monkeypatch.setenv("PLAIN_DJANGO", "1")
    most, _ = most_sessions(example, "/", REQUESTS // 2)
    assert most > 2 * CONCURRENCY + 2


# The warning


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{Row.objects.using('database').count()} rows")


async def async_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{await Row.objects.using('database').acount()} rows")


urlpatterns = [path("", view), path("async/", async_view)]


async def get(url: str) -> int:
    application = get_asgi_application()
    scope = {"type": "http", "method": "GET", "path": url, "headers": [], "query_string": b""}
    communicator = ApplicationCommunicator(application, scope)
    await communicator.send_input({"type": "http.request", "body": b""})
    response = await communicator.receive_output(10)
    await communicator.receive_output(10)
    await communicator.wait(10)
    return int(response["status"])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "django_dbhealth.threads"]


@override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
def test_warning(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests, each with a view of another kind, are told of once."""
    monkeypatch.setattr("django_dbhealth.threads._warned", {})
    connections.settings["database"]["CONN_MAX_AGE"] = 60
    with caplog.at_level(logging.WARNING):
        assert [asyncio.run(get(url)) for url in ("/", "/async/")] == [200, 200]
    [text] = warnings_of(caplog)
    page = (ROOT / "docs" / "threads.md").read_text()
    quoted = " ".join(line[2:] for line in page.splitlines() if line.startswith("> "))
    assert text.replace("'database'", "'default'") == quoted
    database.server.wait_for_sessions(0, USER)


@override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
def test_no_warning(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Django's default, and outside of requests, there is nothing to say."""
    monkeypatch.setattr("django_dbhealth.threads._warned", {})
    with caplog.at_level(logging.WARNING):
        asyncio.run(get("/"))
        connections.settings["database"]["CONN_MAX_AGE"] = 60
        Row.objects.using("database").count()
    assert warnings_of(caplog) == []
