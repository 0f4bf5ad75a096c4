"""A small site, for the tests of requests."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.http import HttpResponse
from django.urls import include, path

from tests.app.models import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest

HOLD = 0.3  # seconds for which a request keeps its connection: longer than a query alone takes

handler500 = "django_dbhealth.views.server_error"


def empty(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


async def empty_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def count(request: HttpRequest, alias: str) -> HttpResponse:
    return HttpResponse(f"{Row.objects.using(alias).count()} rows")


async def count_async(request: HttpRequest, alias: str) -> HttpResponse:
    return HttpResponse(f"{await Row.objects.using(alias).acount()} rows")


def slow(request: HttpRequest) -> HttpResponse:
    Row.objects.count()
    time.sleep(HOLD)
    return HttpResponse("done")


async def slow_async(request: HttpRequest) -> HttpResponse:
    await Row.objects.acount()
    await asyncio.sleep(HOLD)
    return HttpResponse("done")


def wrong_sql(request: HttpRequest, alias: str) -> HttpResponse:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT nonsense")
    return HttpResponse()


def bug(request: HttpRequest) -> HttpResponse:
    raise ValueError("a bug")


class QueryingMiddleware:
    """It asks the database before the view, as the middleware of sessions may."""

    alias = "default"

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        Row.objects.using(self.alias).count()
        return self.get_response(request)


urlpatterns = [
    path("", empty),
    path("async/", empty_async),
    path("count/<alias>/", count),
    path("async/count/<alias>/", count_async),
    path("slow/", slow),
    path("async/slow/", slow_async),
    path("wrong-sql/<alias>/", wrong_sql),
    path("bug/", bug),
    path("health/", include("django_dbhealth.urls")),
]
