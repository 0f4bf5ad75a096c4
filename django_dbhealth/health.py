"""Whether each database answers now: asked on a connection of its own, once for all who ask."""

from __future__ import annotations

import enum
import logging
import math
import threading
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from django.db import connections

from .conf import config_for
from .diagnosis import classify
from .liveness import Liveness
from .own_connection import own_connection
from .vendors import driver_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.db.backends.base.base import BaseDatabaseWrapper

logger = logging.getLogger("django_dbhealth.health")

DUMMY = "django.db.backends.dummy"  # what Django makes of an alias that is {}

SHARED_FOR = 1.0  # seconds: orchestrators ask every few


class Status(enum.IntEnum):
    """How a database is, the worst last."""

    PASS = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, kw_only=True)
class Health:
    """How a database is, and why it is not better: words that name no host, account or version."""

    status: Status
    reason: str = ""


PASSING = Health(status=Status.PASS)
READ_ONLY = Health(status=Status.WARN, reason="read-only")
SILENT = Health(status=Status.FAIL, reason="no answer in time")


def aliases() -> list[str]:
    """Return the aliases of DATABASES behind which there is a database."""
    return [alias for alias, each in connections.settings.items() if each["ENGINE"] != DUMMY]


def check_health(aliases: Iterable[str]) -> dict[str, Health]:
    """Return how the databases are, all asked at the same time, each within its PING_TIMEOUT.

    At most one connection per alias is opened in this process at a time; what it found is true for
    everybody who asks within the next second.
    """
    probes = {alias: _probe_of(alias) for alias in aliases}
    return {alias: probe.health() for alias, probe in probes.items()}


# One probe for all who ask


class _Probe:
    """One question to one database, asked in a thread of its own.

    The thread is a daemon: one that a frozen server holds must not keep the process from ending.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._deadline = monotonic() + config_for(alias).ping_timeout
        self._ended = math.inf
        self._answer: Future[Health] = Future()
        threading.Thread(target=self._run, name=f"dbhealth {alias}", daemon=True).start()

    def _run(self) -> None:
        try:
            health = _ask(self._alias, self._deadline)
        except BaseException as error:  # noqa: BLE001 (whatever it is, the database is of no use)
            health = _failed(self._alias, error)
        self._ended = monotonic()
        self._answer.set_result(health)

    def is_fresh(self) -> bool:
        """Return whether it still asks, or has ended less than a second ago."""
        return monotonic() - self._ended < SHARED_FOR

    def health(self) -> Health:
        try:
            return self._answer.result(max(0.0, self._deadline - monotonic()))
        except TimeoutError:
            return SILENT


_probes: dict[str, _Probe] = {}
_lock = threading.Lock()


def _probe_of(alias: str) -> _Probe:
    with _lock:
        probe = _probes.get(alias)
        if probe is None or not probe.is_fresh():
            probe = _probes[alias] = _Probe(alias)
        return probe


# One question


def _ask(alias: str, deadline: float) -> Health:
    """Connect, ask, close. What fails is raised; what hangs ends soon after the deadline."""
    connection = own_connection(alias)
    with (
        connection.wrap_database_errors,
        closing(connection.get_new_connection(connection.get_connection_params())) as handle,
    ):
        return _health_of(connection, handle, deadline)


def _health_of(connection: BaseDatabaseWrapper, handle: Any, deadline: float) -> Health:
    driver = driver_of(connection)
    if driver is None:
        with closing(handle.cursor()) as cursor:
            cursor.execute(f"SELECT 1{connection.features.bare_select_suffix}")
        return PASSING
    if driver.ping(handle, timeout=max(0.0, deadline - monotonic())) is not Liveness.ALIVE:
        return SILENT
    if driver.takes_writes(handle, timeout=max(0.0, deadline - monotonic())):
        return PASSING
    return READ_ONLY


def _failed(alias: str, error: BaseException) -> Health:
    logger.warning("The database %r cannot be used: %s", alias, error, extra={"alias": alias})
    fault = classify(error)
    return Health(status=Status.FAIL, reason=fault.kind.value if fault else type(error).__name__)
