"""The guard: a lost connection is replaced exactly where nothing can be lost with it.

Before a statement, and before BEGIN, it looks at the socket. It sends nothing twice: what went out
and failed stays failed.
"""

from __future__ import annotations

import _thread
import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from django.db import DataError, IntegrityError

from .closing import close, find_liveness
from .conf import config_for
from .faults import Circumstances, Kind
from .liveness import Liveness
from .notes import note_fault
from .signals import connection_healed, connection_lost

if TYPE_CHECKING:
    from django.db import Error
    from django.dispatch import Signal

    from .conf import Config
    from .watch import Watch

logger = logging.getLogger("django_dbhealth.guard")

# What connect() resets, and an atomic() block needs: it goes on with another connection.
BLOCK = (
    "atomic_blocks",
    "commit_on_exit",
    "in_atomic_block",
    "needs_rollback",
    "run_on_commit",
    "savepoint_ids",
)

# Errors that are no matter of the connection, and that programs make on purpose: get_or_create().
OF_DATA = (DataError, IntegrityError)

# Before use


def before_use(connection: Any, watch: Watch, now: float) -> None:
    """Heal the connection if it is lost and nothing would be lost with it.

    For a healthy one this is a look at some flags and at the socket.
    """
    if (
        connection.connection is None
        or watch.connecting
        or (watch.used and connection.in_atomic_block)
        or connection._thread_ident != _thread.get_ident()
    ):
        return
    config = config_for(connection.alias)
    if (
        watch.in_doubt
        or watch.lost
        or connection.errors_occurred
        or now - watch.last_used > config.ping_after
        or (watch.poll or watch.make_poll())(0)
    ):
        _heal_if_lost(connection, watch, config, now)


def health_check_is_due(connection: Any) -> bool:
    """Return whether Django itself would look at the connection now (CONN_HEALTH_CHECKS)."""
    return bool(connection.health_check_enabled and not connection.health_check_done)


def _heal_if_lost(connection: Any, watch: Watch, config: Config, began: float) -> None:
    if not _is_replaceable(connection, watch):
        return
    state = watch.session_state()
    on_loss = config.on_session_state_loss if state else "ignore"
    # Where Django itself would replace it, it is replaced whatever it carries.
    must_tell = on_loss == "raise" and not health_check_is_due(connection)
    if must_tell and not watch.interrupted:
        return  # alive it is needed; lost, the statement that follows will say so
    was_known = watch.lost
    if find_liveness(connection, watch.driver, suspect=True) is not Liveness.LOST:
        return
    now = monotonic()
    reason = _reason(watch, was_known, waited_in_vain=now - began >= config.ping_timeout)
    loss = Loss(connection, reason=reason, idle_seconds=began - watch.last_used)
    try:
        if not must_tell:
            _replace(connection, watch)
    finally:  # a receiver may use the connection, so not before
        if not was_known:
            loss.send(connection_lost, duration=now - began)
    if must_tell:
        loss.log_unhealed(state)
        return
    duration = monotonic() - began
    loss.send(connection_healed, duration=duration)
    loss.log_healed(duration, state if on_loss == "warn" else ())


def _is_replaceable(connection: Any, watch: Watch) -> bool:
    """Return whether the transaction, if there is one, has nothing in it yet."""
    if connection.allow_thread_sharing:
        return False
    if not connection.in_atomic_block:
        return bool(connection.autocommit or health_check_is_due(connection))
    return not (
        watch.used
        or connection.needs_rollback
        or connection.closed_in_transaction
        or not connection.commit_on_exit  # autocommit was off already
        or any(block._from_testcase for block in connection.atomic_blocks)
        or (not watch.savepoints and watch.driver.has_begun(connection.connection))
    )


def _replace(connection: Any, watch: Watch) -> None:
    """Open another connection."""
    if connection.in_atomic_block:
        _replace_in_block(connection, watch)
    else:
        _connect_anew(connection, watch)


def _connect_anew(connection: Any, watch: Watch) -> None:
    watch.bounded = not health_check_is_due(connection)  # Django would wait as long as it takes
    watch.closed = watch.driver.cursors_need_handle  # then it goes when its last cursor does
    connection.close()  # a backend may have more to forget; a pool's goes back to its pool
    connection.ensure_connection()


