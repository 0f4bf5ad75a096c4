"""SQLAlchemy: options for a pool that fit the server, and engines that are looked after."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from sqlalchemy import Engine, NullPool, event

from django_dbhealth.checks import TAG, assumed_limit, limit_in_setting, warning
from django_dbhealth.conf import config_for, described
from django_dbhealth.forks import note_socket
from django_dbhealth.registry import find_opener, note_opened
from django_dbhealth.vendors import VENDORS, driver_behind, vendor_for_engine
from django_dbhealth.vendors.base import Vendor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.core.checks import CheckMessage

    from django_dbhealth.checks import IdleLimit
    from django_dbhealth.registry import Opening

__all__ = ["check_engines", "pool_options", "watch_engine"]

MARGIN = 20  # seconds: between the look at a connection's age and the end of its first statement

# SQLAlchemy's own defaults for a QueuePool.
POOL_SIZE, MAX_OVERFLOW = 5, 10


def pool_options(alias: str = "default", *, connection_limit: int | None = None) -> dict[str, Any]:
    """Return options for ``create_engine(url, **pool_options())``.

    ``pool_recycle`` is 20 seconds below the SERVER_IDLE_TIMEOUT that DBHEALTH has for ``alias`` (of
    a short one half), and 280 where nothing is said. It is left out for an alias of DATABASES whose
    server drops no idle connection. ``connection_limit`` is how many connections this engine
    may have open at once: the account's limit, divided by the processes that share it.
    """
    options: dict[str, Any] = {"pool_pre_ping": True}
    limit = _idle_limit(alias, _vendor_in_settings(alias))
    if limit is not None:
        options["pool_recycle"] = int(max(limit.seconds - MARGIN, limit.seconds / 2))
    if connection_limit is not None:
        if type(connection_limit) is not int or connection_limit < 1:
            raise ValueError(
                f"connection_limit is {described(connection_limit)}. Give a number of connections, "
                "1 or more, or None for SQLAlchemy's own sizes."
            )
        size = min(POOL_SIZE, connection_limit)
        overflow = min(MAX_OVERFLOW, connection_limit - size)
        options |= {"pool_size": size, "max_overflow": overflow}
    return options


def watch_engine(engine: Engine, alias: str = "default", *, name: str = "sqlalchemy") -> None:
    """Look after an engine, from its first connection on. Calling it again changes nothing.

    A check warns of a ``pool_recycle`` that does not fit what DBHEALTH says of ``alias``, a forked
    child leaves its parent's connections alone, and ``open_connections()`` lists the engine's under
    ``name``.
    """
    if not isinstance(engine, Engine):
        raise TypeError(
            f"watch_engine() takes an Engine, and was given a {type(engine).__name__}. Of an "
            "AsyncEngine pass its sync_engine."
        )
    checks.register(check_engines, TAG)
    if engine in _engines:
        return
    _engines[engine] = Watched(alias, name)
    event.listen(engine, "connect", lambda handle, record: _note_opened(name, handle, record))
    event.listen(engine, "checkout", _note_lent)
    event.listen(engine, "checkin", _note_given_back)
    event.listen(engine, "close", _note_closed)
    event.listen(engine, "detach", _note_closed)  # from now on it is the program's own


class Watched(NamedTuple):
    """What was said of an engine when it was given to ``watch_engine()``."""

    alias: str
    name: str


_engines: weakref.WeakKeyDictionary[Engine, Watched] = weakref.WeakKeyDictionary()


# What its server does


def _idle_limit(alias: str, vendor: Vendor) -> IdleLimit | None:
    """Return after how long an idle connection is dropped, None where nobody does that."""
    if not vendor.has_server:
        return None
    return limit_in_setting(config_for(alias)) or assumed_limit(vendor)


def _vendor_in_settings(alias: str) -> Vendor:
    """Return the database of an alias; where that tells nothing, the one that drops connections."""
    vendor = None
    with suppress(ImproperlyConfigured, KeyError):
        vendor = vendor_for_engine(settings.DATABASES[alias]["ENGINE"])
    if vendor is not None and vendor.has_server:
        return vendor
    return next(each for each in VENDORS.values() if each.default_idle_timeout)


def _vendor_of(engine: Engine) -> Vendor:
    found = driver_behind(engine.dialect.loaded_dbapi.Error)
    return found[0] if found else VENDORS.get(engine.dialect.name, Vendor())


# Its check


def check_engines(**kwargs: object) -> list[CheckMessage]:
    """Check the watched engines. Nothing is connected."""
    return [
        message for engine, watched in [*_engines.items()] for message in _check(engine, watched)
    ]


def _check(engine: Engine, watched: Watched) -> Iterator[CheckMessage]:
    limit = _idle_limit(watched.alias, _vendor_of(engine))
    if limit is None or isinstance(engine.pool, NullPool):  # which keeps no connection
        return
    recycle = engine.pool._recycle
    if recycle < 0 or recycle >= limit.seconds:
        yield recycle_over_idle_timeout(engine, watched.name, limit)


def recycle_over_idle_timeout(engine: Engine, name: str, limit: IdleLimit) -> checks.Warning:
    recycle = engine.pool._recycle
    never = ", which is never" if recycle < 0 else ""
    effect = "the first statement after a quiet time fails"
    if engine.pool._pre_ping:
        effect = "pool_pre_ping has to find it out each time, and no time limit bounds its probe"
    return warning(
        "W201",
        f"The pool_recycle of the engine {name!r} is {recycle:g}{never}, but a connection that "
        f"was idle for {limit.seconds:.15g} seconds is dropped by its server ({limit.source}): "
        f"{effect}.",
        "Write create_engine(url, **pool_options()), or a pool_recycle below "
        f"{limit.seconds:.15g} with pool_pre_ping=True. If the server really waits longer, write "
        "its timeout in seconds as SERVER_IDLE_TIMEOUT in DBHEALTH.",
    )


# Its connections


class Pooled:
    """A connection of an engine's, for ``open_connections()`` and for a fork."""

    __slots__ = ("__weakref__", "alias", "connection", "in_atomic_block", "last_used", "opening")

    def __init__(self, name: str, handle: Any) -> None:
        self.alias = name
        self.connection = handle
        self.in_atomic_block = False  # lent: its first statement begins a transaction
        self.last_used = monotonic()  # when it was lent or given back
        self.opening: Opening | None = None

    def address(self) -> object:
        return Engine, self.alias

    def is_open(self) -> bool:
        return self.connection is not None

    def is_in_transaction(self) -> bool:
        return self.in_atomic_block


KEY = "dbhealth"  # in the info of a pool's record, which is emptied for each new connection


def _note_opened(name: str, handle: Any, record: Any) -> None:
    pooled = record.info[KEY] = Pooled(name, handle)
    note_opened(pooled, find_opener())
    found = driver_behind(type(handle))
    if found is not None:
        note_socket(pooled, found[1])


def _note_lent(handle: Any, record: Any, proxy: Any) -> None:
    _note_use(record, lent=True)


def _note_given_back(handle: Any, record: Any) -> None:
    _note_use(record, lent=False)


def _note_use(record: Any, *, lent: bool) -> None:
    pooled = record.info.get(KEY)
    if pooled is not None:  # else it was opened before the engine was watched
        pooled.in_atomic_block = lent
        pooled.last_used = monotonic()


def _note_closed(handle: Any, record: Any) -> None:
    pooled = record.info.pop(KEY, None)
    if pooled is not None:
        pooled.connection = None


# At a fork


def _forget_pools() -> None:
    """Give each engine of a forked child a pool of its own; forks.py has silenced the sockets."""
    for engine in [*_engines]:
        if _vendor_of(engine).has_server:  # one in memory goes on
            engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
