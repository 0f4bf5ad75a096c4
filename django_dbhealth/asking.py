"""Asking a server on a connection of the command's own: bounded in time, and always closed."""

from __future__ import annotations

import math
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections

from .backoff import Backoff
from .conf import config_for
from .diagnosis import classify
from .faults import Kind
from .liveness import Liveness
from .own_connection import close, own_connection
from .processes import Locator, OwnEnd, all_sockets, own_end, sockets_to
from .report import Problem, problem_of
from .vendors import driver_of, vendor_for_engine, vendor_named
from .vendors.base import Vendor, hang_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .processes import Holding, Sockets
    from .vendors.server import ServerState, Session

# What a connect or a question ends with: also settings that the driver does not take.
FAILURES = (Error, ImproperlyConfigured, OSError, TypeError, ValueError)

PINGS = 5
SHARE_OF_TIMEOUT = 0.1  # how late a server that does not answer may be noticed


@dataclass(frozen=True, kw_only=True)
class Target:
    """A database, and the alias whose account asks its server.

    Where no slot is free the connect is tried again for ``slot_timeout`` seconds; ``tell`` gets a
    sentence that says so.
    """

    alias: str
    through: str
    slot_timeout: float
    tell: Callable[[str], None]

    @property
    def vendor(self) -> Vendor:
        return vendor_of_alias(self.alias)

    @contextmanager
    def asked(self, *, timeout: float = math.inf) -> Iterator[Server]:
        """Connect for the block. Raises one of the FAILURES, as the block's questions do.

        The connect and each question may take PING_TIMEOUT, or ``timeout`` if that is shorter.
        """
        timeout = min(timeout, config_for(self.through).ping_timeout)
        connection = self._connect(timeout)
        try:
            with Server(connection, timeout) as server:
                yield server
        finally:
            with suppress(*FAILURES):
                close(connection)

    def problem(self, error: BaseException) -> Problem:
        """Return what one of the FAILURES means."""
        passwords = [self._settings(alias).get("PASSWORD") for alias in (self.alias, self.through)]
        return problem_of(error, self.through, [str(each) for each in passwords if each])

    def sockets(self) -> list[Holding]:
        """Return which processes of this machine have sockets to the server; it is not asked."""
        return sockets_to(self.vendor.endpoints_in(self._settings(self.alias)))

    def _settings(self, alias: str) -> dict[str, Any]:
        settings: dict[str, Any] = connections.settings[alias]
        return settings

    def _connect(self, timeout: float) -> BaseDatabaseWrapper:
        backoff = Backoff(now=time.monotonic(), timeout=self.slot_timeout)
        has_told = False
        while True:
            try:
                return opened(self.through, timeout)
            except FAILURES as error:
                fault = classify(error, using=self.through)
                delay = backoff.next_delay(time.monotonic())
                if fault is None or fault.kind is not Kind.NO_FREE_SLOT or delay is None:
                    raise
                if not has_told:
                    self.tell(self._waiting(fault.title))
                    has_told = True
            time.sleep(delay)

    def _waiting(self, title: str) -> str:
        return (
            f"No slot is free for {self.through!r} ({title}): trying again for up to "
            f"{self.slot_timeout:g} s. --using-alias asks through a reserved account, --wait 0 "
            "does not wait."
        )


def vendor_of_alias(alias: str) -> Vendor:
    """Return what is known of a database, also of one whose driver cannot be imported."""
    return vendor_for_engine(connections.settings[alias]["ENGINE"]) or Vendor()


