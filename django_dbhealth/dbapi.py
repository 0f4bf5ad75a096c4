"""Connection: the guard's care for code without an ORM, around any driver that is known here.

No Django settings are needed. Whether a connection is probed, healed or left alone is decided in
guard.py, for Django's and for these.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from .conf import KINDS, Config, described
from .faults import Outcome
from .forks import note_socket
from .guard import before_use, note_failure, note_interruption
from .notes import note_statement
from .registry import find_opener, note_opened
from .vendors import VENDORS, driver_behind
from .watch import Watch, remains, sends_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .vendors.base import Driver, Vendor

__all__ = ["Connection", "Cursor", "InterfaceError"]


class InterfaceError(Exception):
    """A connection is used in a way that cannot work; PEP 249's word for it."""


class Connection:
    """A driver's connection that is replaced when it was lost and nothing is lost with it.

    ``connect`` opens a new connection of MySQLdb, PyMySQL, psycopg or psycopg2; it is called
    without arguments, at the first use and for healing. Autocommit is turned on: what is to be
    undone together goes into ``transaction()``. A connection idle for longer than ``ping_after``
    seconds is probed before its next use; a probe takes ``ping_timeout`` seconds at most. ``name``
    is what notes, logs and ``open_connections()`` call it.

    Errors are the driver's own; InterfaceError is raised for what cannot work: another thread than
    the one that opened it, a closed Connection, a ``connect`` that returns no new connection.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        ping_after: float = 30,
        ping_timeout: float = 5,
        name: str = "dbapi",
    ) -> None:
        if not callable(connect):
            raise TypeError(
                f"connect is a {_kind(connect)}. Give a function that opens a new connection each "
                "time it is called, such as lambda: MySQLdb.connect(...)."
            )
        self._open = partial(_open, connect, name, _config(ping_after, ping_timeout))
        self._name = name
        self._link: _Link | None = None
        self._closed = False
        self._in_transaction = False

    def __repr__(self) -> str:
        return f"<Connection {self._name!r}>"

    def query(self, sql: Any, params: Any = None) -> list[Any]:
        """Run a statement and return its rows; none for one that has no result."""
        with self.cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def cursor(self, *args: Any, **options: Any) -> Cursor:
        """Return a cursor; the arguments are for the driver's ``cursor()``."""
        return Cursor(self, args, options)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does at its end, or nothing of it.

        Raises InterfaceError where a transaction is open already.
        """
        link = self._ready()
        if self._in_transaction or link.session.in_transaction:
            raise InterfaceError(
                f"The connection {self._name!r} is in a transaction already. Leave it before you "
                "begin another, or send SAVEPOINT and ROLLBACK TO inside it."
            )
        link.transaction_began()
        link.used = link.in_atomic_block = self._in_transaction = True
        try:
            self._send("BEGIN")
            yield
            self._commit()
        except BaseException:
            self._roll_back(link)
            raise
        finally:
            link.in_atomic_block = link.is_over = self._in_transaction = False
            link.transaction_ended()

    def close(self) -> None:
        """Close the connection for good. A second call changes nothing."""
        if self._link is not None and self._link.connection is not None:
            self._check_thread(self._link)
            self._link.discard()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Before use

    def _ready(self) -> _Link:
        """Return the open connection, healed if it was lost and nothing was lost with it."""
        if self._closed or self._in_transaction:
            return self._in_use()
        link = self._link
        if link is None or link.connection is None:
            link = self._link = self._open(link)
            return link
        self._check_thread(link)
        before_use(link, link, monotonic())
        return link

    def _in_use(self) -> _Link:
        """Return the connection as it is."""
        if self._closed:
            raise InterfaceError(
                f"The connection {self._name!r} is closed. Make another Connection."
            )
        link = self._link
        if link is None or link.connection is None:
            raise InterfaceError(
                f"The connection {self._name!r} is not there any more: it was left behind by a "
                "fork, or lost and could not be opened again. Begin anew what was begun on it."
            )
        self._check_thread(link)
        if link.is_over:
            raise InterfaceError(
                f"The transaction on {self._name!r} was rolled back by its server when an earlier "
                "statement failed. Leave the block and do all of it again."
            )
        return link

    def _check_thread(self, link: _Link) -> None:
        if link._thread_ident == threading.get_ident():
            return
        opener = link.opening[1][0] if link.opening else "?"
        raise InterfaceError(
            f"The connection {self._name!r} was opened by the thread {opener!r} and is used by "
            f"{threading.current_thread().name!r}. Make a Connection in each thread, kept in a "
            "threading.local() for instance."
        )

    # Statements

    def _execute(self, cursor: Cursor, method: str, sql: Any, params: Any) -> None:
        many = method == "executemany"
        link = self._ready()
        link.used = True
        is_quiet = link.session.is_quiet(sql)
        with _noting(link, sql, many=many):
            cursor._follow(link)
            getattr(cursor.cursor, method)(sql, params)
        if not many or not sends_nothing(params):
            link.last_used = monotonic()
        if not is_quiet:
            link.session.observe(sql, None if many else params)
        if getattr(cursor.cursor, "name", None):  # on the server
            link.cursor_has_run(cursor)

    def _send(self, sql: str) -> None:
        """Send a statement that begins or ends a transaction."""
        link = self._in_use()
        with _noting(link, sql):
            cursor = link.connection.cursor()
            cursor.execute(sql)
            cursor.close()
        link.last_used = monotonic()

    def _commit(self) -> None:
        link = self._in_use()
        if link.driver.has_failed(link.connection):
            raise InterfaceError(
                f"A statement of the transaction on {self._name!r} has failed, so the server can "
                "only roll it back: nothing of it stays. Do all of it again, or set a SAVEPOINT "
                "before a statement that may fail."
            )
        link.committing = True
        try:
            self._send("COMMIT")
        finally:
            link.committing = False

    def _roll_back(self, link: _Link) -> None:
        """Roll back without an error: there is one already that counts."""
        if link.connection is None or link.lost:
            return
        link.is_over = False
        with suppress(link.connection.Error):
            if not link.interrupted:
                self._send("ROLLBACK")
                link.session.rolled_back()
                return
        link.discard()  # else the transaction would stay open


class Cursor:
    """A cursor whose statements pass the guard. ``cursor`` is the driver's own behind it."""

    def __init__(
        self, connection: Connection, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.cursor: Any = None
        self._connection = connection
        self._arguments = args, options
        self._generation = 0

    def execute(self, sql: Any, params: Any = None) -> Self:
        """Run a statement."""
        self._connection._execute(self, "execute", sql, params)
        return self

    def executemany(self, sql: Any, rows: Iterable[Any]) -> Self:
        """Run a statement for each of some parameters: outside a transaction some may run alone."""
        self._connection._execute(self, "executemany", sql, rows)
        return self

    def fetchone(self) -> Any:
        """Return the next row, None after the last one."""
        return self._fetch("fetchone")

    def fetchmany(self, size: int) -> list[Any]:
        """Return the next rows, so many at most."""
        return list(self._fetch("fetchmany", size))

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""
        return list(self._fetch("fetchall"))

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    @property
    def description(self) -> Any:
        """What the columns are, None for a statement that has no result."""
        return self._driver_cursor().description

    @property
    def rowcount(self) -> int:
        """How many rows the statement has returned or changed."""
        return int(self._driver_cursor().rowcount)

    @property
    def lastrowid(self) -> Any:
        """The AUTO_INCREMENT value of the last INSERT; MySQL's drivers have it."""
        return self._driver_cursor().lastrowid

    def close(self) -> None:
        """Close the cursor; ``execute()`` opens it again."""
        cursor, self.cursor = self.cursor, None
        link = self._connection._link
        if cursor is None or link is None or link.connection is None:
            return
        link.cursor_was_closed(self)
        if link.lost or self._generation != link.generation:
            with suppress(link.connection.Error):
                cursor.close()
            return
        with _noting(link, many=True):  # an error is a later statement's in the same text
            cursor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _follow(self, link: _Link) -> None:
        """Follow the connection to another one that it was given."""
        if self.cursor is not None and self._generation == link.generation:
            return
        self.close()
        args, options = self._arguments
        self.cursor = link.connection.cursor(*args, **options)
        self._generation = link.generation

    def _fetch(self, method: str, *args: Any) -> Any:
        cursor, link = self._driver_cursor(), self._connection._in_use()
        with _noting(link):
            return getattr(cursor, method)(*args)

    def _driver_cursor(self) -> Any:
        if self.cursor is None:
            raise InterfaceError("The cursor has run no statement yet. Call execute() first.")
        return self.cursor


class _Link(Watch):
    """The driver's connection behind a Connection; its attributes have the names of Django's."""

    __slots__ = (
        "_name",
        "_open",
        "_thread_ident",
        "connection",
        "in_atomic_block",
        "is_over",
        "of_data",
    )

    errors_occurred = False

    def __init__(
        self,
        name: str,
        found: tuple[Vendor, Driver],
        config: Config,
        open_again: Callable[[_Link, Any], object],
    ) -> None:
        self._name = name
        self._open = open_again
        self._thread_ident = threading.get_ident()
        self.connection: Any = None
        self.in_atomic_block = False
        self.is_over = False  # the server has rolled the transaction back by itself
        self.of_data = ()
        super().__init__(*found, lambda _alias: config)

    @property
    def alias(self) -> str:
        return self._name

    def handle(self) -> Any:
        return self.connection

    def address(self) -> object:
        return Connection, self._name

    def sender(self) -> type:
        return Connection

    def is_in_transaction(self) -> bool:
        return self.in_atomic_block or self.session.in_transaction

    def is_replaceable(self) -> bool:
        return not self.in_atomic_block

    def why_kept(self) -> list[str]:
        return ["it was in a transaction"] if self.in_atomic_block else []

    def replace(self) -> None:
        handle, self.connection = self.connection, None
        if not self.driver.cursors_need_handle:
            with suppress(handle.Error):
                handle.close()
        self._open(self, handle)

    def take(self, handle: Any) -> None:
        """Begin with a handle that was opened just now."""
        self._thread_ident = threading.get_ident()
        self.connection = handle
        self.in_atomic_block = False
        self.of_data = handle.DataError, handle.IntegrityError
        self.reset()
        note_opened(self, find_opener())
        note_socket(self, self.driver)

    def discard(self) -> None:
        """Close the handle, whatever state it is in."""
        remains.clear()
        handle, self.connection = self.connection, None
        with suppress(handle.Error):
            handle.close()


def _open(
    connect: Callable[[], Any],
    name: str,
    config: Config,
    link: _Link | None,
    lost: Any = None,
) -> _Link:
    """Open a connection, in the place of a link's where there is one."""
    open_again = partial(_open, connect, name, config)
    began = monotonic()
    try:
        handle = connect()
        found = _recognise(handle, name, lost)
        found[1].commit_each_statement(handle)
    except Exception as error:
        behind = driver_behind(type(error))
        if behind is not None:
            refused = _Link(name, behind, config, open_again)
            refused.connecting, refused.tried_seconds = True, monotonic() - began
            note_failure(refused, refused, error)
        raise
    link = link or _Link(name, found, config, open_again)
    link.take(handle)
    return link


def _recognise(handle: Any, name: str, lost: Any) -> tuple[Vendor, Driver]:
    """Return whose connection it is; InterfaceError where it cannot be used."""
    if handle is None:
        raise InterfaceError(
            f"connect() of {name!r} has returned None. Let it return the connection that it opens."
        )
    found = driver_behind(handle.__class__)  # of what an application monitor's proxy stands for
    if found is None:
        known = ", ".join(module for vendor in VENDORS.values() for module in vendor.drivers)
        raise InterfaceError(
            f"connect() of {name!r} has returned a {_kind(handle)}, which is no connection of a "
            f"driver that is known here. Known are: {known}."
        )
    if handle is lost or found[1].descriptor(handle) is None:
        raise InterfaceError(
            f"connect() of {name!r} has returned a connection that is closed already. Let it open "
            "a new one each time it is called."
        )
    return found


@contextmanager
def _noting(link: _Link, sql: object = "", *, many: bool = False) -> Iterator[None]:
    """Note how the block's use of the connection ends, on its error and for the next use."""
    began = monotonic()
    try:
        yield
    except link.connection.Error as error:
        link.in_doubt = link.in_doubt or not isinstance(error, link.of_data)
        fault = note_failure(link, link, error)
        note_statement(link, error, sql, many=many, began=began)
        if link.in_atomic_block and fault is not None and fault.outcome is Outcome.ROLLED_BACK:
            link.is_over = True
        raise
    except BaseException as error:
        note_interruption(link, error)
        raise


def _config(ping_after: float, ping_timeout: float) -> Config:
    for name, value in (("ping_after", ping_after), ("ping_timeout", ping_timeout)):
        kind = KINDS[name.upper()]
        if not kind.accepts(value):
            raise ValueError(f"{name} is {described(value)}. Give {kind.words}.")
    return Config(ping_after=ping_after, ping_timeout=ping_timeout)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
