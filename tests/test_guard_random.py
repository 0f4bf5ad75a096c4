"""Random programs against a model: what may go wrong when connections are lost at any point.

A program is a list of operations, by name, on one real connection: statements, blocks, callbacks,
session state, boundaries, and losses, which an administrator's connection brings about with KILL.
An operation that has no meaning where it stands (to leave a block outside of any) does nothing,
so every list is a program, and every shorter one too: Hypothesis shrinks by leaving out.

`Model` is the specification. It knows no Django. Before every operation it says whether that
will be well, an error, or that either is right; after it, it is told which came. Every SELECT must
see the model's rows. In the end the table, read by the administrator, must hold exactly those, and
the callbacks that ran must be the model's.

A run has 100 programs for each database and each test; more, when the guard is changed:

    scripts/test tests/test_guard_random.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import sleep
from typing import TYPE_CHECKING, Any, Literal

import psutil
import pytest
from django.db import Error, connections, transaction
from django.db import close_old_connections as django_close_old_connections
from django.db.models import F
from django.db.utils import load_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_dbhealth import close_old_connections
from tests.app.models import Row
from tests.conftest import administrator, close
from tests.servers.base import USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from tests.conftest import Database

    Expected = Literal["well", "an error", "either"]
    Rows = list[tuple[str, int]]
    Change = Callable[[Rows], Rows]

LOCK = {"mysql": "lock by GET_LOCK", "postgresql": "advisory lock"}
RAW_TRANSACTION = "transaction begun by raw SQL"

# What a session can hold, by the words of the error's note; how it is taken and given back.
SESSION_STATE: dict[str, dict[str, tuple[str, str]]] = {
    "mysql": {
        "temporary table shelf": (
            "CREATE TEMPORARY TABLE shelf (id int)",
            "DROP TEMPORARY TABLE IF EXISTS shelf",
        ),
        "SET lock_wait_timeout": (
            "SET SESSION lock_wait_timeout = 50",
            "SET SESSION lock_wait_timeout = DEFAULT",
        ),
        "user variable @shelf": ("SET @shelf = 1", ""),
    },
    "postgresql": {
        "temporary table shelf": (
            "CREATE TEMP TABLE shelf (id int)",
            "DROP TABLE IF EXISTS shelf",
        ),
        "SET lock_timeout": ("SET SESSION lock_timeout = '50s'", "RESET lock_timeout"),
        "SET shop.shelf": ("SELECT set_config('shop.shelf', '1', false)", ""),
    },
}
# The lock of a session that was closed a moment ago may not be free yet.
TAKE_LOCK = {
    "mysql": "SELECT GET_LOCK('shelf', 10)",
    "postgresql": "SELECT pg_advisory_lock(7)",
}
RELEASE_LOCK = {
    "mysql": "SELECT RELEASE_LOCK('shelf')",
    "postgresql": "SELECT pg_advisory_unlock(7)",
}


# The model


@dataclass
class Mark:
    """Where a transaction or a block began, to which a rollback returns."""

    rows: Rows
    callbacks: int
    held: Counter[str]
    begins: bool = True  # a transaction, which its end commits
    savepoint: bool = False


@dataclass
class Model:
    """What must come of a program. Nothing here knows how it is done."""

    undoes_state: bool  # a rollback also undoes what the session was given since
    lock: str  # the state that no rollback undoes
    checks_health: bool  # CONN_HEALTH_CHECKS

    committed: Rows = field(default_factory=list)
    rows: Rows = field(default_factory=list)  # as the connection sees them
    ran: list[int] = field(default_factory=list)  # callbacks
    waiting: list[int] = field(default_factory=list)  # callbacks of the transaction

    blocks: list[Mark] = field(default_factory=list)
    manual: Mark | None = None  # autocommit is off
    raw: Mark | None = None  # BEGIN was sent as a statement
    used: bool = False  # a statement has run in the transaction
    rolls_back: bool = False  # the program's own exception has left a block without a savepoint

    lost: bool = False  # and nobody has noticed
    told: bool = False  # the transaction has seen an error because of it
    released: bool = False  # and so has a savepoint's end, which may count as a statement
    held: Counter[str] = field(default_factory=Counter)  # session state
    gave_back: bool = False  # state, in this transaction
    doubtful: bool = False  # it may be thought to hold some, or have lost some without a word
    had_error: bool = False
    # Django's boundary lets its health check replace a lost connection at its next use; ours does
    # not where the session carries anything.
    excused: Literal["no", "perhaps", "yes"] = "no"

    @property
    def in_transaction(self) -> bool:
        return bool(self.blocks) or self.manual is not None

    # What is to be expected

    def of_statement(self) -> Expected:
        if self.rolls_back:
            return "an error"
        return self.of_use()

    def of_use(self) -> Expected:
        if not self.lost:
            return "well"
        if self.used:
            return "an error"
        if self.told or self.released:
            return "either"
        if self.held:
            answers: dict[str, Expected] = {"no": "an error", "perhaps": "either", "yes": "well"}
            return answers[self.excused]
        return "either" if self.doubtful or self.manual else "well"

    def of_begin(self, *, savepoint: bool) -> Expected:
        if self.in_transaction and not savepoint:
            return "well"  # nothing is sent
        if self.rolls_back:
            return "either" if self.lost else "well"
        # PostgreSQL's driver sends BEGIN with the first statement; Django's own marking for a
        # rollback keeps it from sending SAVEPOINT.
        return "well" if self.of_use() == "well" else "either"

    def of_commit(self) -> Expected:
        if not self.lost:
            return "well"
        if self.used:
            return "an error"
        return "either"  # nothing to lose, but COMMIT may have been the first to notice

    def of_rollback(self) -> Expected:
        return "either" if self.lost else "well"

    def of_leaving(self, *, failed: bool) -> Expected:
        block = self.blocks[-1]
        if failed:  # the program's exception is not to be hidden
            return "either" if block.begins and self.lost and self.held else "well"
        if self.rolls_back:
            return "either" if self.lost else "well"
        if block.begins:
            return self.of_commit()
        return "well" if not block.savepoint or self.of_use() == "well" else "either"

    def to_be_told(self) -> list[str]:
        """Return what the error must name: the state, in the first one after the loss."""
        if not self.lost or self.used or self.told or self.rolls_back or self.excused != "no":
            return []
        return list(self.held)

    # What has come

    def statement(self, change: Change, *, well: bool) -> None:
        if self.rolls_back:
            return  # nothing was sent
        self.use(well=well)
        if not well:
            return
        self.rows = change(self.rows)
        self.used = self.in_transaction
        if not self.used and self.raw is None:
            self.committed = self.rows

    def use(self, *, well: bool) -> None:
        """The connection was used, for a statement or otherwise."""
        if self.lost and (well or not self.in_transaction):
            self.renew()
        elif self.lost:
            self.tell()
        self.excused = "no"

    def tell(self) -> None:
        self.told = True
        self.held.clear()
        self.doubtful = False

    def renew(self) -> None:
        """The session is a new one, or the next will be."""
        self.lost = self.told = self.doubtful = False
        self.excused = "no"
        self.held.clear()
        for mark in (*self.blocks, self.manual):
            if mark:
                mark.held.clear()
        if self.raw:
            self.rows, self.raw = self.committed, None

    def perhaps_renew(self) -> None:
        """The lost session may have been replaced without a word."""
        doubtful = self.doubtful or bool(self.held)
        self.renew()
        self.lost, self.doubtful = True, doubtful

    def mark(self, **how: bool) -> Mark:
        return Mark(self.rows, len(self.waiting), self.held.copy(), **how)

    def begin(self, *, savepoint: bool, well: bool) -> None:
        begins = not self.in_transaction
        if begins:
            self.begin_transaction(well=well)
        elif not well:
            self.tell()
        if well:
            savepoint = savepoint and not begins and not self.rolls_back
            self.blocks.append(self.mark(begins=begins, savepoint=savepoint))

    def begin_transaction(self, *, well: bool) -> None:
        if self.lost:
            if not well or self.excused == "yes":
                self.renew()
            elif self.excused == "perhaps":
                self.perhaps_renew()
        self.excused = "no"

    def leave(self, *, failed: bool, well: bool) -> None:
        block = self.blocks.pop()
        self.released |= block.savepoint
        rolls_back = failed or self.rolls_back
        if rolls_back or not well:
            self.undo(block)
        if block.begins:
            self.end_transaction(commits=well and not rolls_back)
            if not well or (self.lost and self.told):
                self.renew()
            elif self.lost and rolls_back:
                self.perhaps_renew()  # Django itself closes it when the rollback has failed
            self.told = False
        elif not well:
            self.tell()

    def undo(self, block: Mark) -> None:
        if not block.begins and not block.savepoint:
            self.rolls_back = True
            return
        self.rolls_back = False
        self.rows = block.rows
        del self.waiting[block.callbacks :]
        if self.undoes_state:
            before = block.held.copy()
            before[self.lock] = self.held[self.lock]
            self.doubtful |= self.gave_back or bool(self.held - before)
            self.held = +before

    def end_transaction(self, *, commits: bool) -> None:
        if commits:
            self.committed = self.rows
            self.ran += self.waiting
        self.waiting = []
        self.used = self.released = self.gave_back = False

    def commit(self, *, well: bool) -> None:
        """COMMIT with autocommit off."""
        if well:
            self.end_transaction(commits=True)
            self.manual = self.mark()
        else:
            self.tell()

    def rollback(self, *, well: bool) -> None:
        """ROLLBACK with autocommit off."""
        if well:
            assert self.manual
            self.undo(self.manual)
            self.end_transaction(commits=False)
            self.manual = self.mark()
        else:
            self.tell()

    def raw_begin(self) -> None:
        self.raw = self.mark()
        self.held[RAW_TRANSACTION] = 1

    def raw_end(self, *, commits: bool) -> None:
        if self.raw is None:  # it had ended with its session
            return
        if commits:
            self.committed = self.rows
        else:
            self.undo(self.raw)
        self.raw = None
        self.gave_back = False
        del self.held[RAW_TRANSACTION]

    def take(self, words: str) -> None:
        """The session holds what it did not hold, and locks are counted."""
        self.held[words] += 1

    def give_back(self, words: str) -> None:
        self.doubtful |= not self.held[words]  # in a new session a SET to DEFAULT is a SET
        self.held[words] -= 1
        self.held = +self.held
        self.gave_back = self.in_transaction or self.raw is not None

    def close(self) -> None:
        self.manual = None
        self.rows = self.committed
        self.used = self.had_error = False
        self.renew()

    def boundary(self, *, of_django: bool) -> None:
        if self.had_error and self.lost:
            self.perhaps_renew()
        if self.had_error:
            self.excused = "perhaps"
        elif self.checks_health and of_django:
            self.excused = "yes"


# The program


OPERATIONS: dict[str, Callable[[Program], None]] = {}
USUAL: list[str] = []


def operation(*, times: int = 1) -> Callable[..., Any]:
    """Make a method an operation, so many times as likely as others."""

    def add(method: Callable[[Program], None]) -> Callable[[Program], None]:
        OPERATIONS[method.__name__] = method
        USUAL.extend([method.__name__] * times)
        return method

    return add


def adding(*names: str) -> Change:
    return lambda rows: [*rows, *((name, 0) for name in names)]


def counting_up(rows: Rows) -> Rows:
    return [(name, number + 1) for name, number in rows]


def error_of(action: Callable[[], object]) -> Error | None:
    try:
        action()
    except Error as error:
        return error
    return None


class Interruption(Exception):
    """The program's own."""