def opened(alias: str, timeout: float) -> BaseDatabaseWrapper:
    """Return a connection of our own, opened within ``timeout`` seconds.

    Raises TimeoutError. In a thread, because what Django sends when it connects would wait for ever
    on a server that freezes just then.
    """
    connection = own_connection(alias)
    connection.inc_thread_sharing()
    is_open: Future[None] = Future()
    is_given_up = threading.Event()

    def run() -> None:
        try:
            connection.ensure_connection()
            if is_given_up.is_set():
                close(connection)
            is_open.set_result(None)
        except BaseException as error:  # noqa: BLE001 (raised where the connection is waited for)
            is_open.set_exception(error)

    threading.Thread(target=run, name=f"dbhealth {alias}", daemon=True).start()
    try:
        is_open.result(timeout)
    except TimeoutError:
        is_given_up.set()
        raise _silent(timeout) from None
    return connection


def _silent(timeout: float) -> TimeoutError:
    return TimeoutError(f"The server did not answer within {timeout:g} s.")


class Server:
    """What one connection can ask its server. A server that stops answering is an error."""

    def __init__(self, connection: BaseDatabaseWrapper, timeout: float) -> None:
        self._connection = connection
        self._driver = driver_of(connection)
        self._timeout = timeout
        self.vendor = vendor_named(connection.vendor) or Vendor()
        descriptor = self._driver.descriptor(connection.connection) if self._driver else None
        self._own = own_end(descriptor) if descriptor is not None else OwnEnd()
        self._bound = Bound(descriptor, self._timeout)
        self._looker = ThreadPoolExecutor(1, "dbhealth sockets")

    def __enter__(self) -> Self:
        self._bound.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bound.stop()
        self._looker.shutdown()

    def state(self) -> ServerState:
        """Return what the server says of itself."""
        with self._bound:
            return self.vendor.server_state(self._connection)

    def sessions(self) -> Iterator[Session]:
        """Yield the sessions that the account may see."""
        sessions = iter(self.vendor.sessions(self._connection))
        while True:
            with self._bound:
                session = next(sessions, None)
            if session is None:
                return
            yield session

    def terminate(self, session_id: int) -> bool:
        """End a session; return whether it was still there."""
        with self._bound:
            return self.vendor.terminate(self._connection, session_id)

    def round_trip_ms(self) -> float | None:
        """Return how long a question and its answer take, the median of a few."""
        return median(self.ping_ms() for _ in range(PINGS)) if self._driver else None

    def ping_ms(self) -> float:
        """Return how long a question and its answer take; 0 for a database without a server."""
        if self._driver is None:
            return 0.0
        began = time.perf_counter()
        liveness = self._driver.ping(self._connection.connection, timeout=self._timeout)
        if liveness is not Liveness.ALIVE:
            raise _silent(self._timeout)
        return (time.perf_counter() - began) * 1000

    def look_for_processes(self) -> Future[Sockets]:
        """Begin to look at this machine's sockets, which goes on while the server is asked."""
        return self._looker.submit(all_sockets)

    def locator(self, state: ServerState, sockets: Sockets) -> Locator:
        """Return what names the processes behind the sessions."""
        return Locator(
            sockets,
            self._own,
            state.client_address,
            sessions_are_processes=self.vendor.sessions_are_processes,
        )


class Bound:
    """Hangs up when a block lasts longer than ``seconds``: its driver then says that it is lost.

    One thread looks on, for any number of blocks; a timer for each would cost more than they do.
    """

    def __init__(self, descriptor: int | None, seconds: float) -> None:
        self._seconds = seconds
        self._began: float | None = None
        self._ended = threading.Event()
        # A duplicate: the number of a socket that the driver has closed may become another's.
        self._duplicate = None if descriptor is None else os.dup(descriptor)
        self._thread = threading.Thread(target=self._look_on, name="dbhealth bound", daemon=True)

    def start(self) -> None:
        if self._duplicate is not None:
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._duplicate is not None:
            self._thread.join()
            os.close(self._duplicate)

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._began = None

    def _look_on(self) -> None:
        assert self._duplicate is not None
        while not self._ended.wait(self._seconds * SHARE_OF_TIMEOUT):
            began = self._began
            if began is not None and time.monotonic() - began > self._seconds:
                hang_up(self._duplicate)
                return
