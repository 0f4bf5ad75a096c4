"""The moments at which connections may be given back, where Django knows only requests.

``close_old_connections``, ``connection_boundary`` and ``connections_released`` close no connection
that is in a transaction, carries session state, or has a result or a server-side cursor open.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import time
import weakref
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError
from django.utils.asyncio import async_unsafe
from django.utils.connection import ConnectionDoesNotExist

from .closing import carries_anything, close_if, connections_of_this_thread, give_back
from .vendors import driver_of
from .watch import watch_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

F = TypeVar("F", bound="Callable[..., Any]")

# The innermost boundary that runs now, in this thread, task or generator.
_current: ContextVar[_Scope | None] = ContextVar("django_dbhealth_boundary", default=None)


class _Scope:
    """What is common to everything that begins and ends: the forms in which it can be used."""

    def __init__(self, using: str | Iterable[str] | None = None) -> None:
        if callable(using):
            name = type(self).__name__
            raise TypeError(f"As a decorator it has parentheses: write @{name}().")
        self._using = None if using is None else _aliases(using)
        self._parent: _Scope | None = None
        self._running = False
        self._clear()

    def _begin(self) -> None:
        """Act on the connections of this thread when the scope begins."""

    def _end(self) -> None:
        """Act on the connections of this thread when the scope ends."""

    # As a context manager

    @async_unsafe(
        "You cannot enter this from an async context - use `async with`, which acts on the thread "
        "that the ORM uses."
    )
    def __enter__(self) -> Self:
        self._enter()
        try:
            self._note_and_begin()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._end()
        finally:
            self._leave()

    async def __aenter__(self) -> Self:
        self._enter()
        try:
            await _in_orm_thread(self._note_and_begin)
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await _in_orm_thread(self._end)
        finally:
            self._leave()

    def _enter(self) -> None:
        if self._running:
            raise RuntimeError(
                f"This {type(self).__name__}() has been entered already: make one for each `with`."
            )
        _require_app()
        self._running = True
        self._clear()
        self._resume()

    def _clear(self) -> None:
        # Weak: the connections of a thread that has ended must not live on in here.
        self._opened: WeakKeyDictionary[BaseDatabaseWrapper, weakref.ref[Any]] = WeakKeyDictionary()
        self._depths: WeakKeyDictionary[BaseDatabaseWrapper, int] = WeakKeyDictionary()

    def _leave(self) -> None:
        self._running = False
        self._pause()

    def _note_and_begin(self) -> None:
        for connection in _connections_of_this_thread(None):
            self._depths[connection] = _transaction_depth(connection)
        self._begin()

    # Which scope a connection was opened in

    def _resume(self) -> None:
        self._parent = _current.get()
        _current.set(self)

    def _pause(self) -> None:
        if _current.get() is self:
            parent = self._parent
            while parent is not None and not parent._running:
                parent = parent._parent
            _current.set(parent)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """While a generator is suspended, its consumer's connections are not its own."""
        self._pause()
        try:
            yield
        finally:
            self._resume()

    # As a decorator

    def __call__(self, function: F) -> F:
        """Return the function with this around it: each call, or each iteration, has its own."""
        return _around(function, lambda: copy.copy(self))


class connection_boundary(_Scope):  # noqa: N801 (a context manager, as contextlib.closing)
    """Give back, at the end, the connections that were opened inside.

    When it begins and when it ends, connections that are lost, past a CONN_MAX_AGE above 0, or
    idle past SERVER_IDLE_TIMEOUT are closed too. Nothing happens before it is entered. Use it with
    ``with``, ``async with``, or as a decorator: ``@connection_boundary(using="reports")``.

    ``using``: an alias or several; None: all of them. Entering raises ``ConnectionDoesNotExist``
    for an alias that is not in DATABASES.
    """

    def _begin(self) -> None:
        _for_each(_connections_of_this_thread(self._using), _close_if_obsolete)

    def _end(self) -> None:
        opened = [c for c, handle in list(self._opened.items()) if c.connection is handle()]
        held = _connections_of_this_thread(self._using)
        _for_each([c for c in held if c in opened], give_back)
        _for_each([c for c in held if c not in opened], _close_if_obsolete)


