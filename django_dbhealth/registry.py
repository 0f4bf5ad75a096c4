"""Which connections this process has open, in which threads, and where they were opened."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import weakref
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import asgiref
import django

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType


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


Place = tuple["CodeType", int]  # and the offset of the instruction in it

# Who opens a connection: the thread's name and id, and the place in the program. Not the thread
# itself, which might hold the connection.
Opener = tuple[str, int, Place | None]

# What is noted when it is open: the time, and that. It is put into words when somebody asks.
Opening = tuple[float, Opener]


class Known(Protocol):
    """What is asked of a connection that is in the list: a Watch, or an entry of contrib's."""

    opening: Opening | None
    last_used: float

    @property
    def alias(self) -> str: ...
    def address(self) -> object: ...
    def is_open(self) -> bool: ...
    def is_in_transaction(self) -> bool: ...


# A set's add(), discard() and copy() are one step each: no lock, which a garbage collection that
# calls discard() might find taken.
_known: set[weakref.ref[Known]] = set()


def forget_all() -> None:
    """Forget the connections so far: a forked child's are those that it opens itself."""
    for reference in _known:
        known = reference()
        if known is not None:
            known.opening = None
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)


def open_connections() -> list[OpenConnection]:
    """Return the open connections of this process, in all threads, the oldest first.

    Those that nobody guards (``"GUARD": False``, SQLite) are not known. Of Django's pools, those
    that are lent are there; of a watched SQLAlchemy engine's, all.
    """
    return sorted(
        (each for _, each in known_connections()), key=attrgetter("age_seconds"), reverse=True
    )


def known_connections() -> Iterator[tuple[Known, OpenConnection]]:
    """Return the open connections with what is known of them."""
    now = monotonic()
    for reference in _known.copy():
        known = reference()
        if known is not None and known.is_open():
            yield known, _describe(known, now)


def _describe(known: Known, now: float) -> OpenConnection:
    assert known.opening is not None  # what is in the set was opened
    time, (thread_name, thread_id, place) = known.opening
    return OpenConnection(
        alias=known.alias,
        thread_name=thread_name,
        thread_id=thread_id,
        age_seconds=max(0.0, now - time),
        idle_seconds=max(0.0, now - known.last_used),
        in_transaction=known.is_in_transaction(),
        opened_at=_in_words(place) if place else "unknown",
    )


def _in_words(place: Place) -> str:
    code, offset = place
    lines = (line for start, end, line in code.co_lines() if start <= offset < end)
    return f"{code.co_filename}:{next(lines, None)}"


def note_opened(known: Known, opener: Opener) -> None:
    """Take note of a connection that was opened, and used for the first time, just now."""
    is_new = known.opening is None
    known.opening = (known.last_used, opener)
    if is_new:
        _known.add(weakref.ref(known, _known.discard))


# Where: the innermost place of the best kind

PROJECT, LIBRARY, DJANGO, LAUNCHER, NOWHERE = range(5)

_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def _folder(module: object) -> str:
    return f"{Path(str(getattr(module, '__file__', ''))).parent}{os.sep}"


_PYTHON = _folder(threading)
_OURS = f"{Path(__file__).parent}{os.sep}"
_DJANGO = _folder(django)
# Under every query, whoever makes it.
_BELOW = (_OURS, f"{_DJANGO}db{os.sep}", f"{_DJANGO}utils{os.sep}", _folder(asgiref))
_SCRIPTS = sysconfig.get_path("scripts") + os.sep


def find_opener() -> Opener:
    """Return for whom the caller was called.

    Django's connections ask before they connect: after it, when the caches of the processor are
    somebody else's, it takes longer. For that reason it does as little as it can, and no line is
    looked up yet.
    """
    kinds, best, place = _kinds, NOWHERE, None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        try:
            kind = kinds[code.co_filename]
        except KeyError:
            kind = _learn_kind(code.co_filename)
        if kind < best:
            best, place = kind, (code, frame.f_lasti)
            if kind == PROJECT:
                break
        frame = frame.f_back
    return threading.current_thread().name, threading.get_ident(), place


_kinds: dict[str, int] = {}
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
