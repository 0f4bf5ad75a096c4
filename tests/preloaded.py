"""A configuration of gunicorn's: the master process asks the database before it forks."""

from __future__ import annotations

from typing import Any

preload_app = True


def when_ready(server: Any) -> None:
    from tests.app.models import Row

    Row.objects.count()
