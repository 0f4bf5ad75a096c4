"""Which connections may be closed, and closing them: what nobody would miss."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from django.db import Error, connections

from .conf import config_for
from .liveness import Liveness, check_liveness, liveness_of
from .vendors import driver_of
from .watch import watch_of

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from .vendors.base import Driver

logger = logging.getLogger("django_dbhealth.closing")


def connections_of_this_thread() -> list[BaseDatabaseWrapper]:
    """Return the open connections, without making a wrapper for an alias that has none."""
    return [
        connection
        for connection in connections.all(initialized_only=True)
        if connection.connection is not None and is_of_this_thread(connection)
    ]


def is_of_this_thread(connection: BaseDatabaseWrapper) -> bool:
    """Return whether this thread made the connection."""
    return bool(connection._thread_ident == threading.get_ident())  # type: ignore[attr-defined]


def give_back(connection: BaseDatabaseWrapper) -> None:
    """Close the connection, unless something would be lost with it."""
    driver = driver_of(connection)
    if driver is not None:
        close_if(connection, driver, unwanted=True)


def close_if(connection: BaseDatabaseWrapper, driver: Driver, *, unwanted: bool) -> None:
    """Close the connection if it is lost, or ``unwanted`` and idle with nothing on it.

    One in an ``atomic()`` block, or shared with another thread, is left alone.
    """
    if connection.in_atomic_block or connection.allow_thread_sharing:
        return
    carries, watch = carries_anything(connection), watch_of(connection)
    told = connection.errors_occurred if watch is None else watch.told
    if carries and not told:
        return  # alive it is needed; lost, its next use must say so, and then it is over
    liveness = find_liveness(connection, driver, suspect=unwanted)
    if liveness is Liveness.LOST or (unwanted and liveness is Liveness.ALIVE and not carries):
        close(connection)


def carries_anything(connection: BaseDatabaseWrapper) -> bool:
    """Return whether something would be lost with the connection, atomic() apart."""
    watch = watch_of(connection)
    return not connection.autocommit or (watch is not None and watch.carries_anything())


def close(connection: BaseDatabaseWrapper) -> None:
    """Close the connection; one that was dead already may say so, which is logged."""
    try:
        connection.close()
    except Error as error:  # Django has let go of it
        log_farewell(connection, error)


def log_farewell(connection: BaseDatabaseWrapper, error: Error) -> None:
    """Log what a connection said when it was closed."""
    logger.info(
        "Closing the connection %r said: %s",
        connection.alias,
        error,
        extra={"alias": connection.alias},
    )


def find_liveness(connection: BaseDatabaseWrapper, driver: Driver, *, suspect: bool) -> Liveness:
    """Return whether the connection is alive, and remember it."""
    watch, config = watch_of(connection), config_for(connection.alias)
    in_block = connection.in_atomic_block
    if watch is not None:
        suspect = suspect or connection.errors_occurred
        return liveness_of(watch, config, suspect=suspect, in_transaction=in_block)
    liveness = check_liveness(
        driver,
        connection.connection,
        suspect=True,
        timeout=config.ping_timeout,
        in_transaction=in_block,
    )
    if liveness is Liveness.ALIVE:
        note_answer(connection)
    return liveness


def note_answer(connection: Any) -> None:
    """Let Django know that the server has answered."""
    connection.errors_occurred = False
    connection.health_check_done = True
