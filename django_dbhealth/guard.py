"""What a connection carries, watched from its birth: the session's state, and its last use.

Two mixins over Django's own classes. They change nothing that a statement does; they note it.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

from django.db import Error

from .session_state import SessionState
from .vendors import driver_of, vendor_named

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.utils import CursorWrapper

    from .vendors.base import Driver, Vendor

# What a mixin is mixed into is Django's; django-stubs does not know its private methods.
Base: Any = object

# Django's private hooks that the mixins override. handler.py looks for them before it starts.
CONNECTION_HOOKS = (
    "_commit",
    "_rollback",
    "chunked_cursor",
    "connect",
    "make_cursor",
    "make_debug_cursor",
)
CURSOR_HOOKS = ("_execute", "_executemany", "callproc")


class Watch:
    """What is known of one connection since it was opened."""

    __slots__ = (
        "_connection",
        "_references",
        "cursors",
        "driver",
        "in_statement",
        "last_used",
        "lost",
        "session",
        "vendor",
    )

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        vendor, driver = vendor_named(connection.vendor), driver_of(connection)
        assert vendor is not None  # others are not watched
        assert driver is not None
        self._connection = weakref.ref(connection)
        self.vendor: Vendor = vendor
        self.driver: Driver = driver
        self.session = SessionState(vendor.session_rules)
        self.reset()

    def reset(self) -> None:
        """Begin anew, for a connection that was opened just now."""
        self.session.forget()
        self.cursors: weakref.WeakSet[CursorWrapper] = weakref.WeakSet()  # of .iterator()
        self.in_statement = False
        self.lost = False  # a probe that failed may have left the handle in mid-protocol
        self.last_used = time.monotonic()
        self._references = self._count_references()

    def __enter__(self) -> None:
        """Note that a statement begins."""
        self.in_statement = True

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Note that it ended, well or with an error of the database's.

        Any other exception (of a signal handler, a time limit) has left the connection in the
        middle of the protocol, and the statement stays open.
        """
        self.last_used = time.monotonic()
        self.in_statement = not (error is None or isinstance(error, Error))

    def idle_seconds(self) -> float:
        """Return the seconds since the last statement ended."""
        return time.monotonic() - self.last_used

    def is_reading(self) -> bool:
        """Return whether rows of an unbuffered result are still to come."""
        connection = self._connection()
        return connection is not None and self.driver.is_reading(
            connection.connection, new_references=self._count_references() - self._references
        )

    def _count_references(self) -> int:
        connection = self._connection()
        return sys.getrefcount(connection.connection) if connection is not None else 0

    def carries_anything(self) -> bool:
        """Return whether session state, or a cursor that is being read, would be lost with it."""
        return bool(self.session) or bool(self.cursors)


def watch_of(connection: BaseDatabaseWrapper) -> Watch | None:
    """Return what was seen on the connection, None for one that nobody watches."""
    return getattr(connection, "dbhealth_watch", None)


class WatchedConnection(Base):  # type: ignore[misc]
    """A mixin over a backend's DatabaseWrapper."""

    dbhealth_watch: Watch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ensure_watch()

    def _ensure_watch(self) -> None:
        if watch_of(self) is None:  # a backend may connect while it is being made
            self.dbhealth_watch = Watch(self)

    def connect(self) -> None:
        self._ensure_watch()
        try:
            super().connect()
        finally:
            # What init_command and the receivers of connection_created set is set again in every
            # new session: it is not counted.
            self.dbhealth_watch.reset()

    def _commit(self) -> None:
        super()._commit()
        self.dbhealth_watch.session.transaction_ended()

    def _rollback(self) -> None:
        super()._rollback()
        self.dbhealth_watch.session.rolled_back()
        self.dbhealth_watch.session.transaction_ended()

    def make_cursor(self, cursor: Any) -> CursorWrapper:
        return watched_cursor(super().make_cursor(cursor))

    def make_debug_cursor(self, cursor: Any) -> CursorWrapper:
        return watched_cursor(super().make_debug_cursor(cursor))

    def chunked_cursor(self) -> CursorWrapper:
        cursor: CursorWrapper = super().chunked_cursor()
        self.dbhealth_watch.cursors.add(cursor)
        return cursor


class WatchedCursor(Base):  # type: ignore[misc]
    """A mixin over Django's CursorWrapper."""

    db: WatchedConnection

    def _execute(self, sql: Any, params: Any, *ignored: Any) -> Any:
        with self.db.dbhealth_watch:
            result = super()._execute(sql, params, *ignored)
        self.db.dbhealth_watch.session.observe(sql, params)
        return result

    def _executemany(self, sql: Any, param_list: Any, *ignored: Any) -> Any:
        with self.db.dbhealth_watch:
            result = super()._executemany(sql, param_list, *ignored)
        self.db.dbhealth_watch.session.observe(sql)
        return result

    def close(self) -> None:
        self.db.dbhealth_watch.cursors.discard(self)
        getattr(super(), "close", self.cursor.close)()  # Django's has none of its own

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        with self.db.dbhealth_watch:
            return super().callproc(*args, **kwargs)


def watched_cursor(cursor: CursorWrapper) -> CursorWrapper:
    """Return the cursor, watched. Whatever class the backend made stays its base."""
    cursor.__class__ = derived_class(type(cursor), WatchedCursor)  # type: ignore[arg-type]
    return cursor


def watch_connection(connection: BaseDatabaseWrapper) -> None:
    """Watch the connection from now on. Calling it again changes nothing."""
    if watch_of(connection) is None:
        connection.__class__ = derived_class(type(connection), WatchedConnection)  # type: ignore[arg-type]
        connection.dbhealth_watch = Watch(connection)  # type: ignore[attr-defined]


@functools.cache
def derived_class(base: Any, mixin: Any) -> Any:
    """Derive the class that adds the mixin, under the name of its base: logs and repr() show it."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names)
