"""Which connections this process has open, in which threads, and where they were opened."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import weakref
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import asgiref
import django

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .watch import Watch


@dataclass(frozen=True, kw_only=True)
class OpenConnection:
    """One connection of this process.

    ``thread_name`` and ``thread_id`` are those of the thread that opened it. ``opened_at`` is the
    "file:line" of the program that did: of a library or of Django if no line of the project's own
    led there, "unknown" if none did.
    """

    alias: str
    thread_name: str
    thread_id: int
    age_seconds: float
    idle_seconds: float  # since the last sign of life
    in_transaction: bool
    opened_at: str


Line = tuple[str, int | None]  # file and line; "" where none is the program's

# What is noted when a connection is opened: time, thread's name and id, file and line. It is put
# into words when somebody asks.
Opening = tuple[float, str, int, str, int | None]

# A set's add(), discard() and copy() are one step each: no lock, which a garbage collection that
# calls discard() might find taken.
_watches: set[weakref.ref[Watch]] = set()


def forget_all() -> None:
    """Forget the connections so far: a forked child's are those that it opens itself."""
    for reference in _watches:
        watch = reference()
        if watch is not None:
            watch.opening = None
    _watches.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)


def open_connections() -> list[OpenConnection]:
    """Return the open connections of this process, in all threads, the oldest first.

    Those that nobody guards (``"GUARD": False``, SQLite) are not known. Of Django's pools, those
    that are lent are there.
    """
    return sorted(
        (each for _, each in known_connections()), key=attrgetter("age_seconds"), reverse=True
    )


def known_connections() -> Iterator[tuple[BaseDatabaseWrapper, OpenConnection]]:
    """Return the open connections with Django's objects for them."""
    now = monotonic()
    for reference in _watches.copy():
        watch = reference()
        connection = watch.connection() if watch else None
        if watch is None or connection is None or connection.connection is None or watch.closed:
            continue
        yield connection, _describe(connection, watch, now)


def _describe(connection: BaseDatabaseWrapper, watch: Watch, now: float) -> OpenConnection:
    assert watch.opening is not None  # what is in the set was opened
    time, thread_name, thread_id, file, line = watch.opening
    return OpenConnection(
        alias=connection.alias,
        thread_name=thread_name,
        thread_id=thread_id,
        age_seconds=max(0.0, now - time),
        idle_seconds=max(0.0, now - watch.last_used),
        in_transaction=watch.is_in_transaction(),
        opened_at=f"{file}:{line}" if file else "unknown",
    )


def note_opened(watch: Watch, line: Line) -> None:
    """Take note of a connection that was opened just now, for that line of the program."""
    is_new = watch.opening is None
    name = threading.current_thread().name
    watch.opening = (monotonic(), name, threading.get_ident(), *line)
    if is_new:
        _watches.add(weakref.ref(watch, _watches.discard))


# Where: the innermost line of the best kind

PROJECT, LIBRARY, DJANGO, LAUNCHER, NOWHERE = range(5)

MAX_DEPTH = 100  # frames; a view under ten middlewares is 60 deep

_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def _folder(module: object) -> str:
    return f"{Path(str(getattr(module, '__file__', ''))).parent}{os.sep}"


_PYTHON = _folder(threading)
_OURS = f"{Path(__file__).parent}{os.sep}"
_DJANGO = _folder(django)
# Under every query, whoever makes it.
_BELOW = (_OURS, f"{_DJANGO}db{os.sep}", f"{_DJANGO}utils{os.sep}", _folder(asgiref))
_SCRIPTS = sysconfig.get_path("scripts") + os.sep


def program_line() -> Line:
    """Return the line of the program for which the caller was called.

    To be asked before a connect: after one, when the caches of the processor are somebody else's,
    it takes longer.
    """
    best = NOWHERE
    line: Line = ("", None)
    known_kind = _kinds.get
    frame: FrameType | None = sys._getframe(2)
    for _ in repeat(None, MAX_DEPTH):
        if frame is None:
            break
        file = frame.f_code.co_filename
        kind = known_kind(file)
        if kind is None:
            kind = _learn_kind(file)
        if kind < best:
            best, line = kind, (file, frame.f_lineno)
            if kind == PROJECT:
                break
        frame = frame.f_back
    return line


_kinds: dict[str, int] = {}  # half the time of an lru_cache
MANY_FILES = 1_000


def _learn_kind(file: str) -> int:
    if len(_kinds) >= MANY_FILES:  # a notebook makes up a new name for each cell
        _kinds.clear()
    return _kinds.setdefault(file, _kind_of(file))


def _kind_of(file: str) -> int:
    """Return whose code is in a file."""
    if file.startswith(("<frozen ", *_BELOW)):
        return NOWHERE
    if file.startswith(_DJANGO):
        return DJANGO
    if any(part in file for part in _PACKAGES):
        return LIBRARY
    if file.startswith(_PYTHON):
        return NOWHERE
    if file.startswith(_SCRIPTS) or Path(file).name == "manage.py":
        return LAUNCHER
    return PROJECT  # also a shell's, which is in no file: "<console>", "<stdin>"
