"""What has happened, from an exception: ``classify()``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .faults import Fault, Outcome, circumstances_of
from .vendors import VENDORS, driver_behind, vendor_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .faults import Circumstances
    from .vendors.base import Vendor


def classify(exc: BaseException, using: str | None = None) -> Fault | None:
    """Return what an error of a database means, None for an exception that is none.

    Errors of Django, mysqlclient, PyMySQL, psycopg and psycopg2 are known, also as the cause of
    another exception, and without Django's settings. ``using``, an alias of DATABASES, tells the
    database where an error has lost its cause, as one that was pickled has. Of several errors on
    lost connections the first one counts: what came after it, a connect that failed for one, is
    its consequence. But where one of them leaves open whether its statement ran, that one counts.
    What is no exception is a TypeError.
    """
    if not isinstance(exc, BaseException):
        message = f"classify() takes an exception, not {exc!r}: for a number use dbhealth explain."
        raise TypeError(message)
    faults = list(_faults_behind(exc, using))
    return next(
        (fault for fault in reversed(faults) if fault.outcome is Outcome.UNKNOWN),
        faults[-1] if faults else None,
    )


def _faults_behind(exc: BaseException, using: str | None) -> Iterator[Fault]:
    """Yield the known faults from the exception back to what it began with."""
    error: BaseException | None = exc
    seen: set[int] = set()
    of_database = False
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        origin = _origin_of(error)
        vendors = _vendors_of(error, origin, using)
        of_database = of_database or bool(vendors)
        fault = _fault_of(origin, vendors, circumstances_of(error))
        if fault is not None:
            yield fault
            if fault.connection_usable:  # so it is no consequence of anything before
                return
        error = _before(origin, with_context=of_database)


def _origin_of(error: BaseException) -> BaseException:
    """Return the driver's own error behind one of Django's."""
    cause = error.__cause__
    return error if cause is None or not _is_djangos(error) or _is_djangos(cause) else cause


def _is_djangos(error: BaseException) -> bool:
    return any(kind.__module__ == "django.db.utils" for kind in type(error).__mro__)


def _before(error: BaseException, *, with_context: bool) -> BaseException | None:
    """Return what the error was raised from, or, ``with_context``, while handling what."""
    cause = error.__cause__ or getattr(error, "orig", None)  # SQLAlchemy's, without its cause
    if isinstance(cause, BaseException) or error.__suppress_context__ or not with_context:
        return cause if isinstance(cause, BaseException) else None
    return error.__context__


def _vendors_of(error: BaseException, origin: BaseException, using: str | None) -> list[Vendor]:
    """Return whose error it may be: several only for one of Django's that has lost its cause."""
    found = driver_behind(type(origin))
    if found is not None:
        return [found[0]]
    if not _is_djangos(error):
        return []
    if using is None:
        return list(VENDORS.values())
    from django.db import connections

    vendor = vendor_named(connections[using].vendor)
    return [vendor] if vendor else []


def _fault_of(
    error: BaseException, vendors: list[Vendor], circumstances: Circumstances | None
) -> Fault | None:
    connecting = circumstances.connecting if circumstances else None
    found = (vendor.fault(error, connecting=connecting) for vendor in vendors)
    fault = next(filter(None, found), None)
    if fault is None or circumstances is None:
        return fault
    return replace(fault, outcome=_outcome(fault, circumstances))


def _outcome(fault: Fault, circumstances: Circumstances) -> Outcome:
    """Return what became of the statement, or of its transaction, under these circumstances."""
    if fault.outcome is Outcome.UNKNOWN or circumstances.connecting:
        return fault.outcome
    if circumstances.in_transaction and not fault.connection_usable:
        return Outcome.ROLLED_BACK
    if not circumstances.several:
        return fault.outcome
    if circumstances.in_transaction and fault.outcome is Outcome.ROLLED_BACK:
        return Outcome.ROLLED_BACK
    return Outcome.UNKNOWN  # what came before in the same call may have run