class Program:
    """Runs the operations, on one connection."""

    def __init__(
        self, alias: str, connection: BaseDatabaseWrapper, kill: Callable[[], None], model: Model
    ) -> None:
        self.alias = alias
        self.connection = connection
        self.kill = kill
        self.model = model
        self.blocks: list[transaction.Atomic] = []
        self.leaving: Callable[..., None] | None = None
        self.ran: list[int] = []
        self.registered = 0
        self.names = 0
        self.held_cursor: Any = None
        self.state = SESSION_STATE[connection.vendor]
        self.story: list[str] = []

    def note(self, line: str) -> None:
        self.story.append(line)

    def run(self, operations: Sequence[str]) -> None:
        for name in operations:
            OPERATIONS[name](self)
        self.finish()

    def finish(self) -> None:
        """End what is open; after at most one error, which says what was lost, all is well."""
        while self.blocks:
            self.leave()
        if self.model.raw:
            self.raw_commit()
        if self.model.manual:
            self.autocommit_on()
        self.raw_insert()
        self.raw_insert()
        self.select()
        assert self.model.of_statement() == "well"

    def attempt(self, what: str, expected: Expected, action: Callable[[], object]) -> bool:
        """Return whether the action was well; an error is one of Django's, others are bugs."""
        error = error_of(action)
        notes = "\n".join(getattr(error, "__notes__", []))
        self.note(f"{what}: {error!r} {notes}" if error else f"{what}: well")
        if error is not None and expected == "well":
            raise AssertionError(f"{what}: all should be well") from error
        if error is None and expected == "an error":
            raise AssertionError(f"{what}: there should be an error")
        if expected == "an error":
            missing = [words for words in self.model.to_be_told() if words not in notes]
            assert not missing, f"{what}: {missing} is lost, and not named"
        return error is None

    def statement(
        self, what: str, action: Callable[[], object], change: Change = lambda rows: rows
    ) -> bool:
        expected = self.model.of_statement()
        well = self.attempt(what, expected, action)
        self.model.statement(change, well=well)
        return well

    def execute(self, sql: str, params: Sequence[Any] = ()) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params or None)
            if cursor.description:
                cursor.fetchall()

    def new_name(self) -> str:
        self.names += 1
        return f"row {self.names:03}"

    @property
    def objects(self) -> Any:
        return Row.objects.using(self.alias)

    # Statements

    @operation(times=4)
    def insert(self) -> None:
        name = self.new_name()
        self.statement(f"insert {name}", lambda: self.objects.create(name=name), adding(name))

    @operation(times=2)
    def bulk_insert(self) -> None:
        """Insert two rows, in a block of Django's own."""
        if self.model.raw:
            return
        names = [self.new_name(), self.new_name()]
        objects = [Row(name=name) for name in names]
        self.statement(
            f"bulk_insert {names}", lambda: self.objects.bulk_create(objects), adding(*names)
        )

    @operation(times=3)
    def raw_insert(self) -> None:
        name = self.new_name()
        sql = "INSERT INTO app_row (name, number) VALUES (%s, 0)"
        self.statement(f"raw_insert {name}", lambda: self.execute(sql, [name]), adding(name))

    @operation(times=3)
    def held_insert(self) -> None:
        """Insert by a cursor that is kept."""
        name = self.new_name()
        sql = "INSERT INTO app_row (name, number) VALUES (%s, 0)"
        self.statement(
            f"held_insert {name}", lambda: self.kept_cursor().execute(sql, [name]), adding(name)
        )

    @operation(times=1)
    def held_insert_many(self) -> None:
        names = [self.new_name(), self.new_name()]
        sql = "INSERT INTO app_row (name, number) VALUES (%s, 0)"
        values = [[name] for name in names]
        self.statement(
            f"held_insert_many {names}",
            lambda: self.kept_cursor().executemany(sql, values),
            adding(*names),
        )

    def kept_cursor(self) -> Any:
        if self.held_cursor is None:
            self.held_cursor = self.connection.cursor()
        return self.held_cursor

    @operation(times=1)
    def keep_cursor(self) -> None:
        """Make the cursor that is kept, for a statement to come."""
        if not self.model.lost:
            self.attempt("keep_cursor", "well", self.kept_cursor)
            self.model.use(well=True)

    @operation(times=2)
    def update(self) -> None:
        """Count every row up: a statement that ran twice would show."""
        updated = []
        if self.statement(
            "update",
            lambda: updated.append(self.objects.update(number=F("number") + 1)),
            counting_up,
        ):
            assert updated == [len(self.model.rows)]

    @operation(times=1)
    def delete(self) -> None:
        """Delete the first row, in a block of Django's own."""
        if self.model.rows and not self.model.raw:
            name, _ = self.model.rows[0]
            self.statement(
                f"delete {name}",
                self.objects.filter(name=name).delete,
                lambda rows: [row for row in rows if row[0] != name],
            )

    @operation(times=3)
    def select(self) -> None:
        self.compare("select", lambda: self.objects.values_list("name", "number").order_by("name"))

    @operation(times=2)
    def select_by_iterator(self) -> None:
        if self.model.lost and self.model.rolls_back:
            return  # in closing its cursor Django lets the driver's own error out
        self.compare(
            "select_by_iterator",
            lambda: self.objects.values_list("name", "number").order_by("name").iterator(1),
        )

    @operation(times=1)
    def held_select(self) -> None:
        def query() -> Any:
            cursor = self.kept_cursor()
            cursor.execute("SELECT name, number FROM app_row ORDER BY name")
            return cursor.fetchall()

        self.compare("held_select", query)

    def compare(self, what: str, query: Callable[[], Any]) -> None:
        seen: Rows = []
        if self.statement(what, lambda: seen.extend(query())):
            assert seen == self.model.rows, what

    @operation(times=1)
    def fail(self) -> None:
        """Send a statement that is wrong, where it spoils no transaction."""
        if not self.model.in_transaction and not self.model.raw:
            sql = "SELECT 1 FROM no_such_table"
            self.attempt("fail", "an error", lambda: self.execute(sql))
            self.model.use(well=False)
            self.model.had_error = True

    # Blocks

    @operation(times=5)
    def begin(self) -> None:
        self.enter("begin", savepoint=True)

    @operation(times=1)
    def begin_without_savepoint(self) -> None:
        if not self.model.manual or self.blocks:
            self.enter("begin_without_savepoint", savepoint=False)

    @operation(times=1)
    def begin_durable(self) -> None:
        if not self.blocks:
            self.enter("begin_durable", savepoint=True, durable=True)

    def enter(self, what: str, *, savepoint: bool, durable: bool = False) -> None:
        if self.model.raw or len(self.blocks) == 4:
            return
        if self.model.manual and self.model.lost:
            return  # Django is stuck in a block that was never entered
        block = transaction.atomic(self.alias, savepoint=savepoint, durable=durable)
        expected = self.model.of_begin(savepoint=savepoint)
        well = self.attempt(what, expected, block.__enter__)
        self.model.begin(savepoint=savepoint, well=well)
        if well:
            self.blocks.append(block)

    @operation(times=4)
    def leave(self) -> None:
        self.leave_block("leave", failed=False)

    @operation(times=2)
    def leave_by_exception(self) -> None:
        """Leave the inner block by an exception that is caught in the outer one."""
        self.leave_block("leave_by_exception", failed=True)

    @operation(times=1)
    def leave_all_by_exception(self) -> None:
        while self.blocks:
            self.leave_block("leave_all_by_exception", failed=True)

    def leave_block(self, what: str, *, failed: bool) -> None:
        if not self.blocks:
            return
        expected = self.model.of_leaving(failed=failed)
        how = (Interruption, Interruption(), None) if failed else (None, None, None)
        block = self.blocks.pop()
        self.leaving = partial(self.model.leave, failed=failed)
        well = self.attempt(what, expected, lambda: block.__exit__(*how))
        self.have_left(well=well)
        assert self.ran == self.model.ran, what

    def have_left(self, *, well: bool) -> None:
        """Tell the model that the block is left: after it, or in its first callback."""
        if self.leaving is not None:
            self.leaving(well=well)
        else:
            assert well, "An error came after the callbacks."
        self.leaving = None

    @operation(times=2)
    def register(self) -> None:
        """Register a callback for the commit."""
        self.add_callback("register", lambda: None)

    @operation(times=1)
    def register_insert(self) -> None:
        """Register a callback that inserts a row."""
        self.add_callback("register_insert", self.raw_insert)

    def add_callback(self, what: str, action: Callable[[], None]) -> None:
        if self.model.manual:
            return
        self.registered += 1
        number = self.registered
        self.note(f"{what} {number}")
        (self.model.waiting if self.blocks else self.model.ran).append(number)

        def callback() -> None:
            if self.leaving is not None:
                self.have_left(well=True)
            self.ran.append(number)
            action()

        transaction.on_commit(callback, using=self.alias)
        assert self.ran == self.model.ran

    # Autocommit off, and transactions of which Django does not know

    @operation(times=1)
    def autocommit_off(self) -> None:
        if self.model.in_transaction or self.model.raw:
            return
        expected = self.model.of_begin(savepoint=True)
        well = self.attempt(
            "autocommit_off", expected, lambda: transaction.set_autocommit(False, self.alias)
        )
        self.model.begin_transaction(well=well)
        if well:
            self.model.manual = self.model.mark()

    @operation(times=1)
    def commit(self) -> None:
        if self.model.manual and not self.blocks:
            well = self.attempt("commit", self.model.of_commit(), self.connection.commit)
            self.model.commit(well=well)

    @operation(times=1)
    def rollback(self) -> None:
        if self.model.manual and not self.blocks:
            well = self.attempt("rollback", self.model.of_rollback(), self.connection.rollback)
            self.model.rollback(well=well)

    @operation(times=3)
    def autocommit_on(self) -> None:
        """Commit, and return to autocommit; after an error close the connection."""
        if not self.model.manual or self.blocks:
            return
        well = self.attempt("autocommit_on", self.model.of_commit(), self.commit_for_good)
        self.model.commit(well=well)
        self.model.manual = None
        if not well:
            self.close()

    def commit_for_good(self) -> None:
        self.connection.commit()
        self.connection.set_autocommit(True)

    @operation(times=1)
    def raw_begin(self) -> None:
        if self.model.in_transaction or self.model.raw:
            return
        if self.statement("raw_begin", lambda: self.execute("BEGIN")):
            self.model.raw_begin()

    @operation(times=1)
    def raw_commit(self) -> None:
        if self.model.raw and self.statement("raw_commit", lambda: self.execute("COMMIT")):
            self.model.raw_end(commits=True)

    @operation(times=1)
    def raw_rollback(self) -> None:
        if self.model.raw and self.statement("raw_rollback", lambda: self.execute("ROLLBACK")):
            self.model.raw_end(commits=False)

    # Session state

    @operation(times=1)
    def temporary_table(self) -> None:
        self.take_or_give_back(0)

    @operation(times=1)
    def session_setting(self) -> None:
        self.take_or_give_back(1)

    @operation(times=1)
    def user_variable(self) -> None:
        self.take_or_give_back(2)

    def take_or_give_back(self, index: int) -> None:
        words = list(self.state)[index]
        take, give_back = self.state[words]
        if not self.model.held[words]:
            if self.statement(f"take {words}", lambda: self.execute(take)):
                self.model.take(words)
        elif give_back and self.statement(f"give back {words}", lambda: self.execute(give_back)):
            self.model.give_back(words)

    @operation(times=1)
    def take_lock(self) -> None:
        sql = TAKE_LOCK[self.connection.vendor]
        if self.statement("take_lock", lambda: self.execute(sql)):
            self.model.take(self.model.lock)

    @operation(times=1)
    def release_lock(self) -> None:
        sql = RELEASE_LOCK[self.connection.vendor]
        if self.model.held[self.model.lock] and self.statement(
            "release_lock", lambda: self.execute(sql)
        ):
            self.model.give_back(self.model.lock)

    # Boundaries

    @operation(times=1)
    def boundary(self) -> None:
        if not self.model.manual:
            self.pass_boundary("boundary", close_old_connections, of_django=False)

    @operation(times=1)
    def django_boundary(self) -> None:
        """Let Django close old connections, where that cannot end a transaction."""
        if not self.model.in_transaction:
            self.pass_boundary("django_boundary", django_close_old_connections, of_django=True)

    def pass_boundary(self, what: str, close_old: Callable[[], None], *, of_django: bool) -> None:
        if self.model.raw and self.model.had_error:
            return  # whether the transaction survives depends on the driver
        self.note(what)
        close_old()
        if not self.blocks:
            self.held_cursor = None
            self.model.boundary(of_django=of_django)

    @operation(times=1)
    def close(self) -> None:
        if not self.blocks:
            self.note("close")
            self.connection.close()
            self.held_cursor = None
            self.model.close()

    # Losses

    def lose(self) -> None:
        if self.model.lost and (self.model.used or not self.model.in_transaction):
            return  # it would be lost twice
        self.note("lose")
        self.kill()
        self.model.lost = True

    def leave_and_lose_after_commit(self) -> None:
        """Lose the connection when the block is committed, and autocommit not yet on again."""
        if len(self.blocks) != 1 or self.model.lost or self.model.manual or self.model.rolls_back:
            return
        commit = self.connection._commit

        def commit_and_lose() -> None:
            commit()
            self.lose()

        self.connection._commit = commit_and_lose  # type: ignore[method-assign]
        try:
            self.leave_block("leave_and_lose_after_commit", failed=False)
        finally:
            del self.connection._commit


