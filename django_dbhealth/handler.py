"""Every connection watched from its birth."""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.db.utils import ConnectionHandler

from .conf import config_for
from .vendors import driver_of
from .wrappers import (
    CONNECTION_ATTRIBUTES,
    CONNECTION_HOOKS,
    CURSOR_HOOKS,
    derived_class,
    watch_connection,
)

logger = logging.getLogger("django_dbhealth.handler")

HANDLER_HOOKS = ("create_connection",)

if TYPE_CHECKING:
    HandlerBase = ConnectionHandler
else:
    HandlerBase = object


class WatchingHandler(HandlerBase):
    """A mixin over Django's ConnectionHandler; the connections that it makes are watched."""

    def create_connection(self, alias: str) -> BaseDatabaseWrapper:
        connection = super().create_connection(alias)
        _watch_if_wanted(connection)
        return connection


def install_guard() -> None:
    """Give ``django.db.connections`` the class above, and adopt what this thread has already.

    This is the one place that changes an object of Django's. The object stays the same one,
    because every ``from django.db import connections`` already holds it.
    """
    reason = guard_off_reason()
    if reason is not None:
        logger.warning("The guard stays off: %s", reason)
        return
    if not isinstance(connections, WatchingHandler):
        kind: Any = type(connections)
        connections.__class__ = derived_class(kind, WatchingHandler)
    if "settings" in vars(connections):  # else nobody has asked for a connection yet
        for connection in connections.all(initialized_only=True):
            _watch_if_wanted(connection)


def _watch_if_wanted(connection: BaseDatabaseWrapper) -> None:
    if config_for(connection.alias).guard and driver_of(connection) is not None:
        watch_connection(connection)


def guard_off_reason() -> str | None:
    """Return why the guard has to stay off with this Django, None where it can be on.

    The hooks that it needs are private to Django: they are looked for, not believed in.
    """
    hooks: dict[type[Any], tuple[str, ...]] = {
        BaseDatabaseWrapper: CONNECTION_HOOKS,
        CursorWrapper: CURSOR_HOOKS,
        ConnectionHandler: HANDLER_HOOKS,
    }
    missing = [
        f"{owner.__name__}.{name}()"
        for owner, names in hooks.items()
        for name in names
        if name not in vars(owner)
    ]
    missing += [
        f"{BaseDatabaseWrapper.__name__}.{name}"
        for name in CONNECTION_ATTRIBUTES
        if name not in BaseDatabaseWrapper.__init__.__code__.co_names
    ]
    if not hasattr(select, "poll"):
        return "this system has no poll()."
    if missing:
        return f"this version of Django has no {', '.join(missing)}."
    if not isinstance(connections, ConnectionHandler):
        return f"django.db.connections is a {type(connections).__name__}, not Django's own."
    return None
