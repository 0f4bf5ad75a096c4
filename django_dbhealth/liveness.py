"""Is this connection alive? A look at its socket first, then a probe that is bounded in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .vendors.base import Liveness, readable

if TYPE_CHECKING:
    from .vendors.base import Driver

__all__ = ["Liveness", "check_liveness", "seems_alive"]


def seems_alive(driver: Driver, handle: Any) -> bool:
    """Return whether the socket shows no sign of a loss, for the price of one poll().

    It sees every close that reached this machine, and none that did not (a firewall that forgot
    the connection, a server that hangs).
    """
    descriptor = driver.descriptor(handle)
    return descriptor is not None and not readable(descriptor)


def check_liveness(
    driver: Driver, handle: Any, *, suspect: bool, timeout: float, in_transaction: bool = False
) -> Liveness:
    """Return whether the connection is alive, lost, or busy.

    A silent socket is believed, unless the connection is ``suspect``: idle for long, or an error
    was seen on it. Then, and when the socket is readable, the server is asked and has ``timeout``
    seconds to answer. A transaction on the handle is left alone, unless the caller knows of it.
    """
    if not suspect and seems_alive(driver, handle):
        return Liveness.ALIVE
    question = driver.ask if in_transaction else driver.ping
    return question(handle, timeout=timeout)
