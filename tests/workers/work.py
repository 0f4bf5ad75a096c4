"""The work, the workers, and who gives them the work. `python -m tests.workers NAME …`

Nothing in here speaks of django_dbhealth: this is what a project has anyway.
"""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import django

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBER = 30
REDIS = os.environ["REDIS_URL"]
# Both kinds of processes share the broker.
PREFIX = "plain-" if os.environ["PLAIN_DJANGO"] == "1" else ""


def save(worker: str, number: int) -> None:
    from tests.app.models import Row

    Row.objects.create(name=PREFIX + worker, number=number)


# Celery


def make_celery() -> object:
    from celery import Celery

    app = Celery("tests", broker=REDIS)
    app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
    app.task(name="save")(save)
    return app


def celery(pool: str) -> None:
    app = make_celery()
    queue, concurrency = f"{PREFIX}celery-{pool}", "1" if pool == "solo" else "2"
    options = ["-P", pool, "-c", concurrency, "-Q", queue, "-n", queue, "-l", "WARNING"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", *options, *quiet])  # type: ignore[attr-defined]


# RQ


def rq() -> None:
    from redis import Redis
    from rq import Worker

    django.setup()
    Worker([f"{PREFIX}rq"], connection=Redis.from_url(REDIS)).work(with_scheduler=True)


# Django's tasks


def django_tasks() -> None:
    from django.core.management import execute_from_command_line

    command = ["manage.py", "db_worker", "--interval", "2.3", "--no-startup-delay"]
    execute_from_command_line([*command, "--queue-name", f"{PREFIX}django-tasks"])


# APScheduler


def apscheduler(start: str) -> None:
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    django.setup()
    scheduler = BackgroundScheduler(
        executors={"default": ThreadPoolExecutor(2)}, job_defaults={"misfire_grace_time": None}
    )
    for number, moment in moments(start):
        scheduler.add_job(save, "date", ["apscheduler", number], run_date=moment)
    scheduler.start()
    signal.pause()


# Who gives them the work


def moments(start: str) -> Iterator[tuple[int, datetime]]:
    """Return when each task is due: wider apart than the server's patience."""
    for number in range(NUMBER):
        yield number, datetime.fromtimestamp(float(start), UTC) + timedelta(seconds=2.3 * number)


def give_out(start: str) -> None:
    from redis import Redis
    from rq import Queue

    django.setup()
    from tests.workers.tasks import save_in_a_task

    app = make_celery()
    queue = Queue(f"{PREFIX}rq", connection=Redis.from_url(REDIS))
    task = save_in_a_task.using(queue_name=f"{PREFIX}django-tasks")
    for number, moment in moments(start):
        for pool in ("prefork", "threads", "solo"):
            name = f"celery-{pool}"
            app.send_task("save", [name, number], eta=moment, queue=PREFIX + name)  # type: ignore[attr-defined]
        queue.enqueue_at(moment, save, "rq", number)
        task.using(run_after=moment).enqueue(number)
