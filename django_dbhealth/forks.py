"""A forked child forgets its parent's connections, without a byte to the server.

Both processes hold the same sockets. A child that closed one, or whose garbage collection did,
would end its parent's session. SQLite has no socket, and stays as it is.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from django.db.backends.signals import connection_created

from .vendors import VENDORS, driver_of
from .watch import remains

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .vendors.base import Driver


class Owner(Protocol):
    """What holds a driver's connection: the names are those of Django's."""

    connection: Any
    in_atomic_block: bool


class Socket(NamedTuple):
    """A socket's descriptor, and what tells whether the number is still that socket's.

    It is noted when the connection is opened: a handle that is in use by a thread which the child
    does not have, or one that was lost, does not tell any more.
    """

    descriptor: int
    inode: int
    driver: Driver

    def is_open(self) -> bool:
        try:
            return os.fstat(self.descriptor).st_ino == self.inode
        except OSError:
            return False


_sockets: dict[weakref.ref[Owner], Socket] = {}


def forget_connections_after_fork() -> None:
    """Have forked children forget the connections that are open by then.

    Calling it again changes nothing.
    """
    connection_created.connect(_note_opened, dispatch_uid="django_dbhealth.forks")


def _note_opened(connection: BaseDatabaseWrapper, **signal_arguments: Any) -> None:
    driver = driver_of(connection)
    if driver is not None:
        note_socket(connection, driver)


def note_socket(owner: Owner, driver: Driver) -> None:
    """Have forked children forget a connection that was opened just now."""
    descriptor = driver.descriptor(owner.connection)
    if descriptor is not None:
        socket = Socket(descriptor, os.fstat(descriptor).st_ino, driver)
        _sockets[weakref.ref(owner, _forget_socket)] = socket


def _forget_socket(reference: weakref.ref[Owner]) -> None:
    _sockets.pop(reference, None)


# At a fork

# While a process forks: in the child those of its other threads are garbage, and would be closed by
# a garbage collection before we are asked.
_held: list[list[Owner | None]] = []

# In a child: handles that another thread was using are in no state to be destroyed.
_forgotten: list[Any] = []


def _hold() -> None:
    _held.append([reference() for reference in _sockets.copy()])


def _let_go() -> None:
    _held.pop()


def _forget_inherited() -> None:
    remains.clear()  # once a daemon has closed all descriptors, their numbers are its own's
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    silence = functools.partial(os.dup2, nowhere, inheritable=False)
    for reference, socket in _sockets.copy().items():
        owner = reference()
        if owner is not None and owner.connection is not None:
            _forget(owner, socket, silence)
    for vendor in VENDORS.values():
        _forgotten.extend(vendor.forget_pools())
    os.close(nowhere)
    _sockets.clear()
    _held.clear()


def _forget(owner: Owner, socket: Socket, silence: Callable[[int], object]) -> None:
    """Leave the connection as one that was never opened."""
    _forgotten.append(owner.connection)
    if socket.is_open():
        silence(socket.descriptor)
        socket.driver.end(owner.connection)  # or psycopg would warn when the child ends
    owner.connection = None
    owner.in_atomic_block = False
    if hasattr(owner, "run_on_commit"):
        owner.run_on_commit = []  # they are its parent's to run; connect() sees to all else


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget_inherited)
