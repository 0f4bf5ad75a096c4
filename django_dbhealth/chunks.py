"""Large results in short pieces: between two of them there is no cursor and no transaction.

Keyset pagination: each piece begins after the last key of the one before, so that rows which come
and go meanwhile shift nothing.
"""

from __future__ import annotations

import logging
from collections import namedtuple
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from django.db import Error, connections
from django.db.models import F, QuerySet
from django.db.models.query import (
    FlatValuesListIterable,
    NamedValuesListIterable,
    ValuesIterable,
    ValuesListIterable,
)

from .closing import close
from .conf import get_config
from .diagnosis import classify
from .faults import Kind
from .keyset import Key
from .vendors import vendor_named
from .watch import watch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

logger = logging.getLogger("django_dbhealth.chunks")

CHUNK_SIZE = 2000  # rows; that of QuerySet.iterator()
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
    return ChunkedIterator(queryset, key, chunk_size, key.parse(start_after))


# Which querysets


def _check(queryset: QuerySet[Any, Any], key: Key) -> None:
    """Raise ValueError for one whose rows are not one for each key, in the order of the key."""
    problem = _problem_of_order(queryset.query, key) or _problem_of_rows(queryset, key)
    if problem:
        raise ValueError(f"chunked_iterator() cannot read this queryset: {problem}")
    if queryset.db not in connections:
        raise ValueError(
            f"There is no database {queryset.db!r}. Write using() with one of "
            f"{', '.join(map(repr, connections))}."
        )


