"""What is known of one connection since it was opened: the session's state, and its last use.

No Django in it. What is particular to Django's connections stands in replacing.py, to those without
Django in dbapi.py.
"""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sized
from time import monotonic
from typing import TYPE_CHECKING, Any

from .session_state import SessionState
from .vendors.base import HUNG_UP, poller

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .conf import Config
    from .registry import Opening
    from .vendors.base import Driver, Poll, Seen, Vendor

SERVER_SIDE_CURSOR = "a server-side cursor"

# Lost handles whose other side has hung up: of mysqlclient's it takes a while to let go, and not
# while somebody waits for the one in its place.
remains: list[Any] = []


class Watch(ABC):
    """What is known of one connection since it was opened."""

    __slots__ = (
        "__weakref__",
        "_references",
        "bounded",
        "closed",
        "committed",
        "committing",
        "config_for",
        "connecting",
        "cursors",
        "driver",
        "generation",
        "healed_since",
        "in_doubt",
        "interrupted",
        "last_seen",
        "last_used",
        "lost",
        "opening",
        "poll",
        "refused_write",
        "savepoints",
        "session",
        "set_up",
        "told",
        "tried_seconds",
        "used",
        "vendor",
    )

    # Errors that are no matter of the connection, and that programs make on purpose.
    of_data: tuple[type[Exception], ...]

    def __init__(self, vendor: Vendor, driver: Driver, config_for: Callable[[str], Config]) -> None:
        self.vendor = vendor
        self.driver = driver
        self.config_for = config_for  # by alias
        self.session = SessionState(vendor.session_rules)
        self.connecting = False
        self.set_up = False  # by Django: the rest of the connect is the program's
        self.tried_seconds = 0.0  # to connect, until the last refusal
        self.opening: Opening | None = None  # when, where and by whom it was opened
        self.generation = 0  # of the handle: a cursor of an older one is stale,
        self.healed_since = 0  # and follows to the new one, if it is not older than this
        self.lost = False
        self.reset()

    # What only its owner knows

    @property
    @abstractmethod
    def alias(self) -> str:
        """The connection's name."""

    @abstractmethod
    def handle(self) -> Any:
        """Return the driver's connection, None where there is none."""

    @abstractmethod
    def address(self) -> object:
        """Return what is equal for connections to the same server."""

    @abstractmethod
    def sender(self) -> type:
        """Return the sender of its signals."""

    @abstractmethod
    def is_in_transaction(self) -> bool:
        """Return whether a transaction is open, or autocommit is off."""

    @abstractmethod
    def is_replaceable(self) -> bool:
        """Return whether the transaction, if there is one, has nothing in it yet."""

    @abstractmethod
    def why_kept(self) -> list[str]:
        """Return why a loss is not healed now, but for its session state."""

    @abstractmethod
    def replace(self) -> None:
        """Open another connection in the place of a lost one."""

    def is_replaced_anyway(self) -> bool:
        """Return whether it would be replaced now without the guard, whatever it carries."""
        return False

    def left_open(self) -> tuple[str, ...]:
        """Return what is lost with it beside its session state, in plain words."""
        return ()

    def idle_limit(self) -> float | None:
        """Return after how many idle seconds the server drops it, None where nobody knows."""
        return None

    # What has happened to it

    def reset(self) -> None:
        """Begin anew, for a connection that was opened just now."""
        self.poll: Poll | None = None  # made when it is needed
        self.generation += 1
        if not self.lost:  # what was before is gone because the program wanted it so
            self.healed_since = self.generation
        self.session.forget()
        self.cursors: Collection[Any] = ()  # of .iterator(), weakly
        self.bounded = False  # a connect is ours, and must not hang where the user's own would
        self.in_doubt = False  # an error passed since it was last known to be alive
        self.interrupted = False  # in a statement, by an exception that is not the database's
        self.refused_write = False  # a statement, by a server that may be read-only
        self.lost = False  # known, so that nothing needs to be asked
        self.told = False  # the program, by an error, that it is lost
        self.committing = False
        self.committed = False  # MySQL: and autocommit is being put back
        self.closed = False  # the lost handle was closed, and there is no other yet
        self._nothing_has_run()
        self.last_used = self.last_seen = monotonic()
        self._references = self._count_references()

    def transaction_began(self) -> None:
        """Note that from here on nothing has run, of a transaction that begins or has ended."""
        self.session.transaction_began()
        self._nothing_has_run()

    def _nothing_has_run(self) -> None:
        self.used = False
        self.savepoints: list[str] = []  # sent, while nothing else was

    def transaction_ended(self) -> None:
        """Note that a transaction has ended, and that the next one has nothing in it."""
        self.session.transaction_ended()
        self.transaction_began()

    def note_answer(self) -> None:
        """Note that the server has answered."""
        self.in_doubt = self.refused_write  # until the server could be asked
        self.interrupted = False
        self.last_used = monotonic()

    def is_open(self) -> bool:
        """Return whether there is a connection that nobody has closed."""
        return self.handle() is not None and not self.closed

    def idle_seconds(self) -> float:
        """Return the seconds since the last sign of life: a statement that came back, a probe."""
        return monotonic() - self.last_used

    def make_poll(self) -> Poll:
        """Return what looks at the socket: one poll object for the life of the handle."""
        remains.clear()
        handle = self.handle()
        descriptor = self.driver.descriptor(handle) if handle is not None else None
        self.poll = _says_closed if descriptor is None else poller(descriptor)
        return self.poll

    def has_hung_up(self, seen: Seen) -> bool:
        """Return whether the other side has closed the socket; ``seen`` is a look's, just now."""
        seen = seen or (self.poll or self.make_poll())(0)  # one socket
        return bool(seen and seen[0][1] & HUNG_UP)

    def is_reading(self) -> bool:
        """Return whether rows of an unbuffered result are still to come."""
        new = self._count_references() - self._references  # before the call below holds one more
        return self.driver.is_reading(self.handle(), new_references=new)

    def _count_references(self) -> int:
        return sys.getrefcount(self.handle())

    def cursor_has_run(self, cursor: Any) -> None:
        """Note a cursor of ``.iterator()``: it has rows to give until it is closed or forgotten."""
        self.cursors = weakref.WeakSet((*self.cursors, cursor))

    def cursor_was_closed(self, cursor: Any) -> None:
        """Note that such a cursor has nothing more to give."""
        self.cursors = weakref.WeakSet(each for each in self.cursors if each is not cursor)

    def carries_anything(self) -> bool:
        """Return whether session state, or a cursor that is being read, would be lost with it."""
        return bool(self.session) or bool(self.cursors)

    def session_state(self) -> tuple[str, ...]:
        """Return what a new session would not have, in plain words."""
        if not self.carries_anything():
            return ()
        # A client-side cursor has its rows already, and only a server-side one has a name.
        held = (SERVER_SIDE_CURSOR,) if any(map(_name, list(self.cursors))) else ()
        return self.session.descriptions() + held

    def forget_session_state(self) -> None:
        """Note that it was lost, and that somebody was told."""
        self.session.forget()
        self.cursors = ()


def sends_nothing(parameters: object) -> bool:
    """Return whether executemany() has nothing to send: MySQL's drivers then ask nobody."""
    return isinstance(parameters, Sized) and len(parameters) == 0


def _says_closed(_timeout: float) -> Seen:
    return [(-1, HUNG_UP)]


def _name(cursor: Any) -> str | None:
    return getattr(cursor.cursor, "name", None)


def watch_of(connection: BaseDatabaseWrapper) -> Watch | None:
    """Return what was seen on the connection, None for one that nobody watches."""
    return getattr(connection, "dbhealth_watch", None)
