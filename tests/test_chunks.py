"""chunked_iterator(): which querysets it reads, in which order, and where it goes on."""

from __future__ import annotations

import datetime as dt
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command
from django.db import connections, models, transaction
from django.db.models import Count, Exists, F, Func, OuterRef, Prefetch, Q, Window
from django.db.models.functions import RowNumber, Upper
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from django_dbhealth import LongRunningCommand, chunked_iterator
from tests.app.models import Book, Loan, Novel, Page, Row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.conftest import Database

MODELS = (Book, Novel, Loan, Page)
ALIAS = "database"
COUNT = 23
BEGAN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def create_tables() -> None:
    connection = connections[ALIAS]
    there = connection.introspection.table_names()
    with connection.schema_editor() as editor:
        for model in MODELS:
            if model._meta.db_table not in there:
                editor.create_model(model)


def fill() -> None:
    """Save rows so that no order is that of the primary key, and many values come twice."""
    for model in reversed(MODELS):
        model.objects.using(ALIAS).all().delete()
    order = [(number * 7) % COUNT for number in range(COUNT)]
    for number in order[:3]:
        Novel.objects.using(ALIAS).create(**book(number))
    Book.objects.using(ALIAS).bulk_create(Book(**book(number)) for number in order[3:])
    first = Book.objects.using(ALIAS).order_by("code")[0]
    Book.objects.using(ALIAS).filter(shelf=1).update(sequel_of=first)
    books = list(Book.objects.using(ALIAS).order_by("code")[:5])
    Loan.objects.using(ALIAS).bulk_create(Loan(book=books[n % 5]) for n in range(COUNT))
    Page.objects.using(ALIAS).bulk_create(
        Page(volume=number % 4, number=number, text=f"text {number}") for number in order
    )


def book(number: int) -> dict[str, Any]:
    return {
        "code": f"code {number:03}",
        "place": number,
        "created": BEGAN + dt.timedelta(days=number % 5, microseconds=number % 5),
        "shelf": number % 4,
        "number": number,
        "title": f"title {number}",
    }


@pytest.fixture(scope="module")
def _filled() -> set[str]:
    """The kinds of servers whose tables are filled."""
    return set()


@pytest.fixture
def library(database: Database, _filled: set[str]) -> Database:
    """Give tables with some rows, which nobody changes."""
    if database.server.vendor not in _filled:
        create_tables()
        fill()
        connections[ALIAS].close()
        _filled.add(database.server.vendor)
    return database


# Bad input

BOOKS = Book.objects.all()


