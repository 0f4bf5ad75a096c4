"""chunked_iterator(): which querysets it reads, in which order, and where it goes on."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections
from django.db.models import Count, Exists, F, OuterRef, Q, Window
from django.db.models.functions import RowNumber

from django_dbhealth import chunked_iterator
from tests.app.models import Book, Loan, Novel, Page

if TYPE_CHECKING:
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

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "sliced": (BOOKS[:10], {}, ValueError, "Write a filter"),
    "ordered": (BOOKS.order_by("title"), {}, ValueError, r"ordered by title.*\.order_by\(\)"),
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
    with pytest.raises(kind, match=f"(?s){message}"):
        chunked_iterator(queryset, **arguments)
    assert all(connection.connection is None for connection in connections.all())


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


@pytest.mark.parametrize("size", [1, 2, 23, 100])
@pytest.mark.parametrize("name", KEYS)
def test_keys(library: Database, name: str, size: int) -> None:
    """All rows come in the order of the key, whatever the size of the pieces."""
    model, order_by, ordering = KEYS[name]
    queryset = model.objects.using(ALIAS)
    rows = chunked_iterator(queryset.all(), chunk_size=size, order_by=order_by)
    assert list(rows) == list(queryset.order_by(*ordering))


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
