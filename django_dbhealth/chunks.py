"""Large results in short pieces: between two of them there is no cursor and no transaction.

Keyset pagination: each piece begins after the last key of the one before, so that rows which come
and go meanwhile shift nothing.
"""

from __future__ import annotations

import logging
from collections import namedtuple
from copy import copy
from functools import partial
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import EmptyResultSet
from django.db import Error, connections
from django.db.models import QuerySet, Value
from django.db.models.query import (
    FlatValuesListIterable,
    ModelIterable,
    NamedValuesListIterable,
    ValuesIterable,
    ValuesListIterable,
)
from django.utils.asyncio import async_unsafe

from .closing import close
from .compiled import CompiledQuery, Slot
from .conf import get_config
from .diagnosis import classify
from .faults import Kind
from .keyset import Key
from .vendors import vendor_named
from .watch import watch_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

T = TypeVar("T")

logger = logging.getLogger("django_dbhealth.chunks")

CHUNK_SIZE = 2000  # rows; that of QuerySet.iterator()
LAZY = (ModelIterable, ValuesListIterable)
REGROWTH = 16  # good pieces after which the size is the full one again


def chunked_iterator(
    queryset: QuerySet[Any, T],
    *,
    chunk_size: int = CHUNK_SIZE,
    order_by: str | Sequence[str] = "pk",
    start_after: Any = None,
) -> ChunkedIterator[T]:
    """Iterate over what the queryset yields, read in pieces of ``chunk_size`` rows.

    ``order_by`` is the key: ``"pk"``, a unique field, or fields such as ``("created", "pk")`` one
    of which is unique; ``"-pk"`` is descending. Its values must never change. ``start_after`` is
    what ``position`` was of an iterator over the same key. Outside a transaction a piece whose
    SELECT met a loss of the connection or a timeout is read again at half the size.

    Raises ``TypeError`` or ``ValueError``, before the first query, for a queryset that cannot be
    read so: sliced, ordered otherwise, combined, or with rows that are not one for each key.
    """
    if not isinstance(queryset, QuerySet):
        raise TypeError(
            f"chunked_iterator() reads a QuerySet, not {type(queryset).__name__}: "
            "write Model.objects.all() or a filter() of it."
        )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size is a number of rows, an int, not {type(chunk_size).__name__}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but a piece has at least 1 row.")
    key = Key.of(queryset.model, order_by)
    _check(queryset, key)
    alias = queryset.db  # once: a router might name another replica for each piece
    if alias not in connections:
        raise ValueError(
            f"There is no database {alias!r}. Write using() with one of "
            f"{', '.join(map(repr, connections))}."
        )
    return ChunkedIterator(queryset.using(alias), key, chunk_size, key.parse(start_after))


# Which querysets


def _check(queryset: QuerySet[Any, Any], key: Key) -> None:
    """Raise ValueError for one whose rows are not one for each key, in the order of the key."""
    problem = _problem_of_order(queryset.query, key) or _problem_of_rows(queryset, key)
    if problem:
        raise ValueError(f"chunked_iterator() cannot read this queryset: {problem}")


def _problem_of_order(query: Any, key: Key) -> str | None:
    if query.combinator:
        return f"it is a {query.combinator}(). Read its parts one by one, or filter with Q objects."
    if query.is_sliced:
        return "it is sliced. Write a filter() for the range, or leave the loop with break."
    if query.extra_order_by or not query.standard_ordering:
        return "it is ordered by extra() or reverse(). Add .order_by(), and order_by= here."
    if query.order_by not in ((), key.given, tuple(key.ordering)):
        return (
            f"it is ordered by {', '.join(map(str, query.order_by))}. Add .order_by() to it: "
            f"the key is the order, here {', '.join(key.given)}; order_by= takes another one."
        )
    return None


def _problem_of_rows(queryset: QuerySet[Any, Any], key: Key) -> str | None:
    """Return what keeps the rows from being one for each key, whichever part of them is read."""
    query: Any = queryset.query
    if query.distinct_fields and query.distinct_fields not in (key.given, tuple(key.ordering)):
        return (
            f"it is distinct({', '.join(map(repr, query.distinct_fields))}). "
            "Only the key itself can be: the rows of a piece would depend on where it begins."
        )
    if query.distinct and not query.distinct_fields and _columns(queryset) is not None:
        return (
            "it is distinct() on values(), and the key is not among them. Leave out distinct(), "
            "or read the instances."
        )
    if isinstance(query.group_by, tuple) and not _groups_by(query, key):
        return "its rows are groups. Write annotate() before values(), so that each row has a key."
    if any(each.contains_over_clause for each in query.annotations.values()):
        return "a window function sees only the piece. Compute it in a subquery."
    if any(getattr(each, "set_returning", False) for each in _parts(query.annotations.values())):
        return "a function gives several rows for one key. Read the rows, and call it for each."
    if query.extra_tables or _repeats_keys(query):
        return (
            "a join gives several rows for one key. Add .distinct(), or write "
            "filter(pk__in=<this queryset>.values('pk'))."
        )
    return None


