"""What has happened, from an exception: ``classify()``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .faults import Fault, Kind, Outcome, circumstances_of
from .vendors import VENDORS, vendor_for_engine

if TYPE_CHECKING:
    from .vendors.base import Vendor

# Django connects anew to roll back: if that fails, what has happened first is in __context__ only.
_OF_CONNECT = (Kind.UNREACHABLE, Kind.NO_FREE_SLOT, Kind.QUOTA, Kind.CREDENTIALS)


def classify(exc: BaseException, using: str | None = None) -> Fault | None:
    """Return what an error of a database means, None for an exception that is none.

    Errors of Django, mysqlclient, PyMySQL, psycopg and psycopg2 are known, also as the cause of
    another exception, and without Django's settings. ``using``, an alias of DATABASES, tells the
    database where an error has lost its cause, as one that was pickled has. Of several errors the
    first one counts, and not a connect that failed while it was handled.
    """
    found: Fault | None = None
    error: BaseException | None = exc
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        origin = _origin_of(error)
        fault = _fault_of(error, origin, using)
        found = fault or found
        error = _before(origin, fault)
    return found


def _origin_of(error: BaseException) -> BaseException:
    """Return the driver's own error behind one of Django's."""
    return error.__cause__ if _is_djangos(error) and error.__cause__ is not None else error


def _is_djangos(error: BaseException) -> bool:
    return any(kind.__module__ == "django.db.utils" for kind in type(error).__mro__)


def _before(error: BaseException, fault: Fault | None) -> BaseException | None:
    if error.__cause__ is not None or error.__suppress_context__:
        return error.__cause__
    return error.__context__ if fault is not None and fault.kind in _OF_CONNECT else None


def _fault_of(error: BaseException, origin: BaseException, using: str | None) -> Fault | None:
    circumstances = circumstances_of(error)
    connecting = circumstances.connecting if circumstances else None
    fault = None
    for vendor in _vendors_of(error, origin, using):
        fault = fault or vendor.fault(origin, connecting=connecting)
    if fault is None or circumstances is None:
        return fault
    return replace(
        fault, outcome=_outcome(fault, circumstances.several, circumstances.in_transaction)
    )


def _vendors_of(error: BaseException, origin: BaseException, using: str | None) -> list[Vendor]:
    """Return whose error it may be: several only for one of Django's that has lost its cause."""
    packages = {kind.__module__.partition(".")[0] for kind in type(origin).__mro__}
    of_driver = [vendor for vendor in VENDORS.values() if packages & vendor.drivers.keys()]
    if of_driver or not _is_djangos(error):
        return of_driver
    if using is None:
        return list(VENDORS.values())
    from django.db import connections

    vendor = vendor_for_engine(connections.settings[using]["ENGINE"])
    return [vendor] if vendor else []


def _outcome(fault: Fault, several: bool, in_transaction: bool) -> Outcome:
    """Return what became of the statement, or of its transaction, under these circumstances."""
    if fault.outcome is not Outcome.NOT_EXECUTED:
        return fault.outcome
    if in_transaction and not fault.connection_usable:
        return Outcome.ROLLED_BACK
    return Outcome.UNKNOWN if several else fault.outcome
