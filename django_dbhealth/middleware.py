"""503 with Retry-After instead of 500, while there is no connection to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.signals import got_request_exception
from django.utils.log import log_response

from .views import database_unavailable, is_unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest, HttpResponse


class DatabaseUnavailableMiddleware:
    """Answer 503 where a view found no free slot, or no server; leave every other error alone.

    Put it first. Errors of middleware are not seen by any other: ``views.server_error`` as
    ``handler500`` is for them. The error is logged and signalled as Django does it for a 500.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        return self._get_response(request)  # under ASGI a coroutine, which the caller awaits

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Return the 503, or None; Django calls this, in a thread under ASGI, for views' errors."""
        if not is_unavailable(error):
            return None
        got_request_exception.send(sender=None, request=request)
        response = database_unavailable(request)
        log_response(
            "%s: %s",
            response.reason_phrase,
            request.path,
            response=response,
            request=request,
            exception=error,
        )
        return response
