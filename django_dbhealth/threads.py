"""A thread that ends gives its connections back, then and there.

Without this they stay open until some garbage collection, because Django's objects for them are in
reference cycles; a slot of a psycopg pool is then never given back.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from asgiref.sync import SyncToAsync
from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from .closing import is_of_this_thread, log_farewell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


logger = logging.getLogger("django_dbhealth.threads")


class ThreadEnd:
    """Closes what its thread has opened when it is destroyed, which the thread does at its end.

    Greenlets do likewise where gevent has patched threading.
    """

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self._process = os.getpid()
        # Weak: what nobody uses any more goes as early as without us.
        self.opened: WeakSet[BaseDatabaseWrapper] = WeakSet()

    def __del__(
        self,
        is_finalizing: Callable[[], bool] = sys.is_finalizing,
        process: Callable[[], int] = os.getpid,
    ) -> None:
        # The end of the process closes everything. A forked child destroys the objects of its
        # parent's other threads, which go on over there.
        if is_finalizing() or process() != self._process:
            return
        with _listed(self._thread), ExitStack() as stack:
            for connection in self.opened:
                stack.callback(_close_for_good, connection)


@contextmanager
def _listed(thread: threading.Thread) -> Iterator[None]:
    """Let a thread that has ended already be known to threading as the current one.

    Whoever writes to a log asks for it. If there is none threading makes up another, for ever.
    """
    threads: dict[int, threading.Thread] = threading._active  # type: ignore[attr-defined]
    number = threading.get_ident()
    if number in threads:
        yield
        return
    threads[number] = thread
    try:
        yield
    finally:
        threads.pop(number, None)


_of_this_thread = threading.local()


def close_at_thread_end() -> None:
    """Have the connections of every thread closed at its end. Calling it again changes nothing.

    Those that are shared between threads stay open: another thread may be using them.
    """
    connection_created.connect(_note_opened, dispatch_uid="django_dbhealth.threads")


def _note_opened(connection: BaseDatabaseWrapper, **signal_arguments: Any) -> None:
    if not is_of_this_thread(connection):
        return
    end = getattr(_of_this_thread, "end", None)
    if end is None:
        end = _of_this_thread.end = ThreadEnd()
    end.opened.add(connection)
    if connection.settings_dict["CONN_MAX_AGE"] != 0 and _serves_one_request():
        _warn_of_max_age(connection)


def _serves_one_request() -> bool:
    """Return whether the thread was made for one request, and ends with it, as under ASGI."""
    return SyncToAsync.thread_sensitive_context.get(None) is not None


_warned: dict[str, object] = {}


def _warn_of_max_age(connection: BaseDatabaseWrapper) -> None:
    first = object()
    if _warned.setdefault(connection.alias, first) is not first:
        return
    logger.warning(
        "CONN_MAX_AGE of database %r is %s, but under ASGI every request has a thread of its "
        "own, and its connection is closed when that thread ends: no request finds one to use "
        'again. Write "CONN_MAX_AGE": 0; what keeps connections open under ASGI is a pool.',
        connection.alias,
        connection.settings_dict["CONN_MAX_AGE"],
        extra={"alias": connection.alias},
    )


def close_what_ended_threads_left() -> None:
    """Close the connections of threads that have ended before anybody took note of them."""
    if "settings" not in vars(connections):
        return  # nobody has asked for a connection yet
    alive = sys._current_frames()
    if threading.get_ident() not in alive:
        return  # gevent's greenlets, of which there is no list
    for each in gc.get_objects():
        if issubclass(type(each), BaseDatabaseWrapper) and each._thread_ident not in alive:
            _close_for_good(each)


def _close_for_good(connection: BaseDatabaseWrapper) -> None:
    if connection.connection is None or connection.allow_thread_sharing:
        return
    connection.inc_thread_sharing()  # who closes it may be gevent's hub, or the main thread
    # Past Django's look for a running event loop: one in a thread that has ended costs 64 bytes for
    # good (measured with CPython 3.11, not with 3.13).
    close = type(connection).close
    close = getattr(close, "__wrapped__", close)
    try:
        close(connection)
    except Error as error:
        log_farewell(connection, error)
    finally:
        connection.dec_thread_sharing()
