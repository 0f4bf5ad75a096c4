"""Connections of our own: for a question to a server, closed when it is answered."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from .conf import config_for
from .vendors import driver_of
from .vendors.base import hung_up_after

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

Answer = TypeVar("Answer")


def own_connection(alias: str) -> BaseDatabaseWrapper:
    """Return one outside of any pool, without the guard: it is refused at once, not tried again.

    The driver's own timeouts are PING_TIMEOUT, rounded up to whole seconds.
    """
    settings = connections.settings[alias]
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    connection: BaseDatabaseWrapper = load_backend(settings["ENGINE"]).DatabaseWrapper(
        {**settings, "OPTIONS": options}, alias
    )
    if driver := driver_of(connection):
        seconds = math.ceil(config_for(alias).ping_timeout)
        options.update(dict.fromkeys(driver.timeouts, seconds))
    return connection


def close(connection: BaseDatabaseWrapper) -> None:
    """Close one of them, in its backend's way."""
    connection.close()
    if connection.connection is not None:  # SQLite leaves a database in memory open
        BaseDatabaseWrapper.close(connection)


def ask_apart(alias: str, question: Callable[[BaseDatabaseWrapper], Answer]) -> Answer:
    """Put a question on a connection of its own, which is opened for it and closed after it.

    All of it takes at most PING_TIMEOUT, else TimeoutError is raised; what connecting and asking
    raise is raised as it is.
    """
    timeout = config_for(alias).ping_timeout
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(_ask(own_connection(alias), question, timeout))
        except BaseException as error:  # noqa: BLE001 (raised where the answer is waited for)
            answer.set_exception(error)

    # A daemon: one that a frozen server holds must not keep the process from ending.
    threading.Thread(target=run, name=f"dbhealth {alias}", daemon=True).start()
    return answer.result(timeout)


def _ask(
    connection: BaseDatabaseWrapper,
    question: Callable[[BaseDatabaseWrapper], Answer],
    timeout: float,
) -> Answer:
    try:
        connection.ensure_connection()
        # psycopg would wait for a frozen server for ever. By then nobody waits for the answer.
        with _hung_up_after(2 * timeout, connection):
            return question(connection)
    finally:
        close(connection)


def _hung_up_after(timeout: float, connection: BaseDatabaseWrapper) -> AbstractContextManager[None]:
    driver = driver_of(connection)
    descriptor = driver.descriptor(connection.connection) if driver else None
    return nullcontext() if descriptor is None else hung_up_after(timeout, descriptor)
