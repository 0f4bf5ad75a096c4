"""Run a worker, or whoever gives them the work."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.workers import work

if TYPE_CHECKING:
    from collections.abc import Callable

ROLES: dict[str, Callable[..., None]] = {
    "celery": work.celery,
    "rq": work.rq,
    "django_tasks": work.django_tasks,
    "apscheduler": work.apscheduler,
    "give_out": work.give_out,
}

ROLES[sys.argv[1]](*sys.argv[2:])
