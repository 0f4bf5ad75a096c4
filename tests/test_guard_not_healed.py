"""What a use of the database meets after a loss that cannot be healed: its table, cell by cell.

The error is plain Django's, and each cell is looked at from a second connection: nothing is half
done.
"""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
from django.db import Error, transaction

from tests.app.models import Row
from tests.outcomes import (
    INSERT,
    MARIADB,
    POSTGRESQL,
    Batches,
    Case,
    Cell,
    Services,
    Steps,
    Uses,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

not_healed = Uses()


# Not healed: what has run in a transaction is lost with it


@not_healed()
def between_two_statements(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        case.add("one")
        yield
        case.add("two")


@not_healed()
def between_two_statements_of_a_held_cursor(case: Case) -> Steps:
    with case.atomic(), case.connection.cursor() as cursor:
        case.on_commit()
        cursor.execute(INSERT, ["one"])
        yield
        cursor.execute(INSERT, ["two"])


@not_healed()
def between_two_statements_nested(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        case.add("outer")
        with case.atomic():
            yield
            case.add("inner")


@not_healed()
def between_two_inner_blocks(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        with case.atomic():
            case.add("one")
        yield
        with case.atomic():
            case.add("two")


@not_healed()
def after_an_explicit_savepoint(case: Case) -> Steps:
    """Going back to it undoes what has run since, so it must not be missing."""
    with case.atomic():
        case.on_commit()
        case.add("one")
        savepoint = case.connection.savepoint()
        yield
        case.connection.savepoint_rollback(savepoint)
        case.add("two")


@not_healed()
def before_commit(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        case.add("one")
        yield


@not_healed()
def before_release_savepoint(case: Case) -> Steps:
    with case.atomic():
        case.on_commit()
        with case.atomic():
            case.add("one")
            yield


# Not healed, and never ended quietly: the outer block has caught the inner error


@not_healed("save", work=Case.add)
@not_healed(
    "raw", work=lambda case, name: case.execute(f"INSERT INTO app_row VALUES (1, {name!r}, 0)")
)
@not_healed("query", work=lambda case, name: list(case.objects.all()))
def caught_in_the_outer_block(case: Case, work: Callable[[Case, str], Any]) -> Steps:
    with case.atomic():
        case.on_commit()
        case.add("outer")
        yield
        with suppress(Error):
            work(case, "inner")


@not_healed("before-savepoint", loss_inside=False)
@not_healed("before-savepoint-going-on", loss_inside=False, going_on=True)
@not_healed("after-savepoint", loss_inside=True)
@not_healed("after-savepoint-going-on", loss_inside=True, going_on=True)
@not_healed("without-savepoint", loss_inside=True, savepoint=False)
@not_healed("without-savepoint-going-on", loss_inside=True, going_on=True, savepoint=False)
def inner_loss_caught(
    case: Case, loss_inside: bool, going_on: bool = False, **options: Any
) -> Steps:
    with case.atomic():
        case.on_commit()
        case.add("outer")
        if not loss_inside:
            yield
        with suppress(Error), case.atomic(**options):
            if loss_inside:
                yield
            case.add("inner")
        if going_on:
            case.add("after")


@not_healed()
def inner_loss_caught_before_commit(case: Case) -> Steps:
    """The inner block's last word, RELEASE SAVEPOINT, has failed."""
    with case.atomic():
        case.on_commit()
        with suppress(Error), case.atomic():
            case.add("inner")
            yield


# Not healed: session state, which the error names


@not_healed(words="not committed")
def autocommit_off(case: Case) -> Steps:
    transaction.set_autocommit(False, using=case.alias)
    case.add("one")
    yield
    try:
        case.add("two")
    finally:
        case.connection.close()  # as with plain Django: whoever switches it off sees to the rest


STATE: dict[str, dict[str, tuple[str, str]]] = {
    "mysql": {
        "raw-begin": ("BEGIN", "transaction begun by raw SQL"),
        "temporary-table": ("CREATE TEMPORARY TABLE shelf (id int)", "temporary table shelf"),
        "user-variable": ("SET @shelf = 1", "user variable @shelf"),
        "set-session": ("SET SESSION lock_wait_timeout = 77", "SET lock_wait_timeout"),
        "set-local": ("SET LOCAL lock_wait_timeout = 77", "SET lock_wait_timeout"),
        "get-lock": ("SELECT GET_LOCK('shelf', 0)", "lock by GET_LOCK"),
        "lock-tables": ("LOCK TABLES app_row WRITE", "LOCK TABLES"),
        "prepare": ("PREPARE shelf FROM 'SELECT 1'", "prepared statement shelf"),
        "set-role": ("SET ROLE clerk", "SET ROLE"),
    },
    "postgresql": {
        "raw-begin": ("BEGIN", "transaction begun by raw SQL"),
        "temporary-table": ("CREATE TEMPORARY TABLE shelf (id int)", "temporary table shelf"),
        "user-variable": ("SELECT set_config('my.shelf', '1', false)", "SET my.shelf"),
        "set-session": ("SET SESSION lock_timeout = 77", "SET lock_timeout"),
        "advisory-lock": ("SELECT pg_advisory_lock(77)", "advisory lock"),
        "listen": ("LISTEN shelf", "LISTEN shelf"),
        "prepare": ("PREPARE shelf AS SELECT 1", "prepared statement shelf"),
        "set-role": ("SET ROLE clerk", "SET ROLE"),
    },
}


def session_state(case: Case, sql: str) -> Steps:
    case.execute(sql)
    if sql == "BEGIN":
        case.add("lost with the transaction")
    yield
    case.add("never sent")


def session_state_held_cursor(case: Case, sql: str) -> Steps:
    with case.connection.cursor() as cursor:
        cursor.execute(sql)
        yield
        cursor.execute(INSERT, ["never sent"])


def session_state_atomic(case: Case, sql: str) -> Steps:
    case.execute(sql)
    yield
    with case.atomic():
        case.on_commit()
        case.add("never sent")


for vendor, configurations in (("mysql", MARIADB), ("postgresql", (POSTGRESQL,))):
    for variant, (sql, words) in STATE[vendor].items():
        details = {"configurations": configurations, "sql": sql, "words": words}
        not_healed(variant, **details)(session_state)
        if variant in ("temporary-table", "set-session"):
            not_healed(variant, **details)(session_state_held_cursor)
            not_healed(variant, **details)(session_state_atomic)


# Not healed: rows that are still with the server


@not_healed(configurations=(POSTGRESQL,))
def server_side_iterator(case: Case) -> Steps:
    case.kept = list("abcde")
    case.objects.bulk_create([Row(name=name) for name in case.kept])
    rows = case.objects.order_by("id").iterator(chunk_size=2)
    assert next(rows).name == "a"
    yield
    list(rows)


@not_healed(configurations=(POSTGRESQL,), words="server-side cursor")
def save_inside_a_server_side_iterator(case: Case) -> Steps:
    case.kept = list("abcde")
    case.objects.bulk_create([Row(name=name) for name in case.kept])
    rows = case.objects.order_by("id").iterator(chunk_size=2)
    first = next(rows)
    yield
    with closing(rows):
        first.name = "lost"
        first.save()


# The tests


@pytest.fixture(scope="module")
def batches(request: pytest.FixtureRequest) -> Iterator[Batches]:
    """Give the cells of this module, in batches."""
    with (
        closing(Services()) as services,
        closing(Batches(services, request.session.items)) as batches,
    ):
        yield batches


@pytest.fixture(autouse=True)
def _closed_connections() -> None:
    """Leave the connections open between the tests of a batch."""


@pytest.fixture
def case(request: pytest.FixtureRequest, batches: Batches, cell: Cell) -> Iterator[Case]:
    """Give the cell's case: its connection is lost."""
    case = batches.case(request.node)
    yield case
    batches.close_case(request.node)


# What plain Django says of a lost connection, by the driver's own words.
LOSS = (
    r"\((2006|2013), |\(0, ''\)"
    r"|terminating connection|the connection is (closed|lost)|server closed the connection"
)


@pytest.mark.parametrize("cell", not_healed.cells(), ids=str)
def test_not_healed(cell: Cell, case: Case) -> None:
    """The error of plain Django comes, once, and says what is lost; nothing is half done."""
    with pytest.raises(Error, match=LOSS) as caught:
        case.go_on()
    assert cell.use.words in "\n".join(getattr(caught.value, "__notes__", []))
    assert case.rows() == case.kept
    case.add("next")
    with case.atomic():
        case.add("next but one")
    assert case.rows() == [*case.kept, "next", "next but one"]
    assert case.callbacks == 0
    assert case.connects == 1