def _columns(queryset: Any) -> tuple[str, ...] | None:
    """Return what ``values()`` was called with, None where the rows are instances."""
    columns: tuple[str, ...] | None = queryset._fields
    return columns


def _groups_by(query: Any, key: Key) -> bool:
    targets = {
        column.target
        for column in query.group_by
        if getattr(column, "alias", None) == query.base_table
    }
    return targets.issuperset(key.fields)


def _repeats_keys(query: Any) -> bool:
    """Return whether a join over a reverse or a many-to-many relation shows in the rows."""
    aliases = {alias for alias, join in query.alias_map.items() if _multiplies(join)}
    if not any(query.alias_refcount[alias] for alias in aliases):
        return False
    selected = [
        *query.select,
        *(each for each in query.annotation_select.values() if not each.contains_aggregate),
    ]
    shown = {getattr(part, "alias", None) for part in _parts(selected)}
    return not (query.distinct or query.group_by) or not shown.isdisjoint(aliases)


def _parts(expressions: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(each.flatten() for each in expressions)


def _multiplies(join: Any) -> bool:
    return getattr(getattr(join, "join_field", None), "multiple", False)


# What is read: the rows in the form that the queryset has, and the key of each


class Form(NamedTuple):
    """How the key of a row that was read is told, and what the program gets of the row."""

    queryset: QuerySet[Any, Any]
    key_of: Callable[[Any], Any]
    shape: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, queryset: QuerySet[Any, Any], key: Key) -> Form:
        if _columns(queryset) is None:
            return cls._of_instances(queryset, key)
        names = _names(queryset.query)
        is_shown = set(key.names) <= set(queryset.query.values_select)
        rows: Any = queryset.all() if is_shown else queryset.annotate(**key.hidden)
        kind, rows._iterable_class = rows._iterable_class, ValuesListIterable
        places = map(names.index, key.names) if is_shown else range(-len(key.fields), 0)
        return cls(rows, itemgetter(*places), _shape_of(kind, names))

    @classmethod
    def _of_instances(cls, queryset: QuerySet[Any, Any], key: Key) -> Form:
        deferred, _ = queryset.query.deferred_loading
        if not deferred or all(field.primary_key for field in key.fields):
            return cls(queryset, attrgetter(*key.names))
        hidden = key.hidden
        return cls(queryset.annotate(**hidden), attrgetter(*hidden), partial(_without, hidden))

    @property
    def is_lazy(self) -> bool:
        """Whether nothing is asked of the database after the first row."""
        rows: Any = self.queryset
        return rows._iterable_class in LAZY and not rows._prefetch_related_lookups


def _names(query: Any) -> list[str]:
    """Return the names of the columns of ``values()``, in their order."""
    return list(
        query.selected or (*query.extra_select, *query.values_select, *query.annotation_select)
    )


def _shape_of(kind: Any, names: list[str]) -> Callable[[Any], Any]:
    """Return what makes a row of that kind of a tuple that may have the key at its end."""
    if issubclass(kind, ValuesIterable):
        return lambda row: dict(zip(names, row, strict=False))
    if issubclass(kind, FlatValuesListIterable):
        return itemgetter(0)
    if issubclass(kind, NamedValuesListIterable):
        make = namedtuple("Row", names)._make  # type: ignore # noqa: PGH003, PYI024
        return lambda row: make(row[: len(names)])
    return itemgetter(slice(len(names)))


def _without(names: Iterable[str], row: Any) -> Any:
    for name in names:
        del row.__dict__[name]
    return row


# The iterator


class Place:
    """How far one iterator has come, and those with an end that were made of it."""

    def __init__(self, position: Any) -> None:
        self.position = position


