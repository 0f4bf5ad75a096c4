"""What a site answers while it has no connection to its database, and whether it has one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.contrib.auth.decorators import login_not_required
from django.db import Error, connections
from django.db.transaction import non_atomic_requests
from django.http import Http404, HttpResponse, JsonResponse
from django.template import TemplateDoesNotExist
from django.template.loader import get_template
from django.utils.cache import add_never_cache_headers
from django.utils.log import log_response
from django.views import defaults
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from .backoff import LONGEST_DELAY
from .connecting import WORTH_WAITING
from .diagnosis import classify
from .health import Status, aliases, check_health

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from .health import Health

    View = Callable[[HttpRequest], HttpResponse]

TEMPLATE = "django_dbhealth/503.html"
OUR_PAGE = Path(__file__).parent / "templates" / TEMPLATE

RETRY_AFTER = round(LONGEST_DELAY)  # seconds: what a program of ours would wait at most
HTML, JSON = "text/html", "application/json"


# 503 instead of 500


def is_unavailable(error: BaseException | None) -> bool:
    """Return whether the error says that there is no connection to be had for now."""
    fault = classify(error) if error is not None else None
    return fault is not None and fault.kind in WORTH_WAITING


def database_unavailable(request: HttpRequest) -> HttpResponse:
    """Answer 503 with Retry-After: as JSON to who prefers that, else as an HTML page."""
    response: HttpResponse
    if request.get_preferred_type([HTML, JSON]) == JSON:
        response = JsonResponse({"error": "The database is unavailable."}, status=503)
    else:
        response = HttpResponse(_page(), status=503)
    response["Retry-After"] = str(RETRY_AFTER)
    add_never_cache_headers(response)
    return response


def _page() -> str:
    """Render the page like Django's 500.html: with no context, which could need the database."""
    try:
        return get_template(TEMPLATE).render()
    except (TemplateDoesNotExist, Error):  # no TEMPLATES; or a project's own that makes a query
        return OUR_PAGE.read_text()


def server_error(request: HttpRequest) -> HttpResponseBase:
    """Answer 503 where no connection was to be had, else as Django does: a ``handler500``."""
    if is_unavailable(sys.exc_info()[1]):
        return database_unavailable(request)
    return defaults.server_error(request)


# The health endpoint


def outside_transactions(view: View) -> View:
    """Let no database of ATOMIC_REQUESTS begin a transaction; Django's decorator names one."""
    for alias in connections.settings:
        view = non_atomic_requests(using=alias)(view)
    return view


@never_cache
@require_safe
@login_not_required
@outside_transactions
def health(request: HttpRequest) -> HttpResponse:
    """Answer whether the databases can be used: 200 or 503, and in JSON pass, warn or fail.

    ``?alias=`` asks for one database only, and may be repeated. Why is not said, because anybody
    may ask. No table is touched, and no connection of the request's.
    """
    return _answer(request, _nothing)


@never_cache
@require_safe
@outside_transactions
def health_detail(request: HttpRequest) -> HttpResponse:
    """Answer staff like ``health``, and what is wrong with which database; 404 to all others.

    Who is staff Django reads from its tables: this view fails where ``health`` still answers.
    """
    user = getattr(request, "user", None)
    if not (user and user.is_active and user.is_staff):
        raise Http404
    return _answer(request, _each_database)


Found = dict[str, "Health"]  # by alias


def _answer(request: HttpRequest, more: Callable[[Found], dict[str, Any]]) -> HttpResponse:
    known = aliases()
    wanted = request.GET.getlist("alias") or known
    if not set(wanted) <= set(known):
        return JsonResponse({"error": "DATABASES has no such alias."}, status=404)
    found = check_health(wanted)
    worst = max((each.status for each in found.values()), default=Status.PASS)
    status = 503 if worst is Status.FAIL else 200
    response = JsonResponse({"status": worst.name.lower(), **more(found)}, status=status)
    if status == 503:  # asked every few seconds: no error, or Django would mail each to the admins
        log_response(
            "%s: %s",
            response.reason_phrase,
            request.path,
            response=response,
            request=request,
            level="warning",
        )
    return response


def _nothing(found: Found) -> dict[str, Any]:
    return {}


def _each_database(found: Found) -> dict[str, Any]:
    return {
        "databases": {
            alias: {"status": each.status.name.lower(), "reason": each.reason}
            for alias, each in found.items()
        }
    }