class connections_released(_Scope):  # noqa: N801
    """Close what this thread holds, so that a slow step takes no slot, and again at the end.

    A transaction that was open when the enclosing command or boundary began belongs to its
    caller: its connection is left alone. One that was opened since, by the same code, is a
    mistake: ``TransactionManagementError``. Use it with ``with``, ``async with``, or as a
    decorator. ``using`` is as for ``connection_boundary``.
    """

    def _begin(self) -> None:
        held = _connections_of_this_thread(self._using)
        for connection in held:
            self._refuse_transaction_of_the_same_code(connection)
        _for_each(held, give_back)

    def _end(self) -> None:
        _for_each(_connections_of_this_thread(self._using), give_back)

    def _refuse_transaction_of_the_same_code(self, connection: BaseDatabaseWrapper) -> None:
        if self._parent is None:
            return  # nobody said where this code begins, so the transaction may be its caller's
        if _transaction_depth(connection) > self._parent._depths.get(connection, 0):
            raise TransactionManagementError(
                f"{self._described()} cannot give back the connection {connection.alias!r}: this "
                "code has a transaction open on it, and slow work would run inside it. "
                "End the atomic() block first, or put the slow work before it."
            )

    def _described(self) -> str:
        """Return what an error message calls this."""
        return "connections_released()"


# The function, which is also the decorator


@overload
def close_old_connections(function: F, /) -> F: ...


@overload
def close_old_connections(function: None = None, /, **signal_arguments: Any) -> None: ...


def close_old_connections(function: F | None = None, /, **signal_arguments: Any) -> F | None:
    """Close this thread's connections that are past CONN_MAX_AGE, lost, or idle past the limit.

    Left alone are those in a transaction, with autocommit off, with session state, or with a
    result or a server-side cursor open. It is Django's function made safe, and can be a receiver
    of ``request_started`` as that is. On a running event loop it raises
    ``SynchronousOnlyOperation``: ``await aclose_old_connections()`` there.

    As a decorator, ``@close_old_connections`` puts a ``connection_boundary`` around a function, a
    method, a coroutine function, or the iteration of a generator or async generator.
    """
    if function is not None:
        return _around(function, connection_boundary)
    if signal_arguments and "signal" not in signal_arguments:
        names = ", ".join(sorted(signal_arguments))
        raise TypeError(
            f"close_old_connections() takes no argument {names}: it acts on every alias. For some "
            "of them there is connection_boundary(using=…)."
        )
    _close_old_connections_of_this_thread()
    return None


async def aclose_old_connections(**signal_arguments: Any) -> None:
    """Do what ``close_old_connections()`` does, on the thread that the ORM uses."""
    await _in_orm_thread(close_old_connections, **signal_arguments)


@async_unsafe(
    "You cannot call close_old_connections() from an async context: the ORM's connections are in "
    "another thread - use `await aclose_old_connections()`."
)
def _close_old_connections_of_this_thread() -> None:
    _require_app()
    _for_each(
        _connections_of_this_thread(None),
        functools.partial(_close_if_obsolete, even_without_max_age=True),
    )


# Around a function


def _around(function: F, new_scope: Callable[[], _Scope]) -> F:
    """Return the function, of whatever kind it is, with a new scope around each run of it."""
    if isinstance(function, (classmethod, staticmethod)):
        wrapped = _around(function.__func__, new_scope)
        return cast("F", type(function)(wrapped))
    if isinstance(function, type) or not callable(function):
        raise TypeError(
            f"{function!r} is not a function: decorate a function or a method. Of a class, "
            "decorate the method that does the work, for example handle() or run()."
        )
    if _is_kind(inspect.isasyncgenfunction, function):
        wrapper = _around_async_generator
    elif _is_kind(iscoroutinefunction, function):
        wrapper = _around_coroutine
    elif _is_kind(inspect.isgeneratorfunction, function):
        wrapper = _around_generator
    else:
        wrapper = _around_call
    return cast("F", functools.wraps(function)(wrapper(function, new_scope)))


def _is_kind(test: Callable[[Any], bool], function: Callable[..., Any]) -> bool:
    """Apply the test to a function, a partial, or an object that is called like one."""
    return test(function) or test(getattr(function, "__call__", None))  # noqa: B004