def _problem_of_order(query: Any, key: Key) -> str | None:
    if query.combinator:
        return f"it is a {query.combinator}(). Read its parts one by one, or filter with Q objects."
    if query.is_sliced:
        return "it is sliced. Write a filter() for the range, or leave the loop with break."
    if query.extra_order_by or not query.standard_ordering:
        return "it is ordered by extra() or reverse(). Add .order_by(), and order_by= here."
    if query.order_by not in ((), key.given, tuple(key.ordering)):
        return (
            f"it is ordered by {', '.join(map(str, query.order_by))}. Add .order_by() to it, and "
            "write chunked_iterator(..., order_by=...) with a unique key."
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
    shown = {getattr(part, "alias", None) for each in selected for part in each.flatten()}
    return not (query.distinct or query.group_by) or not shown.isdisjoint(aliases)


def _multiplies(join: Any) -> bool:
    relation: Any = getattr(join, "join_field", None)
    return getattr(relation, "multiple", False) and not relation.field.unique


# What is read: the rows in the form that the queryset has, and the key of each


class Form(NamedTuple):
    """How a row's key is read, and how it is taken out again where nobody asked for it."""

    queryset: QuerySet[Any, Any]
    key_of: Callable[[Any], Any]
    strip: Callable[[list[Any]], list[Any]] | None = None

    @classmethod
    def of(cls, queryset: QuerySet[Any, Any], key: Key) -> Form:
        columns = _columns(queryset)
        if columns is None and not _may_be_deferred(queryset, key):
            return cls(queryset, attrgetter(*key.names))
        hidden = [f"_dbhealth_key_{number}" for number in range(len(key.fields))]
        with_key = queryset.annotate(**dict(zip(hidden, map(F, key.names), strict=True)))
        kind = queryset._iterable_class
        if columns is None:
            return cls(with_key, attrgetter(*hidden), _without_attributes(hidden))
        if issubclass(kind, ValuesIterable):
            return cls(with_key, itemgetter(*hidden), _without_items(hidden))
        with_key._iterable_class = ValuesListIterable
        count = len(hidden)
        key_of = itemgetter(*range(-count, 0))
        if issubclass(kind, FlatValuesListIterable):
            return cls(with_key, key_of, lambda rows: [row[0] for row in rows])
        if issubclass(kind, NamedValuesListIterable):
            make = _named_tuple(queryset)._make
            return cls(with_key, key_of, lambda rows: [make(row[:-count]) for row in rows])
        return cls(with_key, key_of, lambda rows: [row[:-count] for row in rows])


def _may_be_deferred(queryset: QuerySet[Any, Any], key: Key) -> bool:
    names, _ = queryset.query.deferred_loading
    return bool(names) and not all(field.primary_key for field in key.fields)


def _without_attributes(names: list[str]) -> Callable[[list[Any]], list[Any]]:
    def strip(rows: list[Any]) -> list[Any]:
        for row in rows:
            for name in names:
                del row.__dict__[name]
        return rows

    return strip


def _without_items(names: list[str]) -> Callable[[list[Any]], list[Any]]:
    def strip(rows: list[Any]) -> list[Any]:
        for row in rows:
            for name in names:
                del row[name]
        return rows

    return strip


def _named_tuple(queryset: Any) -> Any:
    """Return the class that ``values_list(named=True)`` makes its rows of."""
    query = queryset.query
    names = [*query.extra_select, *query.values_select, *query.annotation_select]
    return namedtuple("Row", queryset._fields or names)  # noqa: PYI024 (the names are data)


# The iterator


class ChunkedIterator(Generic[T]):
    """What ``chunked_iterator()`` returns. Each loop over it goes on after ``position``."""

    def __init__(
        self, queryset: QuerySet[Any, T], key: Key, chunk_size: int, position: Any
    ) -> None:
        self._alias = queryset.db  # pinned: a router might name another replica for each piece
        self._rows = queryset.using(self._alias)
        self._form = Form.of(self._rows.order_by(*key.ordering), key)
        self._key = key
        self._chunk_size = self._size = chunk_size
        self._position = position

    @property
    def position(self) -> Any:
        """The key of the row that was given out last: what ``start_after`` takes.

        One value, or a tuple where the key has several fields; None before the first row.
        """
        return self._position

    def __iter__(self) -> Iterator[T]:
        for keys, rows in self._pieces():
            for self._position, row in zip(keys, rows, strict=True):
                yield row

    def chunks(self) -> Iterator[list[T]]:
        """Yield the rows in lists, one for each piece."""
        for keys, rows in self._pieces():
            self._position = keys[-1]
            yield rows

    def count(self) -> int:
        """Return how many rows come after ``position``, with one query."""
        return self._after(self._rows.order_by(), self._position).count()

    def _pieces(self) -> Iterator[tuple[list[Any], list[T]]]:
        """Yield the keys and the rows of each piece."""
        position, more = self._position, True
        while more:
            rows, more = self._read(position)
            keys = list(map(self._form.key_of, rows))
            if self._form.strip is not None:
                rows = self._form.strip(rows)
            if rows:
                yield keys, rows
                position = keys[-1]
            del keys, rows  # not two pieces in memory at once

    def _read(self, position: Any) -> tuple[list[Any], bool]:
        """Return the piece after the position, and whether there may be another one after it."""
        has_failed = False
        while True:
            connection = connections[self._alias]
            state = _session_state(connection)
            size = self._size
            try:
                rows = list(self._after(self._form.queryset, position)[:size])
            except Error as error:
                if (has_failed and size == 1) or not _may_read_again(connection, error, state):
                    raise
                has_failed = True
                self._size = max(1, size // 2)
                self._report(error)
            else:
                self._size = min(self._chunk_size, size + -(-self._chunk_size // REGROWTH))
                return rows, len(rows) == size

    def _after(self, queryset: QuerySet[Any, Any], position: Any) -> QuerySet[Any, Any]:
        if position is None:
            return queryset
        vendor = vendor_named(connections[self._alias].vendor)
        row_values = vendor is not None and vendor.finds_row_values
        return queryset.filter(self._key.after(position, row_values=row_values))

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
    if connection.connection is None:  # refused, and for as long as CONNECT_RETRY_TIMEOUT says
        return False
    if fault.kind is Kind.TIMED_OUT:
        return True
    if state:
        return False
    if watch_of(connection) is None:  # else the guard replaces it
        close(connection)
    return True