class ChunkedIterator(Generic[T]):
    """What ``chunked_iterator()`` returns. Each loop over it goes on after ``position``."""

    def __init__(
        self, queryset: QuerySet[Any, T], key: Key, chunk_size: int, position: Any
    ) -> None:
        self._alias = queryset.db
        self._rows = queryset
        self._form = Form.of(queryset.order_by(*key.ordering), key)
        self._key = key
        self._chunk_size = self._size = chunk_size
        self._place = Place(position)
        self._query: CompiledQuery | None = None
        self._query_for: tuple[Any, ...] = ()

    @property
    def position(self) -> Any:
        """The key of the row that was given out last: what ``start_after`` takes.

        One value, or a tuple where the key has several fields; None before the first row.
        """
        return self._place.position

    def __iter__(self) -> Iterator[T]:
        key_of, shape = self._form.key_of, self._form.shape
        position = self._place.position
        while True:
            before = position
            for row in self._read(position):
                # Now: the program may change the row, and delete() takes its key from it.
                self._place.position = position = key_of(row)
                yield row if shape is None else shape(row)
            if position is before:
                return

    async def __aiter__(self) -> AsyncIterator[T]:
        key_of, shape = self._form.key_of, self._form.shape
        position = self._place.position
        while rows := await sync_to_async(self._piece)(position):
            for row in rows:
                self._place.position = position = key_of(row)
                yield row if shape is None else shape(row)

    def chunks(self) -> Iterator[list[T]]:
        """Yield the rows in lists, one for each piece."""
        key_of, shape = self._form.key_of, self._form.shape
        position = self._place.position
        while rows := self._piece(position):
            self._place.position = position = key_of(rows[-1])
            yield rows if shape is None else list(map(shape, rows))

    def count(self) -> int:
        """Return how many rows come after ``position``, with one query."""
        return self._filtered(self._rows.order_by(), self._place.position).count()

    def _up_to_now(self) -> ChunkedIterator[T]:
        """Return this iterator with an end: the last key that there is now, found by one query.

        It moves the position of this one.
        """
        table: QuerySet[Any, Any] = QuerySet(self._rows.model).using(self._alias)
        keys = table.values_list(*self._key.names)
        backwards = ChunkedIterator(keys, self._key.opposite, 1, None)
        next(iter(backwards), None)
        end = backwards.position
        bounded = copy(self)
        bounded._rows = self._until(end, self._rows)
        bounded._form = self._form._replace(queryset=self._until(end, self._form.queryset))
        bounded._query = None
        return bounded

    def _piece(self, position: Any) -> list[Any]:
        """Return the rows of the piece after the position, complete: for another thread too."""
        return list(self._read(position))

    @async_unsafe(
        "You cannot loop over chunked_iterator() with `for` in an async context - use `async for`."
    )
    def _read(self, position: Any) -> Iterator[Any]:
        """Return the rows of the piece after the position, none when there are no more."""
        has_failed = False
        while True:
            connection = connections[self._alias]
            state = _session_state(connection)
            size = self._size
            try:
                rows = self._rows_after(position, size)
                first = [*islice(rows, 1)]
            except Error as error:
                if (has_failed and size == 1) or not _may_read_again(connection, error, state):
                    raise
                has_failed = True
                self._size = max(1, size // 2)
                self._report(error)
            else:
                self._size = min(self._chunk_size, size + -(-self._chunk_size // REGROWTH))
                self._refuse_repetition(first, position)
                return chain(first, rows)

    def _refuse_repetition(self, first: list[Any], position: Any) -> None:
        """Raise ValueError where the key that was read is not quite the one in the table.

        FLOAT and REAL columns are shown rounded, as SQLite's decimals of more than 15 digits are.
        The loop would never end.
        """
        if first and position is not None and self._form.key_of(first[0]) == position:
            raise ValueError(
                f"The row after {', '.join(self._key.names)} = {position!r} is that row again: the "
                "database rounds what it shows of this key. Read by another one, such as the "
                "primary key."
            )

    def _rows_after(self, position: Any, size: int) -> Iterator[Any]:
        """Return so many rows. They are all here with the first one, and no cursor is open."""
        if not self._form.is_lazy:
            return iter(list(self._filtered(self._form.queryset, position)[:size]))
        # In another thread there is another connection.
        query_for = connections[self._alias], position is None, size
        if self._query is None or self._query_for != query_for:
            rows = self._filtered(self._form.queryset, position, as_expression=Slot)[:size]
            try:
                self._query, self._query_for = CompiledQuery(rows, size), query_for
            except EmptyResultSet:
                return iter(())
        return self._query.run({} if position is None else self._key.values(position))

    def _filtered(
        self, rows: QuerySet[Any, Any], position: Any, as_expression: type[Value] = Value
    ) -> QuerySet[Any, Any]:
        """Return those of the rows that come after the position."""
        if position is None:
            return rows
        return rows.filter(
            self._key.after(
                position, row_values=self._finds_row_values, as_expression=as_expression
            )
        )

    def _until(self, end: Any, rows: QuerySet[Any, Any]) -> QuerySet[Any, Any]:
        """Return those of the rows that come up to the end, none where that is None."""
        if end is None:
            return rows.none()
        condition = self._key.opposite.after(end, row_values=self._finds_row_values, inclusive=True)
        return rows.filter(condition)

    @property
    def _finds_row_values(self) -> bool:
        vendor = vendor_named(connections[self._alias].vendor)
        return vendor is not None and vendor.finds_row_values

    def _report(self, error: Error) -> None:
        logger.info(
            "A piece of a table on %r could not be read and is read again, %d rows at a time: %s",
            self._alias,
            self._size,
            error,
            extra={"alias": self._alias},
        )


def _session_state(connection: Any) -> tuple[str, ...]:
    """Return what the loss of the connection would end, and the program must be told of."""
    watch = watch_of(connection)
    config = get_config().for_alias(connection.alias)
    if watch is None or config.on_session_state_loss != "raise":
        return ()
    return watch.session_state()


def _may_read_again(connection: Any, error: Error, state: tuple[str, ...]) -> bool:
    """Return whether the read that failed may be repeated, on a connection that can be used."""
    fault = classify(error)
    if fault is None or fault.kind not in (Kind.LOST, Kind.TIMED_OUT):
        return False
    if connection.in_atomic_block or not connection.autocommit:
        return False
    if fault.kind is Kind.TIMED_OUT:
        return True
    if state:
        return False
    if watch_of(connection) is None:  # else the guard replaces it
        close(connection)
    return True