class Series(Func):
    function = "generate_series"
    set_returning = True
    output_field = models.IntegerField()


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "sliced": (BOOKS[:10], {}, ValueError, "Write a filter"),
    "ordered": (
        BOOKS.order_by("title"),
        {},
        ValueError,
        r"ordered by title\. Add \.order_by\(\) to it: the key is the order, here pk;",
    ),
    "ordered at random": (BOOKS.order_by("?"), {}, ValueError, r"Add \.order_by\(\)"),
    "ordered by an expression": (BOOKS.order_by(F("id").desc()), {}, ValueError, "ordered by"),
    "ordered the other way": (BOOKS.order_by("pk"), {"order_by": "-pk"}, ValueError, "ordered"),
    "reversed": (BOOKS.reverse(), {}, ValueError, "reverse"),
    "extra order": (BOOKS.extra(order_by=["title"]), {}, ValueError, "order_by= here"),
    "extra tables": (BOOKS.extra(tables=["app_row"]), {}, ValueError, "several rows for one key"),
    "dates": (BOOKS.datetimes("created", "day"), {}, ValueError, "ordered by"),
    "distinct on": (BOOKS.distinct("title"), {}, ValueError, "distinct.'title'"),
    "distinct values": (BOOKS.values("title").distinct(), {}, ValueError, "Leave out distinct"),
    "union": (BOOKS.union(BOOKS), {}, ValueError, "union.*one by one"),
    "intersection": (BOOKS.intersection(BOOKS), {}, ValueError, "intersection"),
    "groups": (
        BOOKS.values("shelf").annotate(Count("pk")),
        {},
        ValueError,
        r"annotate\(\) before values\(\)",
    ),
    "groups of a joined key": (
        BOOKS.values("sequel_of__code").annotate(Count("pk")),
        {"order_by": "code"},
        ValueError,
        "groups",
    ),
    "window": (BOOKS.annotate(n=Window(RowNumber())), {}, ValueError, "subquery"),
    "several rows of a function": (
        BOOKS.annotate(n=1 + Series(1, 3)),
        {},
        ValueError,
        "function gives several rows",
    ),
    "join": (BOOKS.filter(loans__isnull=False), {}, ValueError, "distinct.*pk__in"),
    "join in values": (BOOKS.values("loans__id"), {}, ValueError, "pk__in"),
    "join in distinct": (
        BOOKS.annotate(loan=F("loans__id")).distinct(),
        {},
        ValueError,
        "several rows",
    ),
    "join in groups": (
        BOOKS.annotate(loan=F("loans__id"), n=Count("sequels")),
        {},
        ValueError,
        "several rows",
    ),
    "unknown alias": (BOOKS.using("nowhere"), {}, ValueError, "'nowhere'.*'default'"),
    "manager": (Book.objects, {}, TypeError, r"Model\.objects\.all\(\)"),
    "model": (Book, {}, TypeError, "QuerySet"),
    "list": ([1, 2], {}, TypeError, "QuerySet, not list"),
    "raw": (Book.objects.raw("SELECT 1"), {}, TypeError, "not RawQuerySet"),
    "no rows": (BOOKS, {"chunk_size": 0}, ValueError, "chunk_size is 0.*at least 1"),
    "less than none": (BOOKS, {"chunk_size": -1}, ValueError, "at least 1"),
    "half a row": (BOOKS, {"chunk_size": 0.5}, TypeError, "an int, not float"),
    "bool": (BOOKS, {"chunk_size": True}, TypeError, "an int, not bool"),
    "not unique": (BOOKS, {"order_by": "title"}, ValueError, r"Write \('title', 'pk'\)"),
    "not unique together": (BOOKS, {"order_by": ("shelf", "title")}, ValueError, "not unique"),
    "half a key": (BOOKS, {"order_by": "shelf"}, ValueError, "not unique"),
    "half a composite key": (Page.objects.all(), {"order_by": "number"}, ValueError, "not unique"),
    "may be NULL": (BOOKS, {"order_by": "place"}, ValueError, "may be NULL.*null=False"),
    "a member may be NULL": (BOOKS, {"order_by": ("place", "pk")}, ValueError, "may be NULL"),
    "no field": (BOOKS, {"order_by": "titel"}, ValueError, "'titel', which is no column of Book"),
    "random": (BOOKS, {"order_by": "?"}, ValueError, "no column"),
    "another table's": (BOOKS, {"order_by": "sequel_of__code"}, ValueError, "no column"),
    "a relation": (BOOKS, {"order_by": "loans"}, ValueError, "no column"),
    "an annotation": (BOOKS.annotate(n=F("id")), {"order_by": "n"}, ValueError, "no column"),
    "an expression": (BOOKS, {"order_by": [F("id")]}, TypeError, "name of a field"),
    "one expression": (BOOKS, {"order_by": F("id")}, TypeError, "name of a field"),
    "nothing": (BOOKS, {"order_by": ()}, TypeError, "name of a field"),
    "None": (BOOKS, {"order_by": None}, TypeError, "name of a field"),
    "after a word": (BOOKS, {"start_after": "first"}, ValueError, r"no value of id.*\.position"),
    "after a row": (BOOKS, {"start_after": Book(pk=3)}, ValueError, "no value of id"),
    "after a tuple": (BOOKS, {"start_after": (3,)}, ValueError, "no value of id"),
    "after half a key": (
        Page.objects.all(),
        {"start_after": (3,)},
        ValueError,
        "one value for each of volume, number",
    ),
    "after a part": (Page.objects.all(), {"start_after": 3}, TypeError, "tuple.*volume, number"),
    "after NULL": (Page.objects.all(), {"start_after": (None, 3)}, ValueError, "one value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Before the first query, with a message that says what to write instead."""
    queryset, arguments, kind, message = REFUSED[name]
    connections.close_all()
    before = open_aliases()  # SQLite's in memory is never closed
    with pytest.raises(kind, match=f"(?s){message}"):
        chunked_iterator(queryset, **arguments)
    assert open_aliases() == before


class Measure(models.Model):
    """A table of somebody else's, whose column is less exact than Django's own would be."""

    value = models.FloatField(unique=True)

    class Meta:
        app_label = "app"
        managed = False

    def __str__(self) -> str:
        return str(self.value)


def test_key_that_is_shown_rounded(database: Database) -> None:
    """The row after 0.31 may be the same row again: that is an error, and no endless loop."""
    connection = connections[ALIAS]
    exact = [Measure(value=number / 100) for number in range(1, 100)]
    with connection.schema_editor() as editor:
        editor.create_model(Measure)
    try:
        Measure.objects.using(ALIAS).bulk_create(exact)
        everything = chunked_iterator(Measure.objects.using(ALIAS), order_by="value", chunk_size=7)
        assert [each.value for each in everything] == [each.value for each in exact]
        with connection.cursor() as cursor:
            cursor.execute(ROUND[connection.vendor])
        rounded = chunked_iterator(Measure.objects.using(ALIAS), order_by="value", chunk_size=1)
        with pytest.raises(ValueError, match=r"value = 0\.\d+ is that row again.*primary key"):
            list(islice(rounded, 200))
        rounded = chunked_iterator(Measure.objects.using(ALIAS), order_by="value", chunk_size=1)
        with pytest.raises(ValueError, match="is that row again"):
            list(islice(rounded.chunks(), 200))
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Measure)


