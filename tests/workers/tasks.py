"""The work as a task of Django's."""

from __future__ import annotations

from django.tasks import task

from tests.workers.work import save


@task
def save_in_a_task(number: int) -> None:
    save("django-tasks", number)
