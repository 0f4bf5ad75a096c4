"""The words for what an error means. What each error means stands in the vendors' tables."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(enum.Enum):
    """What sort of thing has happened."""

    LOST = "lost"  # the connection is gone
    UNREACHABLE = "unreachable"  # no server answers
    NO_FREE_SLOT = "no free slot"  # the server takes no more connections for now
    QUOTA = "quota"  # so many an hour, and they are used up
    CREDENTIALS = "credentials"  # refused: account, password, rights, database
    READ_ONLY = "read-only"
    TOO_LARGE = "too large"
    BUSY = "busy"  # the connection is in the middle of something else
    CONFLICT = "conflict"  # with another transaction
    TIMED_OUT = "timed out"  # or cancelled; the connection is fine


class Outcome(enum.Enum):
    """Whether the statement ran. For the statement of a COMMIT: whether the transaction stays."""

    NOT_EXECUTED = "not executed"  # or undone: it has changed nothing
    ROLLED_BACK = "rolled back"  # with the whole transaction that it was in
    UNKNOWN = "unknown"  # it may have run, or run later


# Advice that more than one of them needs
AFTER_A_PAUSE = (
    "A pause is the usual cause: give the connection back before it (LongRunningCommand,"
    " connections_released), outside of atomic()."
)
PAUSE_OUTSIDE = (
    "Do the whole transaction again, with the slow work (a download, a sleep) before or after"
    " atomic(), not inside."
)
CHECK_THE_SERVER = (
    "Check that the server runs and that HOST and PORT in DATABASES are its address. While it"
    " restarts, CONNECT_RETRY_TIMEOUT lets the connect wait for it."
)


# Waiting or connecting anew does not help against the others, or the program has to change first.
_WORTH_RETRYING = {
    Kind.LOST,
    Kind.UNREACHABLE,
    Kind.NO_FREE_SLOT,
    Kind.CONFLICT,
    Kind.TIMED_OUT,
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What an error means, whether its statement ran, and what to do.

    ``code`` is the server's or the driver's number, or an SQLSTATE; None where there is none.
    ``name`` is the code's name in its vendor's manual, or else words of the message.
    ``variant`` tells the meanings of one code apart. ``messages`` is how the error reads, as far
    as that is always the same. ``source`` says what proves it: a measurement, or only the manual.
    """

    kind: Kind
    code: int | str | None = None
    name: str
    variant: str = ""
    messages: tuple[str, ...] = ()
    outcome: Outcome
    connection_usable: bool
    meaning: str
    advice: str
    source: str

    @property
    def safe_to_retry(self) -> bool:
        """Whether the same work may be done again: nothing is done twice, and it may succeed.

        Inside a transaction the work is all of the transaction, from its beginning.
        """
        return self.outcome is not Outcome.UNKNOWN and self.kind in _WORTH_RETRYING

    @property
    def title(self) -> str:
        """The code, its name, and which of its meanings this is."""
        words = self.name if self.code is None else f"{self.code} {self.name}"
        return f"{words}, {self.variant}" if self.variant else words

    @property
    def anchor(self) -> str:
        """The place in the docs where this fault stands."""
        words = f"fault {self.code or self.name} {self.variant}"
        return "docs/faults.md#" + re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class KnownFault:
    """One line of a vendor's table: which errors are this fault.

    One of the ``texts`` is part of the message, where the code alone does not tell;
    ``connecting`` says that it holds only while a connection is being opened (True), or only
    afterwards (False).
    """

    fault: Fault
    texts: tuple[str, ...] = ("",)
    connecting: bool | None = None

    def fits(self, code: int | str | None, message: str, *, connecting: bool | None) -> bool:
        """Return whether an error may be this fault; ``connecting`` is None where nobody knows."""
        return (
            self.fault.code == code
            and any(text in message for text in self.texts)
            and (connecting is None or self.connecting in (None, connecting))
        )


def known(fault: Fault, *texts: str, connecting: bool | None = None) -> KnownFault:
    """Return a line of a vendor's table."""
    return KnownFault(fault=fault, texts=texts or ("",), connecting=connecting)


def first_fit(
    faults: Sequence[KnownFault],
    code: int | str | None,
    message: str,
    *,
    connecting: bool | None,
) -> Fault | None:
    """Return the first fault of a table that an error fits, None for an unknown error.

    A connection that is lost while it is being opened could not be reached, whatever the error.
    """
    fits = (each.fault for each in faults if each.fits(code, message, connecting=connecting))
    fault = next(fits, None)
    if connecting and fault is not None and fault.kind is Kind.LOST:
        return replace(
            fault,
            kind=Kind.UNREACHABLE,
            outcome=Outcome.NOT_EXECUTED,
            meaning="The connection broke while it was being opened.",
            advice=CHECK_THE_SERVER,
        )
    return fault


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What was going on when an error passed the guard: the error alone does not tell."""

    alias: str
    connecting: bool
    in_transaction: bool  # in which something had run
    several: bool = False  # executemany(), callproc(), several statements in one text
    committing: bool = False
    lost: bool = False  # the driver has given the connection up
    why_not_healed: str = ""  # should it be lost
    idle_seconds: float = 0.0  # from the last sign of life to the error
    ran_seconds: float = 0.0  # of these the statement's own, where that is known
    tried_seconds: float = 0.0  # to connect


def circumstances_of(error: BaseException) -> Circumstances | None:
    """Return what the guard noted on the error, None where it did not pass the guard."""
    return getattr(error, "dbhealth_circumstances", None)
