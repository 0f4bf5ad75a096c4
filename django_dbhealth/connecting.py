"""Opening a connection: for some time a refusal is no error yet."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from django.db import Error

from .backoff import Backoff
from .closing import close, connections_of_this_thread, give_back
from .conf import config_for
from .faults import Circumstances, Kind
from .signals import connection_refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .watch import Watch

logger = logging.getLogger("django_dbhealth.guard")


# Wrong credentials may lock an account; an hourly quota is not there in a minute.
WORTH_WAITING = (Kind.UNREACHABLE, Kind.NO_FREE_SLOT)

COMMAND_TIMEOUT = 60.0  # seconds: a server restarts in less


class Patience(NamedTuple):
    """For how long a refused connection is tried again, and how the time is spent."""

    timeout: float | None  # seconds; None: what the setting says, or a minute
    sleep: Callable[[float], None]


# What a command that runs in this thread or task says; else the setting holds.
_patience: ContextVar[Patience | None] = ContextVar("django_dbhealth_patience", default=None)


@contextmanager
def patient(timeout: float | None, sleep: Callable[[float], None]) -> Iterator[None]:
    """Let connects in the block be tried again for ``timeout`` seconds."""
    token = _patience.set(Patience(timeout, sleep))
    try:
        yield
    finally:
        _patience.reset(token)


def _patience_for(alias: str) -> tuple[float, Callable[[float], None]]:
    setting = config_for(alias).connect_retry_timeout
    patience = _patience.get()
    if patience is None:
        return setting, time.sleep
    if patience.timeout is None:
        return setting or COMMAND_TIMEOUT, patience.sleep
    return patience.timeout, patience.sleep


def connect_patiently(
    connection: BaseDatabaseWrapper, watch: Watch, connect: Callable[[], None]
) -> None:
    """Connect; try again as long as CONNECT_RETRY_TIMEOUT or the command allows.

    What cannot be cured by waiting (credentials, hourly quotas) is raised at once.
    """
    began = time.monotonic()
    backoff = None
    while True:
        watch.set_up = False
        try:
            connect()
            return
        except (Error, connection.Database.Error) as error:  # type: ignore[attr-defined]
            if watch.set_up:
                raise  # of a receiver of connection_created: what it does is not done twice
            watch.tried_seconds = time.monotonic() - began
            error.dbhealth_circumstances = Circumstances(  # type: ignore[union-attr]
                alias=connection.alias,
                connecting=True,
                in_transaction=False,
                tried_seconds=watch.tried_seconds,
            )
            fault = watch.vendor.fault(error, connecting=True)
            if fault is None or fault.kind not in WORTH_WAITING:
                raise
            now = time.monotonic()
            if backoff is None:
                timeout, sleep = _patience_for(connection.alias)
                backoff = Backoff(now=began, timeout=timeout)
            delay = backoff.next_delay(now)
            _report(connection, watch, fault.kind, error, now - began, delay)
            if connection.connection is not None:  # refused after it had been opened
                close(connection)
            if delay is None:
                raise
        if fault.kind is Kind.NO_FREE_SLOT:
            _give_back_idle(connection)
        watch.bounded = True
        sleep(delay)


def _give_back_idle(connection: BaseDatabaseWrapper) -> None:
    """Close what this thread holds and does not use: it might wait for a slot of its own."""
    for other in connections_of_this_thread():
        if other is not connection:
            give_back(other)


def _report(
    connection: BaseDatabaseWrapper,
    watch: Watch,
    kind: Kind,
    error: Exception,
    duration: float,
    delay: float | None,
) -> None:
    then = (
        f"Given up after {duration:.1f} s."
        if delay is None
        else f"The next try is in {delay:.1f} s."
    )
    logger.warning(
        "The connection %r was refused, %s: %s. %s",
        connection.alias,
        kind.value,
        error,
        then,
        extra={"alias": connection.alias},
    )
    connection_refused.send_robust(
        sender=type(connection),
        alias=connection.alias,
        reason=kind.value,
        idle_seconds=watch.idle_seconds(),
        duration=duration,
    )