OPERATIONS["lose"] = Program.lose
OPERATIONS["leave_and_lose_after_commit"] = Program.leave_and_lose_after_commit


# The server's side


class Administrator:
    """What happens on the server's side, over a connection that stays open."""

    def __init__(self, alias: str) -> None:
        self.connection = administrator(alias)
        self.is_mysql = self.connection.vendor == "mysql"

    def query(self, sql: str, params: Sequence[Any] | None = None) -> list[Any]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def sessions(self) -> list[int]:
        sql = (
            "SELECT id FROM information_schema.processlist WHERE user = %s"
            if self.is_mysql
            else "SELECT pid FROM pg_stat_activity WHERE usename = %s"
        )
        return [session for (session,) in self.query(sql, [USER])]

    def kill(self) -> None:
        """End the sessions, and return when their sockets are closed."""
        sessions = self.sessions()
        for session in sessions:
            with suppress(Error):  # it has ended by itself meanwhile
                self.query(
                    "KILL %s" if self.is_mysql else "SELECT pg_terminate_backend(%s)", [session]
                )
        if self.is_mysql:
            wait_for(lambda: not self.sessions(), interval=0.0002)
        else:  # a session leaves pg_stat_activity before its process ends
            wait_for(lambda: not any(map(psutil.pid_exists, sessions)), interval=0.0002)
        # A connection that has answered just now is not looked at again: not a loss to be seen.
        sleep(0.0005)

    def wait_until_one_is_left(self) -> None:
        wait_for(lambda: len(self.sessions()) <= 1, interval=0.0002)


