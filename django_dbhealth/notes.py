"""The note that an error carries (PEP 678): what has happened, did it run, what to do now.

At most five lines; after them, where a server has no slot left, a list. Nothing is asked of a
server, and no parameter of a statement, no address and no password is in it.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

from .diagnosis import classify
from .faults import PAUSE_OUTSIDE, Kind, Outcome, circumstances_of
from .registry import known_connections

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .faults import Circumstances, Fault
    from .registry import OpenConnection
    from .watch import Watch

MANY_CONNECTIONS = 5
WORTH_TELLING = 0.1  # seconds
A_PAUSE = 1.0  # seconds of idleness that are no coincidence


def note_fault(watch: Watch, error: BaseException) -> Fault | None:
    """Give the error its note, in place of one that it has, and return what has happened."""
    circumstances = circumstances_of(error)
    if circumstances is None:
        return None
    if circumstances.connecting:
        fault = watch.vendor.fault(error.__cause__ or error, connecting=True)
        hidden = _note_of_hidden(error, circumstances.alias)
    else:
        fault, hidden = classify(error), None
    if hidden:
        _set_note(error, f"{_tried_again(fault, circumstances)}\n{hidden}")
    elif fault or circumstances.lost:
        _set_note(error, "\n".join(_lines(watch, fault, circumstances)))
    return fault


def note_statement(
    watch: Watch, error: BaseException, sql: object, *, many: bool, began: float
) -> None:
    """Add to the note what is known only where the statement was run."""
    circumstances = circumstances_of(error)
    if circumstances is None or not hasattr(error, "dbhealth_note"):
        return
    error.dbhealth_circumstances = replace(  # type: ignore[attr-defined]
        circumstances,
        several=many or watch.vendor.session_rules.has_several(sql),
        ran_seconds=monotonic() - began,
    )
    note_fault(watch, error)


def _set_note(error: Any, note: str) -> None:
    if hasattr(error, "dbhealth_note"):
        error.__notes__.remove(error.dbhealth_note)
    error.add_note(note)
    error.dbhealth_note = note


# Django connects anew while it handles an error. A failure of that covers the error up.


def _note_of_hidden(error: BaseException, alias: str) -> str | None:
    """Return the note of the error of a statement that was being handled."""
    seen = {id(error)}
    hidden = (error.__cause__ or error).__context__
    while hidden is not None and id(hidden) not in seen:
        circumstances = circumstances_of(hidden)
        if circumstances and circumstances.alias == alias and not circumstances.connecting:
            return getattr(hidden, "dbhealth_note", None)
        seen.add(id(hidden))
        hidden = hidden.__context__
    return None


def _tried_again(fault: Fault | None, circumstances: Circumstances) -> str:
    answer = f" ({fault.title})" if fault else ""
    return (
        f"The connection {circumstances.alias!r} could not be opened again{answer}. "
        "What counts is the error before:"
    )


# Its lines


def _lines(watch: Watch, fault: Fault | None, circumstances: Circumstances) -> Iterator[str]:
    is_lost = circumstances.lost or (fault is not None and fault.kind is Kind.LOST)
    what = f"The connection {circumstances.alias!r} is lost."
    if fault:
        what = f"The connection {circumstances.alias!r}: {fault.title}. {fault.meaning}"
    idle = _idle(circumstances, watch.idle_limit()) if is_lost else ""
    yield f"{what}{idle}{_duration(circumstances)}"
    yield _outcome(fault, circumstances)
    if is_lost:
        yield f"Not healed: {circumstances.why_not_healed}."
    if fault is None:
        return
    if fault.kind is Kind.READ_ONLY and not is_lost:
        yield _what_comes_next(watch.session_state())
    yield f"What to do: {_advice(fault, circumstances, is_lost)} (see {fault.anchor})"
    if fault.kind is Kind.NO_FREE_SLOT:
        yield from lines_of_held(_to_the_same_server(watch))


def _idle(circumstances: Circumstances, limit: float | None) -> str:
    idle = _seconds(_idle_before(circumstances))
    known = f" (SERVER_IDLE_TIMEOUT: {limit:g} s)" if limit else ""
    return f" Idle for {idle}{known}."


def _idle_before(circumstances: Circumstances) -> float:
    return circumstances.idle_seconds - circumstances.ran_seconds


def _duration(circumstances: Circumstances) -> str:
    if circumstances.connecting and circumstances.tried_seconds >= WORTH_TELLING:
        return f" Tried for {_seconds(circumstances.tried_seconds)}."
    if circumstances.ran_seconds >= WORTH_TELLING:
        return f" The statement failed after {_seconds(circumstances.ran_seconds)}."
    return ""


def _outcome(fault: Fault | None, circumstances: Circumstances) -> str:
    if circumstances.connecting:
        return "No statement ran."
    outcome = fault.outcome if fault else Outcome.UNKNOWN
    if outcome is Outcome.NOT_EXECUTED:
        return "The statement did not run."
    if outcome is Outcome.ROLLED_BACK:
        return "Its transaction is rolled back: nothing of it stays."
    if circumstances.several:
        return "It was several statements: any of them may have run."
    if circumstances.committing:
        return "Whether the transaction was committed is unknown."
    return "Whether the statement ran is unknown."


def _advice(fault: Fault, circumstances: Circumstances, is_lost: bool) -> str:
    """Return the fault's, or what to do with a transaction that has waited."""
    waited = _idle_before(circumstances) >= A_PAUSE
    if not (is_lost and waited and circumstances.in_transaction):
        return fault.advice
    if fault.outcome is Outcome.ROLLED_BACK:
        return PAUSE_OUTSIDE
    return f"{fault.advice} Slow work belongs before or after atomic(), not inside."


def _what_comes_next(state: Sequence[str]) -> str:
    if state:
        return f"The connection is kept, because its session carries {', '.join(state)}."
    return (
        "If the server says that it is read-only, "
        "the next use outside a transaction gets another connection."
    )


def _to_the_same_server(watch: Watch) -> list[OpenConnection]:
    """Return this process's connections to a connection's server, the longest idle first."""
    address = watch.address()
    found = [each for other, each in known_connections() if other.address() == address]
    return sorted(found, key=attrgetter("idle_seconds"), reverse=True)


def lines_of_held(held: Sequence[OpenConnection]) -> Iterator[str]:
    """Yield a line about each of some connections, but not of too many."""
    if not held:
        yield "This process holds none there."
        return
    yield f"This process holds {len(held)} there:"
    for each in held[:MANY_CONNECTIONS]:
        state = ", in a transaction" if each.in_transaction else ""
        yield (
            f"- {each.alias!r}, thread {each.thread_name!r}, {_seconds(each.age_seconds)} old, "
            f"idle for {_seconds(each.idle_seconds)}{state}, opened at {each.opened_at}"
        )
    if len(held) > MANY_CONNECTIONS:
        yield f"and {len(held) - MANY_CONNECTIONS} more: see open_connections()."


def _seconds(value: float) -> str:
    return f"{max(0.0, value):.1f} s" if value < 10 else f"{value:,.0f} s"
