"""The guard: a lost connection is replaced exactly where nothing can be lost with it.

Before a cursor is made, before the statement of one that was made earlier, and before BEGIN, it
looks at the socket. It sends nothing twice: what went out and failed stays failed.
"""

from __future__ import annotations

import _thread
import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from .faults import Circumstances, Kind, circumstances_of
from .liveness import Liveness, liveness_of
from .notes import note_fault
from .signals import connection_healed, connection_lost
from .vendors.base import ENDED
from .watch import remains

if TYPE_CHECKING:
    from django.dispatch import Signal

    from .conf import Config
    from .faults import Fault
    from .vendors.base import Seen
    from .watch import Watch

logger = logging.getLogger("django_dbhealth.guard")

# Before use


def before_use(connection: Any, watch: Watch, now: float) -> None:
    """Heal the connection if it is lost and nothing would be lost with it.

    For a healthy one this is a look at some flags and at the socket.
    """
    if (
        connection.connection is None
        or (watch.used and connection.in_atomic_block)
        or connection._thread_ident != _thread.get_ident()
    ):
        return
    config_for = watch.config_for  # called as a method it would take longer to find
    config = config_for(connection.alias)
    seen: Seen = ()
    if (
        watch.in_doubt
        or watch.lost
        or connection.errors_occurred
        or now - watch.last_used > config.ping_after
        or (seen := (watch.poll or watch.make_poll())(0))
    ):
        if not watch.connecting:
            _heal_if_lost(connection, watch, config, now, seen)
    else:
        watch.last_seen = now  # a look that found something to heal, and could not, is none


def _heal_if_lost(connection: Any, watch: Watch, config: Config, began: float, seen: Seen) -> None:
    if not watch.is_replaceable():
        return
    state = watch.session_state()
    on_loss = config.on_session_state_loss if state else "ignore"
    must_tell = on_loss == "raise" and not watch.is_replaced_anyway()
    if must_tell and not watch.interrupted:
        return  # alive it is needed; lost, the statement that follows will say so
    was_known = watch.lost
    in_transaction = connection.in_atomic_block
    liveness = liveness_of(watch, config, suspect=True, in_transaction=in_transaction, seen=seen)
    if liveness is not Liveness.LOST or must_tell:  # then the statement that follows tells
        return
    now = monotonic()
    reason = _reason(watch, was_known, waited_in_vain=now - began >= config.ping_timeout)
    loss = Loss(watch, reason=reason, idle_seconds=began - watch.last_used)
    # Not one that was closed on our side: its descriptor's number may be the next one's.
    ended = connection.connection if seen and seen[0][1] & ENDED else None
    try:
        watch.replace()
        if ended is not None:
            remains.append(ended)
    finally:  # a receiver may use the connection, so not before
        if not was_known and connection_lost.receivers:
            loss.send(connection_lost, duration=now - began)
    duration = monotonic() - began
    if connection_healed.receivers:
        loss.send(connection_healed, duration=duration)
    gone = state if on_loss == "warn" else ()
    level = logging.WARNING if gone else logging.INFO
    if logger.isEnabledFor(level):
        loss.log_healed(level, duration, gone)


# After a failure


def note_failure(connection: Any, watch: Watch, error: Exception) -> Fault | None:
    """Note what has happened with this error, on it and for the connection's next use."""
    if isinstance(error, watch.of_data):
        return None
    noted = circumstances_of(error.__cause__ or error)  # by the connect that it has ended
    in_set_up = watch.connecting and not watch.set_up
    connecting = in_set_up or (noted is not None and noted.connecting)
    over = connecting or watch.committed or connection.connection is None  # for the next use
    was_known, was_told, state = watch.lost, watch.told, watch.session_state()
    if not over:
        watch.lost = was_known or watch.driver.has_given_up(connection.connection, error)
    error.dbhealth_circumstances = Circumstances(  # type: ignore[attr-defined]
        alias=connection.alias,
        connecting=connecting,
        in_transaction=watch.is_in_transaction(),
        committing=watch.committing,
        lost=watch.lost and not over,
        why_not_healed=_why_not_healed(watch, state),
        idle_seconds=watch.idle_seconds(),
        tried_seconds=watch.tried_seconds,
    )
    fault = note_fault(watch, error)
    if over:
        return fault
    watch.refused_write |= fault is not None and fault.kind is Kind.READ_ONLY
    watch.told |= watch.lost or (fault is not None and fault.kind is Kind.LOST)
    if watch.lost:
        watch.forget_session_state()
    if watch.lost and not (was_known and was_told):
        loss = Loss(watch, reason="a statement failed", idle_seconds=watch.idle_seconds())
        loss.log_unhealed((*state, *watch.left_open()), in_block=connection.in_atomic_block)
        loss.send(connection_lost, duration=0.0)
    return fault


def note_interruption(watch: Watch, error: BaseException) -> None:
    """Note that an exception that is not the database's has ended a statement."""
    # Of a signal handler, a time limit: in mid-protocol. Of a loop that was left: not.
    if not isinstance(error, GeneratorExit):
        watch.interrupted = watch.in_doubt = True


def _why_not_healed(watch: Watch, state: tuple[str, ...]) -> str:
    reasons = watch.why_kept()
    if state:
        reasons.append(
            f"lost with its session: {', '.join(state)} (the next use has a new session without)"
        )
    return "; ".join(reasons) or "the guard had looked before, and no statement is sent twice"


class Loss:
    """One loss, for signals and the log."""

    def __init__(self, watch: Watch, *, reason: str, idle_seconds: float) -> None:
        self._watch = watch
        self._reason = reason
        self._idle_seconds = idle_seconds

    def send(self, signal: Signal, *, duration: float) -> None:
        signal.send_robust(
            sender=self._watch.sender(),
            alias=self._watch.alias,
            reason=self._reason,
            idle_seconds=self._idle_seconds,
            duration=duration,
        )

    def log_healed(self, level: int, duration: float, state: tuple[str, ...]) -> None:
        without = f" Its session state is gone: {', '.join(state)}." if state else ""
        took = f" Healing took {duration * 1000:.0f} ms."
        self._log(level, "was lost and healed", took + without)

    def log_unhealed(self, state: tuple[str, ...], *, in_block: bool) -> None:
        if in_block:
            what = " It was in a transaction, which is rolled back."
        elif state:
            what = f" Lost with it: {', '.join(state)}."
        else:
            what = ""
        self._log(logging.WARNING, "is lost", what)

    def _log(self, level: int, what: str, more: str) -> None:
        alias = self._watch.alias
        logger.log(
            level,
            "The connection %r %s after %.1f s of idleness: %s.%s",
            alias,
            what,
            self._idle_seconds,
            self._reason,
            more,
            extra={"alias": alias},
        )


def _reason(watch: Watch, was_known: bool, *, waited_in_vain: bool) -> str:
    if watch.interrupted:
        return "interrupted in a statement"
    if watch.refused_write:
        return "the server is read-only"
    if was_known:
        return "a statement failed"
    return "no answer to a probe" if waited_in_vain else "closed by the server"
