"""The questions every database must answer, and every driver of one."""

from __future__ import annotations

import enum
import fcntl
import math
import os
import select
import socket
import struct
import sys
import termios
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.faults import first_fit

from .server import ServerState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.faults import Fault, KnownFault
    from django_dbhealth.session_state import RuleSet

    from .server import Endpoint, Session


class Liveness(enum.Enum):
    """What a probe found out about a connection."""

    ALIVE = "alive"
    LOST = "lost"
    BUSY = "busy"  # in the middle of a statement or a result: alive, and not to be disturbed
    IN_TRANSACTION = "in a transaction"  # likewise


class Driver(ABC):
    """What a driver tells about one of its connections, called a handle here.

    A handle may be an application monitor's proxy, so no driver looks at its class.
    """

    # Closing the handle makes its cursors raise, from their own close() too.
    cursors_need_handle = False

    # The options of a connect that say for how many seconds at most it waits for the server.
    timeouts: tuple[str, ...] = ("connect_timeout",)

    @abstractmethod
    def descriptor(self, handle: Any) -> int | None:
        """Return the descriptor of the handle's socket, None for a handle that was closed."""

    @abstractmethod
    def session_id(self, handle: Any) -> int:
        """Return the number that the session was given when the handle was opened."""

    @abstractmethod
    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        """Ask the server for a sign of life, for at most ``timeout`` seconds.

        A handle that is LOST may be in the middle of the protocol: it must not be used again.
        """

    def ask(self, handle: Any, *, timeout: float) -> Liveness:
        """Do what ``ping()`` does, although a transaction may be open on the handle."""
        return self.ping(handle, timeout=timeout)

    def end(self, handle: Any) -> None:  # noqa: B027
        """Tell the driver that the connection is over: no pool may take the handle back."""

    @abstractmethod
    def has_given_up(self, handle: Any, error: Exception) -> bool:
        """Return whether, with this error, the driver itself has closed the handle's socket."""

    def has_begun(self, handle: Any) -> bool:
        """Return whether the driver knows that a statement of a transaction has run."""
        return False

    def has_failed(self, handle: Any) -> bool:
        """Return whether the transaction on the handle can only be rolled back."""
        return False

    @abstractmethod
    def commit_each_statement(self, handle: Any) -> None:
        """Turn autocommit on, for a handle that was opened just now."""

    def is_reading(self, handle: Any, *, new_references: int) -> bool:
        """Return whether an unbuffered result is being read, which a ping would disturb.

        ``new_references`` is how many more references the handle has than when it was opened.
        Where ``ping()`` can tell without disturbing, the answer is False.
        """
        return False

    def takes_writes(self, handle: Any, *, timeout: float) -> bool:
        """Return whether the server lets the session write; it has ``timeout`` seconds to say so.

        A handle of which that is not known may be in the middle of the protocol: it must not be
        used again.
        """
        return True

    def hasten_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        """Let a connect with the parameters take so long at most, where the user set no limit."""
        parameters.setdefault("connect_timeout", seconds)

    def lift_bound(self, handle: Any, options: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what ``hasten_connect()`` has set beyond the connect; ``options`` stay."""


class Vendor:
    """One kind of database server. The attributes' values here are those of an unknown one."""

    name: str  # Django's
    title: str  # in words
    drivers: ClassVar[Mapping[str, Driver]]  # by the name of the driver's module
    default_idle_timeout: float | None = None  # seconds, where nothing else is known
    has_server: bool = True
    has_server_side_cursors: bool = False  # used by Django's iterator()
    has_pool: bool = False  # Django's own, OPTIONS["pool"]
    refuses_unknown_options: bool = False  # connect() raises for them
    finds_row_values: bool = False  # (a, b) > (x, y) by an index on a and b
    session_option: str | None = None  # the key in OPTIONS of what every new session sets

    def idle_timeout_in(self, session_option: str) -> float | None:
        """Return the idle timeout in seconds that the text of ``session_option`` sets, if any."""
        return None

    def pooled_idle_time(self, pool_options: Mapping[str, Any]) -> float:
        """Return for how many seconds Django's pool may keep a connection that nobody uses."""
        return math.inf

    def pool_size(self, pool_options: Mapping[str, Any]) -> int:
        """Return how many connections Django's pool may have at most in each process."""
        return 0

    def forget_pools(self) -> Collection[object]:
        """Have Django make new pools in a forked child, and return its parent's.

        Those must never be destroyed: that would close their connections.
        """
        return ()

    def driver_problem(self) -> str | None:
        """Return what is wrong with the driver that Django has loaded, as a full sentence."""
        return None

    address_options: tuple[str, ...] = ()  # the keys in OPTIONS that say where the server is

    def address_in(self, settings: Mapping[str, Any]) -> tuple[object, ...]:
        """Return what tells one server from another in settings of DATABASES."""
        options = settings["OPTIONS"]
        return (settings["HOST"], settings["PORT"], *map(options.get, self.address_options))

    def endpoints_in(self, settings: Mapping[str, Any]) -> Sequence[Endpoint]:
        """Return where the server listens by settings of DATABASES; none: they do not say it."""
        return ()

    sessions_are_processes: bool = False  # a session's id is that of the server's process for it

    session_rules: RuleSet

    faults: ClassVar[Sequence[KnownFault]] = ()  # the first that fits counts

    def code_of(self, error: BaseException) -> int | str | None:
        """Return the code of one of the drivers' errors, None for one that has none."""
        return None

    def fault(self, error: BaseException, *, connecting: bool | None) -> Fault | None:
        """Return what one of the drivers' errors means, None for an unknown one."""
        return first_fit(self.faults, self.code_of(error), str(error), connecting=connecting)

    def driver_of(self, connection: BaseDatabaseWrapper) -> Driver | None:
        """Return the driver of a connection, None for one that is not known here.

        It is told by the backend's driver module: the handle itself may be a monitor's proxy.
        """
        module = getattr(connection, "Database", None)
        return self.drivers.get(module.__name__) if module else None

    # What the server says. The connection is Django's, guarded or not; errors are Django's too.

    def server_state(self, connection: BaseDatabaseWrapper) -> ServerState:
        """Return what the server says of itself to the connection's account."""
        return ServerState(
            product=connection.display_name,
            version="",
            unseen=("The server is not asked: django-dbhealth does not know this database.",),
        )

    def sessions(self, connection: BaseDatabaseWrapper) -> Iterator[Session]:
        """Yield the sessions that the connection's account may see, as they come in."""
        return iter(())

    def terminate(self, connection: BaseDatabaseWrapper, session_id: int) -> bool:
        """End a session; return False where there is none of that number any more."""
        return False


# Of these the first is asked for, the others are always reported. Where there is no POLLRDHUP,
# POLLHUP says it.
_POLLRDHUP = getattr(select, "POLLRDHUP", 0)
ENDED = _POLLRDHUP | select.POLLHUP  # by the other side
HUNG_UP = ENDED | select.POLLERR | select.POLLNVAL

Seen = Sequence[tuple[int, int]]  # what a look at a socket tells: descriptors with their events
Poll = Callable[[float], Seen]  # select.poll().poll()


def poller(descriptor: int) -> Poll:
    """Return the function that looks at one socket: ``(0)`` says at once what it has to tell.

    That it is readable, or that the other side has closed it. Under gevent the function is the
    system's own: a look must not switch to another greenlet.
    """
    gevent = sys.modules.get("gevent.monkey")
    poll = gevent.get_original("select", "poll")() if gevent else select.poll()
    poll.register(descriptor, select.POLLIN | _POLLRDHUP)
    look: Poll = poll.poll
    return look


def readable(descriptor: int, timeout: float = 0) -> bool:
    """Return whether the socket has something to read, or its end, within ``timeout`` seconds.

    An idle connection's socket is silent. Readable therefore means: closed, or about to be, or
    (PostgreSQL) a notification has come in.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def hang_up(descriptor: int) -> None:
    """End the connection at its socket: whatever uses the handle next is told that it is lost.

    Without this a driver would take the late answer to one question for the answer to the next.
    The duplicate keeps the number from becoming somebody else's socket meanwhile.
    """
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


@contextmanager
def hung_up_after(timeout: float, descriptor: int) -> Iterator[None]:
    """Hang up if the block takes longer, for a driver that offers no other bound.

    Raises ``RuntimeError`` where no thread can be started, and so no bound set.
    """
    # A driver that meets an error closes its socket, whose number may then be another's.
    duplicate = os.dup(descriptor)
    try:
        timer = threading.Timer(timeout, hang_up, [duplicate])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
    finally:
        os.close(duplicate)


@contextmanager
def looked_at(descriptor: int) -> Iterator[socket.socket]:
    """Return a socket object for a driver's descriptor, which stays as it is.

    Making one changes whether it blocks, under gevent and after ``socket.setdefaulttimeout()``.
    """
    blocking = os.get_blocking(descriptor)
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            yield duplicate
    finally:
        os.set_blocking(descriptor, blocking)


def holds(descriptor: int, size: int, timeout: float) -> bool:
    """Return whether so many bytes, or the end, have come in within ``timeout`` seconds."""
    deadline = monotonic() + timeout
    left = timeout
    while readable(descriptor, left):
        [count] = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
        if count == 0 or count >= size:
            return True
        left = deadline - monotonic()
        if left <= 0:
            break
        sleep(min(0.01, left))  # poll() has nothing more to tell
        left = max(0.0, deadline - monotonic())
    return False