def _replace_in_block(connection: Any, watch: Watch) -> None:
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


# After a failure


def note_failure(connection: Any, watch: Watch, error: Error) -> None:
    """Note what has happened with this error, on it and for the connection's next use."""
    if isinstance(error, OF_DATA):
        return
    connecting = watch.connecting or connection.connection is None
    was_known, state = watch.lost, watch.session_state()
    if not connecting and not watch.committed:
        watch.lost = was_known or watch.driver.has_given_up(connection.connection, error)
    error.dbhealth_circumstances = Circumstances(  # type: ignore[attr-defined]
        alias=connection.alias,
        connecting=connecting,
        in_transaction=watch.is_in_transaction(),
        committing=watch.committing,
        lost=watch.lost and not connecting,
        why_not_healed=_why_not_healed(connection, watch, state),
        idle_seconds=watch.idle_seconds(),
        tried_seconds=watch.tried_seconds,
    )
    fault = note_fault(connection, watch, error)
    if connecting or watch.committed:
        return
    watch.refused_write |= fault is not None and fault.kind is Kind.READ_ONLY
    watch.told |= watch.lost or (fault is not None and fault.kind is Kind.LOST)
    if not watch.lost:
        return
    watch.forget_session_state()
    if not was_known:
        if not connection.autocommit and not connection.in_atomic_block:
            state = (*state, "what was not committed")
        loss = Loss(connection, reason="a statement failed", idle_seconds=watch.idle_seconds())
        loss.log_unhealed(state)
        loss.send(connection_lost, duration=0.0)


def _why_not_healed(connection: Any, watch: Watch, state: tuple[str, ...]) -> str:
    reasons = []
    if connection.allow_thread_sharing:
        reasons.append("it is shared between threads")
    if any(block._from_testcase for block in connection.atomic_blocks):
        reasons.append("it is in the transaction of a TestCase")
    elif connection.in_atomic_block or watch.committing:
        reasons.append("it was in a transaction")
    elif not connection.autocommit:
        reasons.append(
            "autocommit is off, and what was not committed is lost (close the connection, or turn "
            "autocommit on, before its next use)"
        )
    if state:
        reasons.append(
            f"lost with its session: {', '.join(state)} (the next use has a new session without)"
        )
    return "; ".join(reasons) or "the guard had looked before, and no statement is sent twice"


class Loss:
    """One loss, for signals and the log."""

    def __init__(self, connection: Any, *, reason: str, idle_seconds: float) -> None:
        self._connection = connection
        self._reason = reason
        self._idle_seconds = idle_seconds

    def send(self, signal: Signal, *, duration: float) -> None:
        if not signal.receivers:
            return
        signal.send_robust(
            sender=type(self._connection),
            alias=self._connection.alias,
            reason=self._reason,
            idle_seconds=self._idle_seconds,
            duration=duration,
        )

    def log_healed(self, duration: float, state: tuple[str, ...]) -> None:
        level = logging.WARNING if state else logging.INFO
        if not logger.isEnabledFor(level):
            return
        without = f" Its session state is gone: {', '.join(state)}." if state else ""
        took = f" Healing took {duration * 1000:.0f} ms."
        self._log(level, "was lost and healed", took + without)

    def log_unhealed(self, state: tuple[str, ...]) -> None:
        if self._connection.in_atomic_block:
            what = " It was in a transaction, which is rolled back."
        elif state:
            what = f" Lost with it: {', '.join(state)}."
        else:
            what = ""
        self._log(logging.WARNING, "is lost", what)

    def _log(self, level: int, what: str, more: str) -> None:
        logger.log(
            level,
            "The connection %r %s after %.1f s of idleness: %s.%s",
            self._connection.alias,
            what,
            self._idle_seconds,
            self._reason,
            more,
            extra={"alias": self._connection.alias},
        )


def _reason(watch: Watch, was_known: bool, *, waited_in_vain: bool) -> str:
    if watch.interrupted:
        return "interrupted in a statement"
    if watch.refused_write:
        return "the server is read-only"
    if was_known:
        return "a statement failed"
    return "no answer to a probe" if waited_in_vain else "closed by the server"
