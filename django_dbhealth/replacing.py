"""Replacing a lost connection of Django's: in which of its transactions, and how."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from django.db import DataError, IntegrityError

from .closing import close, note_answer
from .conf import config_for
from .vendors import driver_of, vendor_named
from .watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

# What connect() resets, and an atomic() block needs: it goes on with another connection.
BLOCK = (
    "atomic_blocks",
    "commit_on_exit",
    "in_atomic_block",
    "needs_rollback",
    "run_on_commit",
    "savepoint_ids",
)


class DjangoWatch(Watch):
    """What is known of one of Django's connections."""

    __slots__ = ("_connection",)

    of_data = (DataError, IntegrityError)  # get_or_create() lives with them

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        vendor, driver = vendor_named(connection.vendor), driver_of(connection)
        assert vendor is not None  # others are not watched
        assert driver is not None
        self._connection: weakref.ref[Any] = weakref.ref(connection)
        super().__init__(vendor, driver, config_for)

    @property
    def alias(self) -> str:
        connection = self._connection()
        return "" if connection is None else str(connection.alias)

    def handle(self) -> Any:
        connection = self._connection()
        return None if connection is None else connection.connection

    def address(self) -> object:
        connection = self._connection()
        if connection is None:
            return None
        return self.vendor.name, self.vendor.address_in(connection.settings_dict)

    def sender(self) -> type:
        return type(self._connection())

    def idle_limit(self) -> float | None:
        limit = config_for(self.alias).server_idle_timeout
        return self.vendor.default_idle_timeout if limit is None else limit

    def is_in_transaction(self) -> bool:
        connection = self._connection()
        return connection is not None and (
            connection.in_atomic_block or not connection.autocommit or self.session.in_transaction
        )

    def note_answer(self) -> None:
        super().note_answer()
        note_answer(self._connection())

    def left_open(self) -> tuple[str, ...]:
        connection: Any = self._connection()
        if connection.autocommit or connection.in_atomic_block:
            return ()
        return ("what was not committed",)

    def is_replaced_anyway(self) -> bool:
        """Return whether Django itself would look at the connection now (CONN_HEALTH_CHECKS)."""
        connection: Any = self._connection()
        return bool(connection.health_check_enabled and not connection.health_check_done)

    def is_replaceable(self) -> bool:
        connection: Any = self._connection()
        if connection.allow_thread_sharing:
            return False
        if not connection.in_atomic_block:
            return bool(connection.autocommit or self.is_replaced_anyway())
        return not (
            self.used
            or connection.needs_rollback
            or connection.closed_in_transaction
            or not connection.commit_on_exit  # autocommit was off already
            or any(block._from_testcase for block in connection.atomic_blocks)
            or (not self.savepoints and self.driver.has_begun(connection.connection))
        )

    def why_kept(self) -> list[str]:
        return list(_why_kept(self._connection(), self))

    def replace(self) -> None:
        connection: Any = self._connection()
        if connection.in_atomic_block:
            _replace_in_block(connection, self)
        else:
            _connect_anew(connection, self)


def _why_kept(connection: Any, watch: DjangoWatch) -> Iterator[str]:
    if connection.connection is None:
        yield "it was closed"
    if connection.allow_thread_sharing:
        yield "it is shared between threads"
    if any(block._from_testcase for block in connection.atomic_blocks):
        yield "it is in the transaction of a TestCase"
    elif connection.in_atomic_block or watch.committing:
        yield "it was in a transaction"
    elif not connection.autocommit:
        yield (
            "autocommit is off, and what was not committed is lost (close the connection before "
            "its next use)"
        )


def _connect_anew(connection: Any, watch: DjangoWatch) -> None:
    watch.bounded = not watch.is_replaced_anyway()  # Django would wait as long as it takes
    watch.closed = watch.driver.cursors_need_handle  # then it goes when its last cursor does
    try:
        connection.close()  # a backend may have more to forget; a pool's goes back to its pool
        connection.ensure_connection()
    finally:
        watch.bounded = False


def _replace_in_block(connection: Any, watch: DjangoWatch) -> None:
    """Open another connection, with which a block goes on in which nothing has run."""
    lost, savepoints = connection.connection, watch.savepoints
    block = {name: vars(connection)[name] for name in BLOCK}
    try:
        connection.in_atomic_block = False
        connection.run_on_commit = []  # the block's, not for a transaction of a receiver
        _connect_anew(connection, watch)
        connection.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)
        for sid in savepoints:
            connection._savepoint(sid)
    except BaseException:
        # The block is over: what it has undone inside may not go on in a new transaction.
        if connection.connection not in (None, lost):
            close(connection)
        connection.connection = lost
        watch.lost = watch.closed = watch.in_doubt = watch.used = True
        raise
    finally:
        vars(connection).update(block)
