"""Is this connection alive? A look at its socket first, then a probe that is bounded in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .vendors.base import Liveness, readable

if TYPE_CHECKING:
    from .conf import Config
    from .vendors.base import Driver, Seen
    from .watch import Watch

__all__ = ["Liveness", "check_liveness", "liveness_of", "seems_alive"]


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


def liveness_of(
    watch: Watch,
    config: Config,
    *,
    suspect: bool,
    in_transaction: bool = False,
    seen: Seen = (),
) -> Liveness:
    """Return whether a watched connection is alive, and remember it.

    ``seen`` is what a look at its socket has told just now, if it has told anything.
    """
    if not watch.lost and watch.has_hung_up(seen):
        watch.driver.end(watch.handle())
        watch.lost = True
    if watch.lost:
        return Liveness.LOST
    if not watch.interrupted and watch.is_reading():
        return Liveness.BUSY  # perhaps: cursors that the program holds look alike
    suspect = suspect or watch.interrupted or watch.idle_seconds() > config.ping_after
    watch.lost = True  # should an exception of a signal handler end the probe
    liveness = check_liveness(
        watch.driver,
        watch.handle(),
        suspect=suspect,
        timeout=config.ping_timeout,
        in_transaction=in_transaction,
    )
    if watch.interrupted and liveness is Liveness.BUSY:
        liveness = Liveness.LOST  # nobody will ever end the statement
    if liveness is Liveness.ALIVE and _is_left_behind(watch, config.ping_timeout):
        liveness = Liveness.LOST
    watch.lost = liveness is Liveness.LOST
    if liveness is Liveness.ALIVE and suspect:
        watch.note_answer()
    return liveness


def _is_left_behind(watch: Watch, timeout: float) -> bool:
    """Return whether a write was refused because of a failover, and nothing would be lost.

    The codes for it have other meanings too, so the server is asked.
    """
    if not watch.refused_write or watch.is_in_transaction() or watch.carries_anything():
        return False
    watch.refused_write = not watch.driver.takes_writes(watch.handle(), timeout=timeout)
    return watch.refused_write