ROUND = {
    "mysql": "ALTER TABLE app_measure MODIFY value FLOAT NOT NULL",
    "postgresql": "ALTER TABLE app_measure ALTER COLUMN value TYPE real",
}


def open_aliases() -> list[str]:
    return [each.alias for each in connections.all() if each.connection is not None]


ACCEPTED = {
    "ordered the same way": BOOKS.order_by("pk"),
    "ordered by its name": BOOKS.order_by("id"),
    "order taken back": BOOKS.order_by("title").order_by(),
    "distinct": BOOKS.filter(loans__isnull=False).distinct(),
    "groups of one": BOOKS.values("pk").annotate(Count("loans")),
    "forward join": BOOKS.filter(sequel_of__isnull=False).annotate(t=F("sequel_of__title")),
    "excluded join": BOOKS.exclude(loans__isnull=False),
    "subquery": BOOKS.filter(Exists(Loan.objects.filter(book=OuterRef("pk")))),
    "subquery by key": BOOKS.filter(pk__in=BOOKS.filter(loans__isnull=False).values("pk")),
    "aggregate": BOOKS.annotate(n=Count("loans")).filter(n__gt=2),
    "aggregate in values": BOOKS.annotate(n=Count("loans")).values("n", "title"),
    "one child": BOOKS.filter(novel__isnull=False),
    "or": BOOKS.filter(Q(shelf=1) | Q(shelf=2)),
    "none": BOOKS.none(),
    "nothing, as Django sees": BOOKS.filter(pk__in=[]),
    "all": BOOKS,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(library: Database, name: str) -> None:
    """In pieces comes exactly what the queryset yields at once."""
    queryset = ACCEPTED[name].using(ALIAS)
    expected = list(queryset.order_by("pk"))
    assert list(chunked_iterator(queryset, chunk_size=4)) == expected


def test_distinct_on_the_key(library: Database) -> None:
    if library.server.vendor != "postgresql":
        pytest.skip("only PostgreSQL has DISTINCT ON")
    queryset = Book.objects.using(ALIAS).filter(loans__isnull=False).distinct("pk")
    assert list(chunked_iterator(queryset, chunk_size=2)) == list(queryset.order_by("pk"))


# Keys

KEYS: dict[str, tuple[Any, Any, list[str]]] = {
    "pk": (Book, "pk", ["id"]),
    "pk descending": (Book, "-pk", ["-id"]),
    "its name": (Book, "id", ["id"]),
    "a unique field": (Book, "code", ["code"]),
    "a unique field descending": (Book, "-code", ["-code"]),
    "a tuple": (Book, ("created", "pk"), ["created", "id"]),
    "a list descending": (Book, ["-created", "-pk"], ["-created", "-id"]),
    "mixed": (Book, ("-created", "pk"), ["-created", "id"]),
    "mixed the other way": (Book, ("created", "-pk"), ["created", "-id"]),
    "three": (Book, ("-shelf", "created", "-code"), ["-shelf", "created", "-code"]),
    "unique together": (Book, ("shelf", "number"), ["shelf", "number"]),
    "a tuple of one": (Book, ("pk",), ["id"]),
    "uuid": (Loan, "pk", ["id"]),
    "uuid descending": (Loan, "-pk", ["-id"]),
    "composite": (Page, "pk", ["volume", "number"]),
    "composite descending": (Page, "-pk", ["-volume", "-number"]),
    "composite in a tuple": (Page, ("text", "pk"), ["text", "volume", "number"]),
    "composite mixed": (Page, ("-volume", "number"), ["-volume", "number"]),
    "child": (Novel, "pk", ["book_ptr_id"]),
    "child by the parent's": (Novel, "-code", ["-code"]),
    "child by the parent's constraint": (Novel, ("shelf", "-number"), ["shelf", "-number"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(library: Database, name: str) -> None:
    """All rows come in the order of the key, whatever the size of the pieces."""
    model, order_by, ordering = KEYS[name]
    queryset = model.objects.using(ALIAS)
    expected = list(queryset.order_by(*ordering))
    for size in (1, 2, COUNT, 100):
        rows = chunked_iterator(queryset.all(), chunk_size=size, order_by=order_by)
        assert list(rows) == expected


@pytest.mark.parametrize("name", KEYS)
def test_resumed_from_text(library: Database, name: str) -> None:
    """A position goes through JSON and back, at any row."""
    model, order_by, ordering = KEYS[name]
    queryset = model.objects.using(ALIAS)
    expected = list(queryset.order_by(*ordering))
    rows = chunked_iterator(queryset.all(), chunk_size=5, order_by=order_by)
    for number, row in enumerate(rows, start=1):
        assert row == expected[number - 1]
        kept = json.loads(json.dumps(rows.position, default=str))
        if number % 4 == 1:
            left = chunked_iterator(queryset.all(), order_by=order_by, start_after=kept)
            assert list(left) == expected[number:]
            left = chunked_iterator(queryset.all(), order_by=order_by, start_after=rows.position)
            assert left.position == rows.position
            assert left.count() == len(expected) - number


CONDITIONS = {
    "mysql": {
        "pk": "(volume >= 1 AND (volume > 1 OR (volume = 1 AND number > 3)))",
        "-pk": "(volume <= 1 AND (volume < 1 OR (volume = 1 AND number < 3)))",
        ("volume", "-number"): "(volume >= 1 AND (volume > 1 OR (volume = 1 AND number < 3)))",
    },
    "postgresql": {
        "pk": "(volume, number) > (1, 3)",
        "-pk": "(volume, number) < (1, 3)",
        ("volume", "-number"): "(volume >= 1 AND (volume > 1 OR (volume = 1 AND number < 3)))",
    },
}


@pytest.mark.parametrize("order_by", CONDITIONS["mysql"], ids=str)
def test_condition_is_one_that_an_index_serves(library: Database, order_by: Any) -> None:
    """EXPLAIN showed with which one the database enters the index at the right place."""
    rows = chunked_iterator(Page.objects.using(ALIAS), order_by=order_by, start_after=(1, 3))
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        list(rows)
    sql = re.sub(r"[`\"]|app_page.\.", "", queries[0]["sql"])
    assert CONDITIONS[library.server.vendor][order_by] in sql


def test_server_side_binding(library: Database, add_database: Callable[..., str]) -> None:
    """Every value's type is known to PostgreSQL without psycopg writing it into the text."""
    if library.server.vendor != "postgresql":
        pytest.skip("an option of psycopg")
    settings = connections.settings[ALIAS]
    alias = add_database({**settings, "OPTIONS": {"server_side_binding": True}})
    for name, (model, order_by, ordering) in KEYS.items():
        rows = chunked_iterator(model.objects.using(alias), order_by=order_by, chunk_size=5)
        assert list(rows) == list(model.objects.using(alias).order_by(*ordering)), name


# What comes of a row


def forms(queryset: Any) -> dict[str, Any]:
    """Return the queryset in every form that rows can have, without the key and with it."""
    return {
        "instances": queryset,
        "only": queryset.only("title"),
        "defer": queryset.defer("code", "created"),
        "annotated": queryset.annotate(big=Upper("title")),
        "values": queryset.values("title"),
        "values with the key": queryset.values("code", "title", "id"),
        "all values": queryset.values(),
        "values of a relation": queryset.values("sequel_of__title", "title"),
        "values of an expression": queryset.values(big=Upper("title")),
        "extra": queryset.extra(select={"one": "1"}).values("one", "title"),
        "values_list": queryset.values_list("title", "shelf"),
        "values_list with the key": queryset.values_list("title", "code", "id", "created"),
        "whole values_list": queryset.values_list(),
        "flat": queryset.values_list("title", flat=True),
        "flat key": queryset.values_list("code", flat=True),
        "flat pk": queryset.values_list("pk", flat=True),
        "named": queryset.values_list("title", "shelf", named=True),
        "named with the key": queryset.values_list("title", "code", "id", named=True),
        "whole named": queryset.values_list(named=True),
        "named expression": queryset.values_list("title", Upper("title"), named=True),
    }


@pytest.mark.parametrize("name", forms(BOOKS))
def test_forms(library: Database, name: str) -> None:
    """A row comes as the queryset gives it, and nothing of the key is left on it."""
    queryset = forms(Book.objects.using(ALIAS))[name]
    for order_by in (["pk"], ["-code"], ["created", "-pk"]):
        expected = list(queryset.order_by(*order_by))
        rows = list(chunked_iterator(queryset, order_by=order_by, chunk_size=4))
        assert list(map(contents, rows)) == list(map(contents, expected))
        lists = list(chunked_iterator(queryset, order_by=order_by, chunk_size=4).chunks())
        assert [contents(row) for rows in lists for row in rows] == list(map(contents, expected))
        assert [len(rows) for rows in lists] == [4, 4, 4, 4, 4, 3]


def contents(row: Any) -> Any:
    """Return what can be compared: all that is in an instance, the names in a tuple."""
    if isinstance(row, Book):
        return {name: value for name, value in vars(row).items() if name != "_state"}
    return type(row).__name__, repr(row)


def test_deferred_key_costs_no_query(library: Database) -> None:
    rows = chunked_iterator(Book.objects.using(ALIAS).only("title"), order_by="code", chunk_size=9)
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        assert len(list(rows)) == COUNT
    assert len(queries) == 4  # the last one finds no more rows


def test_related_objects_are_read_for_each_piece(library: Database) -> None:
    """prefetch_related() and select_related() work, and cost what they cost for a queryset."""
    queryset = (
        Book.objects.using(ALIAS)
        .select_related("sequel_of")
        .prefetch_related("loans", Prefetch("sequels", to_attr="next_ones"))
    )
    expected = {book.pk: (book.sequel_of, [*book.loans.all()], book.next_ones) for book in queryset}
    seen = {}
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        for book in chunked_iterator(queryset, chunk_size=8):
            seen[book.pk] = (book.sequel_of, [*book.loans.all()], book.next_ones)
    assert seen == expected
    assert len(queries) == 3 * 3 + 1


def test_no_more_than_a_piece_is_read(library: Database) -> None:
    """The queries are made when their rows are needed."""
    rows = chunked_iterator(Book.objects.using(ALIAS), chunk_size=3)
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        assert len(queries) == 0
        for number, _ in enumerate(rows, start=1):
            assert len(queries) == -(-number // 3)


# Where it stands


def test_position_is_that_of_the_row_given_out(library: Database) -> None:
    rows = chunked_iterator(Book.objects.using(ALIAS), chunk_size=4)
    assert rows.position is None
    for book in rows:
        assert rows.position == book.pk
    assert rows.position == book.pk


def test_position_outlives_the_rows_own_key(database: Database) -> None:
    """A row that is copied or deleted in the loop loses its key, and the loop goes on."""
    Row.objects.using(ALIAS).bulk_create(Row(name=str(number)) for number in range(7))
    rows = chunked_iterator(Row.objects.using(ALIAS), chunk_size=3)
    seen = []
    for row in rows:
        key = row.pk
        row.delete()
        assert row.pk is None
        assert rows.position == key
        seen.append(row.name)
    assert seen == [*"0123456"]


def test_loop_goes_on_where_the_last_one_ended(library: Database) -> None:
    """After break, after chunks(), and after an end that is none any more."""
    queryset = Page.objects.using(ALIAS)
    expected = list(queryset.order_by("volume", "number"))
    rows = chunked_iterator(queryset.all(), chunk_size=5)
    seen = []
    for page in rows:
        seen.append(page)
        if len(seen) == 7:
            break
    assert rows.count() == COUNT - 7
    seen += next(iter(rows.chunks()))
    assert rows.position == (seen[-1].volume, seen[-1].number)
    seen += rows
    assert seen == expected
    assert list(rows) == []
    assert rows.count() == 0


def test_two_loops_at_once(library: Database) -> None:
    """Each has its own place; the position is that of the last row given out by either."""
    rows = chunked_iterator(Book.objects.using(ALIAS), chunk_size=2)
    first, second = iter(rows), rows.chunks()
    seen = [next(first).pk]
    lists = []
    for chunk in second:
        lists += [book.pk for book in chunk]
        seen += [book.pk for _, book in zip(range(1), first, strict=False)]
    seen += [book.pk for book in first]
    keys = list(Book.objects.using(ALIAS).order_by("pk").values_list("pk", flat=True))
    assert seen == keys
    assert lists == keys[1:]


def test_loop_goes_on_in_another_thread(library: Database) -> None:
    """As one does whose pieces are read by asyncio.to_thread(): the connection is the thread's."""
    keys = iter(chunked_iterator(Book.objects.using(ALIAS), chunk_size=3))
    seen = [next(keys).pk for _ in range(7)]
    with ThreadPoolExecutor(1) as pool:
        seen += pool.submit(lambda: [book.pk for book in keys]).result()
    assert seen == list(Book.objects.using(ALIAS).order_by("pk").values_list("pk", flat=True))


class Fickle:
    """A router that names another alias each time."""

    def __init__(self) -> None:
        self.asked = 0

    def db_for_read(self, model: Any, **hints: Any) -> str:
        self.asked += 1
        return ALIAS if self.asked == 1 else "default"


def test_alias_is_pinned(library: Database) -> None:
    """A router is asked once: another replica may be behind the first one."""
    router = Fickle()
    expected = list(Book.objects.using(ALIAS).order_by("pk"))
    with override_settings(DATABASE_ROUTERS=[router]):
        rows = chunked_iterator(Book.objects.all(), chunk_size=4)
        assert list(rows) == expected
        assert rows.count() == 0
    assert router.asked == 1
    assert connections["default"].connection is None


def test_works_in_a_transaction(library: Database) -> None:
    with transaction.atomic(using=ALIAS):
        rows = Book.objects.using(ALIAS).select_for_update()
        assert len(list(chunked_iterator(rows, chunk_size=10))) == COUNT


# In async code


async def collected(rows: Any) -> list[Any]:
    return [row async for row in rows]


@pytest.mark.parametrize("name", forms(BOOKS))
def test_async_forms(library: Database, name: str) -> None:
    """`async for` gives what `for` gives."""
    queryset = forms(Book.objects.using(ALIAS))[name]
    for order_by in (["pk"], ["created", "-pk"]):
        expected = chunked_iterator(queryset, order_by=order_by)
        rows = chunked_iterator(queryset, order_by=order_by, chunk_size=4)
        seen = async_to_sync(collected)(rows)
        assert list(map(contents, seen)) == list(map(contents, expected))


def test_async_rows_are_whole(library: Database) -> None:
    """Nothing is left to be read in the event loop, and a piece is read when it is needed."""
    books = Book.objects.using(ALIAS).select_related("sequel_of").prefetch_related("loans")
    expected = {book.pk: (book.sequel_of, [*book.loans.all()]) for book in books}
    seen = {}
    made = []

    async def read() -> None:
        async for book in chunked_iterator(books, chunk_size=8):
            seen[book.pk] = (book.sequel_of, [*book.loans.all()])
            made.append(len(queries))

    with CaptureQueriesContext(connections[ALIAS]) as queries:
        async_to_sync(read)()
    assert seen == expected
    assert made == [2] * 8 + [4] * 8 + [6] * 7


def test_async_position(library: Database) -> None:
    """It is that of the row given out; a loop goes on where the last one ended, async or not."""
    rows = chunked_iterator(Page.objects.using(ALIAS), chunk_size=5)
    seen = []

    async def read() -> None:
        async for page in rows:
            seen.append(page)
            assert rows.position == (page.volume, page.number)
            if len(seen) % 7 == 0:
                return

    async_to_sync(read)()
    assert rows.count() == COUNT - 7
    seen += next(iter(rows.chunks()))
    async_to_sync(read)()
    assert len(seen) == 14
    async_to_sync(read)()
    seen += rows
    assert seen == list(Page.objects.using(ALIAS).order_by("volume", "number"))


def test_plain_loop_in_async_code_is_refused(library: Database) -> None:
    """The error says what to write."""
    rows = chunked_iterator(Book.objects.using(ALIAS))

    async def read() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="use `async for`"):
            next(iter(rows))
        with pytest.raises(SynchronousOnlyOperation, match="use `async for`"):
            next(rows.chunks())

    async_to_sync(read)()


# In a command


class Counting(LongRunningCommand):
    def __init__(self, iterable: Any, total: int | None = None) -> None:
        super().__init__()
        self.arguments = (iterable, "books", total)
        self.seen: list[Any] = []
        self.totals: list[Any] = []

    def handle(self, *args: Any, **options: Any) -> None:
        for each in self.track(*self.arguments):
            self.seen.append(each)


class CountingAsync(Counting):
    async def handle(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        async for each in self.track(*self.arguments):
            self.seen.append(each)


both = pytest.mark.parametrize("kind", [Counting, CountingAsync])


def tracked(
    kind: type[Counting], iterable: Any, total: int | None = None
) -> tuple[list[Any], str, int]:
    """Return the items that came, the last line that was shown, and the number of queries."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    command = kind(iterable, total)
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        call_command(command, no_progress=True, stdout=terminal)
    line = re.sub(r", \S+ a second$", "", terminal.getvalue().splitlines()[-1])
    return command.seen, line, len(queries)


@both
def test_track_reads_in_pieces(
    library: Database, monkeypatch: pytest.MonkeyPatch, kind: type[Counting]
) -> None:
    """The last key and the total are known, from one more query each."""
    monkeypatch.setattr("django_dbhealth.management.tracking.chunked_iterator", small_pieces)
    books = list(Book.objects.using(ALIAS).order_by("pk"))
    queryset = Book.objects.using(ALIAS)
    assert tracked(kind, queryset) == (books, "books: 23 of 23 (100%)", 2 + 4)
    assert tracked(kind, queryset, total=46)[1:] == ("books: 23 of 46 (50%)", 1 + 4)


def small_pieces(queryset: Any) -> Any:
    return chunked_iterator(queryset, chunk_size=10)


@both
def test_track_a_chunked_iterator(library: Database, kind: type[Counting]) -> None:
    """It counts what is left of it."""
    keys = list(Book.objects.using(ALIAS).order_by("pk").values_list("pk", flat=True))
    rows = chunked_iterator(Book.objects.using(ALIAS), start_after=keys[2], chunk_size=10)
    seen, line, queries = tracked(kind, rows)
    assert [book.pk for book in seen] == keys[3:]
    assert (line, queries) == ("books: 20 of 20 (100%)", 2 + 3)
    assert rows.position == keys[-1]


BEYOND: dict[Any, Callable[[Page], dict[str, int]]] = {
    "pk": lambda page: {"volume": 3, "number": 100 + page.number},
    "-pk": lambda page: {"volume": 0, "number": -1 - page.number},
    ("volume", "-number"): lambda page: {"volume": 3, "number": -1 - page.number},
    ("text", "pk"): lambda page: {"volume": 100 + page.number, "number": 1},
}


@contextmanager
def growing(order_by: Any) -> Iterator[Callable[[Page], None]]:
    """Give what adds a page beyond the last one. In the end they are gone again."""
    add = BEYOND[order_by]

    def extend(page: Page) -> None:
        Page.objects.using(ALIAS).create(**add(page), text="text 9")

    with transaction.atomic(using=ALIAS):
        yield extend
        transaction.set_rollback(True, using=ALIAS)


class Extending(Counting):
    def __init__(self, iterable: Any, extend: Callable[[Page], None]) -> None:
        super().__init__(iterable)
        self.extend = extend

    def handle(self, *args: Any, **options: Any) -> None:
        for page in islice(self.track(*self.arguments), 3 * COUNT):
            self.seen.append(page)
            self.extend(page)


class ExtendingAsync(Extending):
    async def handle(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        async for page in self.track(*self.arguments):
            self.seen.append(page)
            await sync_to_async(self.extend)(page)
            if len(self.seen) == 3 * COUNT:
                return


@pytest.mark.parametrize("kind", [Extending, ExtendingAsync])
@pytest.mark.parametrize("order_by", BEYOND, ids=str)
def test_track_ends_at_the_last_key_of_its_beginning(
    library: Database, kind: type[Extending], order_by: Any
) -> None:
    """A loop that adds rows to its own table ends, and every row that was there comes once."""
    ordering = KEYS_OF_PAGES[order_by]
    with growing(order_by) as extend:
        pages = list(Page.objects.using(ALIAS).order_by(*ordering))
        rows = chunked_iterator(Page.objects.using(ALIAS), order_by=order_by, chunk_size=5)
        seen = list(islice(rows, 7))
        command = kind(rows, extend)
        call_command(command)
        assert seen + command.seen == pages
        # The end was track()'s. The iterator itself has none.
        assert rows.count() == COUNT - 7
        assert list(rows) == list(Page.objects.using(ALIAS).order_by(*ordering))[COUNT:]


KEYS_OF_PAGES = {
    "pk": ["volume", "number"],
    "-pk": ["-volume", "-number"],
    ("volume", "-number"): ["volume", "-number"],
    ("text", "pk"): ["text", "volume", "number"],
}


@both
def test_track_of_a_queryset_ends_at_the_last_key(library: Database, kind: type[Counting]) -> None:
    """Whatever another program adds meanwhile: the pieces and the total end at the same key."""
    with transaction.atomic(using=ALIAS):
        books = list(Book.objects.using(ALIAS).order_by("pk"))
        with CaptureQueriesContext(connections[ALIAS]) as queries:
            assert tracked(kind, Book.objects.using(ALIAS))[0] == books
    last, *rest = [each["sql"] for each in queries]
    assert re.search(r"DESC LIMIT 1\b", last)
    end = rf"id.? <= \(?{books[-1].pk}\b"
    assert [sql for sql in rest if not re.search(end, sql)] == []


END_CONDITIONS = {
    "mysql": "volume <= 3 AND (volume < 3 OR (volume = 3 AND number <= 19))",
    "postgresql": "(volume, number) <= (3, 19)",
}


def test_end_is_one_that_an_index_serves(library: Database) -> None:
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        assert tracked(Counting, Page.objects.using(ALIAS))[0]
    pieces = [re.sub(r"[`\"]|app_page.\.", "", each["sql"]) for each in queries[1:]]
    assert all(END_CONDITIONS[library.server.vendor] in sql for sql in pieces)


def test_nothing_comes_of_a_table_that_was_empty(database: Database) -> None:
    rows = chunked_iterator(Row.objects.using(ALIAS))._up_to_now()
    Row.objects.using(ALIAS).create(name="later")
    assert (list(rows), rows.count()) == ([], 0)


@both
@pytest.mark.parametrize(
    "change",
    [
        lambda books: books.order_by("-title"),
        lambda books: books.order_by("title")[2:9],
        lambda books: books.filter(shelf=1).union(books.filter(shelf=2)),
        lambda books: books.values("shelf").distinct(),
        lambda books: books.filter(loans__isnull=False),
        lambda books: books.values("shelf").annotate(n=Count("pk")).order_by("shelf"),
    ],
)
def test_track_of_others(library: Database, kind: type[Counting], change: Any) -> None:
    """What chunked_iterator() refuses is read as ever, with one query."""
    queryset = change(Book.objects.using(ALIAS))
    expected = list(queryset)
    seen, line, queries = tracked(kind, queryset.all())
    assert sorted(map(str, seen)) == sorted(map(str, expected))
    assert line == f"books: {len(expected)} of {len(expected)} (100%)"
    assert queries == 1


@both
def test_track_of_rows_that_are_here(library: Database, kind: type[Counting]) -> None:
    """A queryset that was read is not read again."""
    books = Book.objects.using(ALIAS).filter(shelf=2)
    expected = list(books)
    seen, _, queries = tracked(kind, books)
    assert all(one is other for one, other in zip(seen, expected, strict=True))
    assert queries == 0


def test_track_an_async_iterable(library: Database) -> None:
    assert tracked(CountingAsync, letters()) == ([*"abc"], "books: 3", 0)
    assert tracked(CountingAsync, letters(), total=6) == ([*"abc"], "books: 3 of 6 (50%)", 0)


async def letters() -> AsyncIterator[str]:
    for letter in "abc":
        yield letter


class PlainInAsync(Counting):
    async def handle(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        self.seen = list(self.track(*self.arguments))


def test_track_says_how_to_loop(library: Database) -> None:
    """A list is looped over with `for`; what is read from the database, in async code, not."""
    assert tracked(PlainInAsync, [1, 2])[0] == [1, 2]
    books = Book.objects.using(ALIAS)
    for rows in (books, books.order_by("title")[:3], chunked_iterator(books)):
        with pytest.raises(SynchronousOnlyOperation, match=r"track\(\).*use `async for`"):
            tracked(PlainInAsync, rows)
    with pytest.raises(TypeError, match="over list with `async for`: write `for`"):
        tracked(CountingAsync, [1, 2])
    with pytest.raises(TypeError, match="over async_generator with `for`: write `async for`"):
        tracked(Counting, letters())