@pytest.fixture
def admin(database: Database, caplog: pytest.LogCaptureFixture) -> Iterator[Administrator]:
    caplog.set_level(logging.CRITICAL, "django_dbhealth")  # thousands of losses are reported
    admin = Administrator(database.alias)
    yield admin
    admin.connection.close()


def run(operations: Sequence[str], admin: Administrator, *, checks_health: bool = False) -> None:
    """Run a program and compare what came of it with the model."""
    alias = admin.connection.alias
    admin.query("DELETE FROM app_row")
    connection = connections[alias]
    connection.settings_dict |= {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": checks_health}
    vendor = connection.vendor
    model = Model(
        undoes_state=vendor == "postgresql", lock=LOCK[vendor], checks_health=checks_health
    )
    program = Program(alias, connection, admin.kill, model)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # of what is left open; as errors they come too late
            program.run(operations)
        assert [str(warning.message) for warning in warned] == []
        rows = admin.query("SELECT name, number FROM app_row ORDER BY name")
        assert [tuple(row) for row in rows] == model.committed
        assert program.ran == model.ran
        admin.wait_until_one_is_left()
    except Exception as error:
        error.add_note("\n".join(["What came:", *program.story]))
        raise
    finally:
        close(connection)


BLOCKS = ["begin", "begin", "begin", "leave", "leave_by_exception", "register"]
LOSSES = ["lose", "lose", "leave_and_lose_after_commit"]


def programs(*losses: str) -> st.SearchStrategy[list[str]]:
    """Make lists of about 50 names, half of which may do nothing.

    They are made of scenes, some of which are about blocks only, or about few names: so blocks
    become deep before a statement runs in them, and what must come together does.
    """
    names = st.sampled_from([*USUAL, *losses * 4])
    few = st.lists(names, min_size=2, max_size=5).map(st.sampled_from)
    scene = (
        st.lists(names, max_size=12)
        | st.lists(st.sampled_from([*BLOCKS, *losses]), max_size=12)
        | few.flatmap(lambda names: st.lists(names, max_size=12))
    )
    scenes = st.lists(scene, max_size=12)
    return st.tuples(scenes, scenes).map(
        lambda acts: [name for scene in chain(*acts) for name in scene]
    )


random = settings(
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@random
@given(operations=programs(), checks_health=st.booleans())
def test_programs(admin: Administrator, operations: list[str], checks_health: bool) -> None:
    """Without losses nothing is other than with Django alone, nor than the model says."""
    run(operations, admin, checks_health=checks_health)


@random
@given(operations=programs(*LOSSES), checks_health=st.booleans())
def test_programs_that_lose_connections(
    admin: Administrator, operations: list[str], checks_health: bool
) -> None:
    """Wherever a connection is lost, nothing is lost quietly and nothing is done twice."""
    run(operations, admin, checks_health=checks_health)


# What plain Django does in these is what the guard is there for.
WITH_THE_GUARD_ALONE = [
    ["insert", "lose", "select"],
    ["held_insert", "lose", "held_insert"],
    ["begin", "lose", "insert", "leave"],
    ["begin", "begin", "lose", "insert", "leave", "leave"],
    ["insert", "lose", "begin", "insert", "leave"],
    ["begin", "insert", "begin", "lose", "insert", "leave_by_exception", "leave"],
    ["take_lock", "lose", "insert"],
    ["begin", "register", "insert", "leave_and_lose_after_commit"],
]


@pytest.mark.parametrize("operations", WITH_THE_GUARD_ALONE, ids=" ".join)
def test_the_model_tells_plain_django(admin: Administrator, operations: list[str]) -> None:
    """The test can fail: the same programs without the guard are other than the model says."""
    run(operations, admin)
    alias = admin.connection.alias
    settings_dict = connections.settings[alias]
    connections[alias] = load_backend(settings_dict["ENGINE"]).DatabaseWrapper(settings_dict, alias)
    with pytest.raises(AssertionError, match="should be|is lost, and not named"):
        run(operations, admin)
