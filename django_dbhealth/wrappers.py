"""Django's connections, cursors and errors, with the guard in between.

Three mixins: what they are mixed into stays as it is.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.db.utils import DatabaseErrorWrapper
from django.utils.functional import cached_property

from .conf import config_for
from .connecting import connect_patiently
from .guard import before_use, note_failure, note_interruption
from .liveness import Liveness, check_liveness
from .notes import note_statement
from .registry import find_opener, note_opened
from .replacing import BLOCK, DjangoWatch
from .watch import remains, sends_nothing, watch_of

if TYPE_CHECKING:
    from types import TracebackType

    from .watch import Watch

# What a mixin is mixed into is Django's; django-stubs does not know its private methods.
Base: Any = object

# Django's private hooks that the mixins override. handler.py looks for them before it starts.
CONNECTION_HOOKS = (
    "_close",
    "_commit",
    "_rollback",
    "_savepoint",
    "_set_autocommit",
    "chunked_cursor",
    "close_if_health_check_failed",
    "connect",
    "get_connection_params",
    "get_new_connection",
    "make_cursor",
    "make_debug_cursor",
    "set_autocommit",
    "set_rollback",
    "wrap_database_errors",
)
CONNECTION_ATTRIBUTES = (
    *BLOCK,
    "_thread_ident",
    "closed_in_transaction",
    "errors_occurred",
    "health_check_done",
    "health_check_enabled",
    "run_commit_hooks_on_set_autocommit_on",
)
CURSOR_HOOKS = ("_execute_with_wrappers", "callproc")

# The server answered, or its socket was looked at, so few seconds ago that another look would tell
# nothing more: what is lost between a look and its statement, which may take as long, is not seen
# either.
JUST_NOW = 0.0005


# The handles that a pool was given back, and when each gave its last sign of life.
_pooled: WeakKeyDictionary[Any, float] = WeakKeyDictionary()


class MarkedForRollback:
    """The attribute needs_rollback, whose value stays in the instance: reading it costs nothing."""

    def __set__(self, connection: Any, value: bool) -> None:
        connection.__dict__["needs_rollback"] = value and not connection.dbhealth_watch.lost


class WatchedConnection(Base):  # type: ignore[misc]
    """A mixin over a backend's DatabaseWrapper."""

    connection: Any

    @cached_property
    def dbhealth_watch(self) -> DjangoWatch:
        return DjangoWatch(self)

    # Opening and closing

    def connect(self) -> None:
        watch = self.dbhealth_watch
        if watch.connecting:  # a log handler that writes to the database which it writes of
            super().connect()
            return
        # Who has opened a lost connection has opened the one that takes its place.
        opener = watch.opening[1] if watch.lost and watch.opening else find_opener()
        watch.connecting, was_lost = True, watch.lost
        watch.last_seen = math.inf  # meanwhile a look would tell nothing
        failed = True
        try:
            connect_patiently(self, watch, super().connect)
            failed = False
        finally:
            # What init_command and the receivers of connection_created set is set again in every
            # new session: it is not counted.
            watch.connecting = False
            watch.reset()
            watch.lost = was_lost and self.connection is None  # the next connect heals it
            watch.in_doubt = failed  # a receiver's statement may have lost it again
        note_opened(watch, opener)

    def get_connection_params(self) -> dict[str, Any]:
        parameters: dict[str, Any] = super().get_connection_params()
        watch = self.dbhealth_watch
        if watch.bounded:
            seconds = math.ceil(config_for(self.alias).ping_timeout)
            watch.driver.hasten_connect(parameters, seconds)
        return parameters

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        handle = super().get_new_connection(conn_params)
        if self.dbhealth_watch.bounded:
            self.dbhealth_watch.driver.lift_bound(handle, self.settings_dict["OPTIONS"])
        pool = getattr(self, "pool", None)
        if pool is None:
            return handle
        # Nobody has looked at it since it was given back. At most all in the pool are lost.
        driver, config = self.dbhealth_watch.driver, config_for(self.alias)
        deadline = monotonic() + config.ping_timeout
        for _ in range(getattr(pool, "max_size", 0)):
            suspect = monotonic() - _pooled.get(handle, -math.inf) > config.ping_after
            timeout = max(0.0, deadline - monotonic())
            liveness = check_liveness(driver, handle, suspect=suspect, timeout=timeout)
            if liveness is not Liveness.LOST:
                break
            pool.putconn(handle)  # never just dropped: that would cost its slot
            handle = super().get_new_connection(conn_params)
        return handle

    def init_connection_state(self) -> None:
        super().init_connection_state()
        self.dbhealth_watch.set_up = True

    def _close(self) -> None:
        watch = self.dbhealth_watch
        if watch.closed:
            return
        remains.clear()
        if self.connection is not None and getattr(self, "pool", None) is not None:
            _pooled[self.connection] = watch.last_used
        try:
            super()._close()
        except Error:
            if not watch.lost:
                raise

    # Before use

    def close_if_health_check_failed(self) -> None:
        """Heal the connection before a cursor is made, or BEGIN; Django calls it for each."""
        watch = self.dbhealth_watch
        now = monotonic()
        if now - watch.last_seen > JUST_NOW or watch.in_doubt:
            before_use(self, watch, now)
        if self.health_check_enabled and not self.health_check_done:  # else it would do nothing
            super().close_if_health_check_failed()

    def set_autocommit(self, autocommit: bool, *args: Any, **kwargs: Any) -> None:
        if self.dbhealth_watch.connecting:
            super().set_autocommit(autocommit, *args, **kwargs)
            return
        if autocommit and self.connection is None and self.settings_dict["AUTOCOMMIT"]:
            # The end of a block that has lost its connection: every new one begins so, and a
            # connect that failed now would hide the block's error.
            self.autocommit = True
            return
        changes = self.autocommit != autocommit
        super().set_autocommit(autocommit, *args, **kwargs)
        if changes:
            self.dbhealth_watch.transaction_began()

    # Transactions

    def _set_autocommit(self, autocommit: bool) -> None:
        watch = self.dbhealth_watch
        has_committed = self.run_commit_hooks_on_set_autocommit_on and not watch.used
        watch.committed = autocommit and has_committed
        try:
            super()._set_autocommit(autocommit)
        except Error as error:
            if not autocommit or watch.connecting:
                raise
            if not watch.driver.has_given_up(self.connection, error):
                raise
            if has_committed:
                # Only the connection is gone, and its next use sees to that. A recorded error
                # would have a boundary close it, and nobody would hear of its session state.
                self.errors_occurred = False
                watch.in_doubt = True
                return
            self._close()  # or nobody would ever put autocommit back
            self.connection = None
            raise
        finally:
            watch.committed = False

    def _savepoint(self, sid: str) -> None:
        watch = self.dbhealth_watch
        nothing_has_run = not watch.used
        super()._savepoint(sid)
        if nothing_has_run:
            watch.used = False
            watch.savepoints.append(sid)

    def _commit(self) -> None:
        watch = self.dbhealth_watch
        watch.committing = True
        try:
            super()._commit()
        finally:
            watch.committing = False
        watch.transaction_ended()

    def _rollback(self) -> None:
        super()._rollback()
        self.dbhealth_watch.session.rolled_back()
        self.dbhealth_watch.transaction_ended()

    # A transaction that went with its connection is rolled back already. Its block is to fail in
    # COMMIT, and not to end without a word after somebody inside has caught the error: so what
    # Django marks for a rollback after the loss is not marked. What the user marks is.

    needs_rollback = MarkedForRollback()

    def set_rollback(self, rollback: bool) -> None:
        super().set_rollback(rollback)
        self.__dict__["needs_rollback"] = rollback

    # Errors and cursors

    @cached_property
    def wrap_database_errors(self) -> DatabaseErrorWrapper:
        return WatchedErrors(self)

    @cached_property
    def dbhealth_cursor_class(self) -> Any:
        """The class of the connection's cursors, None where the backend makes its own.

        Making one of the right class takes half the time of changing its class.
        """
        if getattr(super().make_cursor, "__func__", None) is not BaseDatabaseWrapper.make_cursor:
            return None
        return derived_class(CursorWrapper, WatchedCursor)

    def make_cursor(self, cursor: Any) -> Any:
        kind = self.dbhealth_cursor_class
        if kind is None:
            return self._watched_cursor(super().make_cursor(cursor))
        watched = kind(cursor, self)
        watched.generation = self.dbhealth_watch.generation
        return watched

    def make_debug_cursor(self, cursor: Any) -> Any:
        return self._watched_cursor(super().make_debug_cursor(cursor))

    def _watched_cursor(self, cursor: Any) -> Any:
        """Return the cursor, watched. Whatever class the backend made stays its base."""
        kind: Any = type(cursor)
        cursor.__class__ = derived_class(kind, WatchedCursor)
        cursor.generation = self.dbhealth_watch.generation
        return cursor

    def chunked_cursor(self) -> Any:
        cursor = super().chunked_cursor()
        kind: Any = type(cursor)
        cursor.__class__ = derived_class(kind, ChunkedCursor)
        return cursor