def _around_call(
    function: Callable[..., Any], new_scope: Callable[[], _Scope]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with new_scope():
            return function(*args, **kwargs)

    return call


def _around_coroutine(
    function: Callable[..., Any], new_scope: Callable[[], _Scope]
) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        async with new_scope():
            return await function(*args, **kwargs)

    return call


def _around_generator(
    function: Callable[..., Any], new_scope: Callable[[], _Scope]
) -> Callable[..., Any]:
    def iterate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with new_scope() as scope:
            generator = function(*args, **kwargs)
            resume, argument = generator.send, None
            while True:
                try:
                    item = resume(argument)
                except StopIteration as stop:
                    return stop.value
                try:
                    with scope._paused():
                        resume, argument = generator.send, (yield item)
                except GeneratorExit:
                    generator.close()
                    raise
                except BaseException as error:  # noqa: BLE001 (handed on to the generator)
                    resume, argument = generator.throw, error

    return iterate


def _around_async_generator(
    function: Callable[..., Any], new_scope: Callable[[], _Scope]
) -> Callable[..., Any]:
    async def iterate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        async with new_scope() as scope:
            generator = function(*args, **kwargs)
            resume, argument = generator.asend, None
            while True:
                try:
                    item = await resume(argument)
                except StopAsyncIteration:
                    return
                try:
                    with scope._paused():
                        resume, argument = generator.asend, (yield item)
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001 (handed on to the generator)
                    resume, argument = generator.athrow, error

    return iterate


async def _in_orm_thread(function: Callable[..., None], /, **kwargs: Any) -> None:
    """Run the function in the thread that the ORM uses, to its end even when cancelled."""
    work = asyncio.ensure_future(sync_to_async(function, thread_sensitive=True)(**kwargs))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    work.result()
    if cancelled is not None:
        raise cancelled


# Which connections


def note_opened_connections() -> None:
    """Let every boundary know what is opened inside it. Calling it again changes nothing."""
    connection_created.connect(_note_opened, dispatch_uid="django_dbhealth.boundaries")


def _note_opened(connection: BaseDatabaseWrapper, **signal_arguments: Any) -> None:
    scope = _current.get() if driver_of(connection) is not None else None
    while scope is not None:
        if scope._running:
            scope._opened[connection] = weakref.ref(connection.connection)
        scope = scope._parent


def _aliases(using: str | Iterable[str]) -> frozenset[str]:
    return frozenset([using] if isinstance(using, str) else using)


def _connections_of_this_thread(using: frozenset[str] | None) -> list[BaseDatabaseWrapper]:
    """Return the open connections, without making a wrapper for an alias that has none."""
    for alias in using or ():
        if alias not in connections.settings:
            known = ", ".join(connections.settings)
            raise ConnectionDoesNotExist(
                f"The connection {alias!r} doesn't exist. DATABASES has: {known}."
            )
    return [
        connection
        for connection in connections_of_this_thread()
        if using is None or connection.alias in using
    ]


def _for_each(
    held: list[BaseDatabaseWrapper], action: Callable[[BaseDatabaseWrapper], None]
) -> None:
    """Apply the action to each, whatever happens with the others; then raise what was raised."""
    with ExitStack() as stack:
        for connection in reversed(held):
            stack.callback(action, connection)


def _require_app() -> None:
    if "django_dbhealth" not in apps.app_configs:
        raise ImproperlyConfigured(
            "Add 'django_dbhealth' to INSTALLED_APPS: without it nobody watches the connections, "
            "and a boundary could close one that holds a lock or a temporary table."
        )


# What may be closed


def _close_if_obsolete(
    connection: BaseDatabaseWrapper, *, even_without_max_age: bool = False
) -> None:
    """Close the connection if it is lost or too old, unless something would be lost with it."""
    driver = driver_of(connection)
    in_transaction = connection.in_atomic_block or not connection.autocommit
    if driver is None:  # not ours to judge: Django's own function would do this
        if even_without_max_age and not in_transaction and not connection.allow_thread_sharing:
            connection.close_if_unusable_or_obsolete()
        return
    # Django's health check closes what is in a failed transaction, or carries anything.
    if not connection.in_atomic_block and not carries_anything(connection):
        connection.health_check_done = False  # type: ignore[attr-defined]
    max_age = connection.settings_dict["CONN_MAX_AGE"]
    expired = (
        connection.close_at is not None
        and (even_without_max_age or max_age > 0)
        and time.monotonic() >= connection.close_at
    )
    close_if(connection, driver, unwanted=expired or _idle_past_the_limit(connection))


def _transaction_depth(connection: BaseDatabaseWrapper) -> int:
    if connection.in_atomic_block:
        return len(connection.atomic_blocks)
    return int(connection.autocommit != connection.settings_dict["AUTOCOMMIT"])


def _idle_past_the_limit(connection: BaseDatabaseWrapper) -> bool:
    watch = watch_of(connection)
    if watch is None:
        return False  # nobody knows how long it was idle
    limit = watch.idle_limit()
    return limit is not None and watch.idle_seconds() >= limit