class WatchedErrors(DatabaseErrorWrapper):
    """Django's translator of a driver's errors: every one passes here."""

    wrapper: Any

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        watch = self.wrapper.dbhealth_watch
        try:
            super().__exit__(kind, error, traceback)
        except Error as translated:
            watch.in_doubt = self.wrapper.errors_occurred
            note_failure(self.wrapper, watch, translated)
            raise
        if error is not None and not isinstance(error, Error):
            note_interruption(watch, error)


class PastDjango:
    """A method of a driver's cursor that runs statements past Django's wrapper."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, cursor: Any, owner: type) -> Any:
        if cursor is None:
            return self
        getattr(cursor.cursor, self._name)  # AttributeError: not this driver's
        return functools.partial(self._call, cursor)

    def _call(self, cursor: Any, *args: Any, **kwargs: Any) -> Any:
        watch = cursor.db.dbhealth_watch
        cursor._before_use(watch, monotonic())
        watch.used = True
        if self._name == "stream":  # the others copy; it runs whatever it is given
            watch.session.observe(args[0] if args else kwargs.get("query"))
        of_backend = getattr(super(WatchedCursor, cursor), self._name, None)  # logs it, perhaps
        method = of_backend or getattr(cursor.cursor, self._name)
        return method(*args, **kwargs)


class WatchedCursor(Base):  # type: ignore[misc]
    """A mixin over Django's CursorWrapper."""

    cursor: Any
    db: Any
    generation: int | None = None  # None: made past make_cursor(), as django-debug-toolbar does

    copy = PastDjango()  # psycopg 3
    stream = PastDjango()
    copy_expert = PastDjango()  # psycopg2
    copy_from = PastDjango()
    copy_to = PastDjango()

    def _execute_with_wrappers(self, sql: Any, params: Any, many: bool, executor: Any) -> Any:
        if self.db.execute_wrappers:
            inside = functools.partial(self._run, executor)
            return super()._execute_with_wrappers(sql, params, many, inside)
        return self._run(executor, sql, params, many, {"connection": self.db, "cursor": self})

    def _run(self, executor: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Run execute() or executemany(), inside all wrappers of the program's."""
        watch: Watch = self.db.dbhealth_watch
        now = monotonic()
        if (
            now - watch.last_seen > JUST_NOW
            or watch.in_doubt
            or self.generation != watch.generation
        ):
            generation = watch.generation
            before_use(self.db, watch, now)
            if self.generation != watch.generation or watch.lost:
                self._follow(generation)
        watch.used = True
        # Now: after the statement neither the text nor this code is in the processor's caches.
        is_quiet = watch.connecting or watch.session.is_quiet(sql)
        try:
            result = executor(sql, params, many, context)
        except Error as error:
            note_statement(watch, error, sql, many=many, began=now)
            raise
        # Not for one that was never sent, nor refused by Django: that tells nothing.
        if not many or not sends_nothing(params):
            watch.last_used = watch.last_seen = monotonic()
        if not is_quiet:
            watch.session.observe(sql, None if many else params)
        return result

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        watch: Watch = self.db.dbhealth_watch
        now = monotonic()
        self._before_use(watch, now)
        watch.used = True
        try:
            result = super().callproc(*args, **kwargs)
        except Error as error:
            note_statement(watch, error, "", many=True, began=now)
            raise
        watch.last_used = monotonic()
        return result

    def _before_use(self, watch: Watch, now: float) -> None:
        """Heal the connection, and follow it. For what takes long anyway; see ``_run()``."""
        generation = watch.generation
        before_use(self.db, watch, now)
        self._follow(generation)

    def _follow(self, generation: int) -> None:
        """Follow the connection to another one that it was given since ``generation``."""
        connection, watch = self.db, self.db.dbhealth_watch
        if self.generation is None:
            self.generation = generation
        if connection.connection is None and watch.lost:
            connection.ensure_connection()
        if self.generation == watch.generation or self.generation < watch.healed_since:
            return  # after the program's own close() a cursor stays dead, as Django's does
        name = None
        if watch.vendor.has_server_side_cursors:
            name = getattr(self.cursor, "name", None)
            with suppress(connection.Database.Error):
                self.cursor.close()  # else psycopg warns
        with connection.wrap_database_errors:
            self.cursor = connection.create_cursor(name)
        self.generation = watch.generation


class ChunkedCursor(Base):  # type: ignore[misc]
    """A mixin over the cursors of ``.iterator()``: what they still have to give would be lost."""

    db: Any

    def _run(self, *args: Any) -> Any:
        result = super()._run(*args)
        self.db.dbhealth_watch.cursor_has_run(self)
        return result

    def close(self) -> None:
        self.db.dbhealth_watch.cursor_was_closed(self)
        getattr(super(), "close", self.cursor.close)()  # Django's class has none of its own


def watch_connection(connection: BaseDatabaseWrapper) -> None:
    """Watch the connection from now on. Calling it again changes nothing."""
    if watch_of(connection) is None:
        kind: Any = type(connection)
        connection.__class__ = derived_class(kind, WatchedConnection)
        vars(connection).pop("wrap_database_errors", None)  # Django's, cached
        watch_of(connection)  # made now: its idleness counts from here


@functools.cache
def derived_class(base: Any, mixin: Any) -> Any:
    """Derive the class that adds the mixin, under the name of its base: logs and repr() show it."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names)
