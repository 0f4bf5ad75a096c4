"""What a use of the database meets when something goes wrong in the middle of it.

The table of the guard goes on here: losses that are no matter of idleness.
"""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import MySQLdb.cursors
import pymysql.cursors
import pytest
from django.db import Error, OperationalError, connections
from django.db.utils import DEFAULT_DB_ALIAS
from django.test import override_settings

from tests.app.models import Row
from tests.outcomes import (
    CONFIGURATIONS,
    MARIADB,
    POSTGRESQL,
    PYMYSQL,
    SOCKET,
    TCP,
    Alias,
    Configuration,
    Services,
    losses_of,
    session_id,
)
from tests.servers.base import USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

everywhere = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
in_or_outside = pytest.mark.parametrize("in_a_block", [False, True], ids=["alone", "in-a-block"])
on_mariadb = pytest.mark.parametrize("configuration", MARIADB, ids=str)

SLOW_SELECT = {"mysql": "SELECT SLEEP(%s)", "postgresql": "SELECT 0 FROM pg_sleep(%s)"}
SLOW_INSERT = {
    "mysql": "INSERT INTO app_row (name, number) SELECT 'slow', SLEEP(%s)",
    "postgresql": "INSERT INTO app_row (name, number) SELECT 'slow', 0 FROM pg_sleep(%s)",
}


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with closing(Services()) as services:
        yield services


@pytest.fixture
def alias(
    request: pytest.FixtureRequest, services: Services, configuration: Configuration
) -> Iterator[Alias]:
    """Give an alias on a private server, with a table that is the test's own."""
    name = request.function.__name__.removeprefix("test_")
    alias = Alias(services[configuration.kind], name, configuration)
    yield alias
    alias.close()


def add_a_row(alias: Alias, name: str, in_a_block: bool) -> None:
    with alias.atomic() if in_a_block else nullcontext():
        alias.add(name)


# During a statement


def lose_busy_session(alias: Alias, loss: str) -> None:
    """Lose the session that is running the slow INSERT."""
    alias.server.wait_until_running("'slow'")
    if loss == "cut":
        alias.service.proxy.cut()
        loss = "kill"  # the server would notice at the statement's end
    alias.service.lose(loss)


@pytest.mark.parametrize(
    ("configuration", "loss"),
    [
        pytest.param(configuration, loss, id=f"{configuration}-{loss}")
        for configuration in CONFIGURATIONS
        for loss in losses_of(configuration)
        if loss != "idle"
    ],
)
def test_lost_during_the_statement(alias: Alias, loss: str) -> None:
    """The error comes, and nobody sends the statement again."""
    if loss == "cut":
        connections.settings[alias.alias]["PORT"] = str(alias.service.proxy.port)
    session_id(alias.connection)
    with ThreadPoolExecutor(1) as executor:
        losing = executor.submit(lose_busy_session, alias, loss)
        with pytest.raises(Error), alias.connection.cursor() as cursor:
            cursor.execute(SLOW_INSERT[alias.vendor], [60])
        losing.result()
    assert alias.connects == 1
    assert alias.rows().count("slow") <= 1
    before = alias.rows()
    alias.add("next")
    assert alias.rows() == [*before, "next"]


@on_mariadb
def test_read_timeout(alias: Alias) -> None:
    """The statement goes on without its client: the error comes, and it runs once."""
    connections.settings[alias.alias]["OPTIONS"]["read_timeout"] = 2
    session = session_id(alias.connection)
    with pytest.raises(OperationalError, match="2013"), alias.connection.cursor() as cursor:
        cursor.execute(SLOW_INSERT["mysql"], [5])
    alias.add("next")
    alias.server.wait_until_gone(session)
    assert sorted(alias.rows()) in (["next"], ["next", "slow"])
    assert alias.connects == 2


@in_or_outside
@on_mariadb
def test_oversize_packet(alias: Alias, in_a_block: bool) -> None:
    """It is sent once, since the next server would not take it either."""
    alias.add("before")
    alias.connects = 0
    oversize = "x" * (2 << 20)
    with pytest.raises(OperationalError, match=r"\((2006|1153|2013)"):
        add_a_row(alias, oversize, in_a_block)
    alias.add("next")
    assert alias.rows() == ["before", "next"]
    assert alias.connects == 1


class Alarm(Exception):
    pass


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """Have a signal handler raise an exception, as a time limit for tasks does."""

    def ring(signum: int, frame: object) -> None:
        raise Alarm

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("statement", [SLOW_SELECT, SLOW_INSERT], ids=["select", "insert"])
@everywhere
def test_exception_of_a_signal_handler(alias: Alias, statement: dict[str, str]) -> None:
    """The next use is not given the answer of the interrupted one, and each runs at most once."""
    alias.add("before")
    # mysqlclient waits in C: the handler runs when the server has answered.
    with pytest.raises(Alarm), alarm_after(0.1), alias.connection.cursor() as cursor:
        cursor.execute(statement[alias.vendor], [0.4])
    assert alias.execute("SELECT 'mine'") == "mine"
    alias.add("next")
    wait_for(lambda: len(alias.server.sessions(USER)) == 1)
    rows = alias.rows()
    assert rows.count("slow") <= 1
    assert [name for name in rows if name != "slow"] == ["before", "next"]


@everywhere
def test_exception_of_a_signal_handler_in_a_block(alias: Alias) -> None:
    """The block is undone, all of it, and the next use works."""
    with pytest.raises(Alarm), alias.atomic():
        alias.on_commit()
        alias.add("undone")
        # Not while the block is entered: Django would not know that it is in one.
        with alarm_after(0.1), alias.connection.cursor() as cursor:
            cursor.execute(SLOW_INSERT[alias.vendor], [0.4])
    assert alias.execute("SELECT 'mine'") == "mine"
    alias.add("next")
    wait_for(lambda: len(alias.server.sessions(USER)) == 1)
    assert alias.rows() == ["next"]
    assert alias.callbacks == 0


# In between


@contextmanager
def frozen(server: Server, *, at_most: float) -> Iterator[None]:
    """Freeze a server, and let it go on after so many seconds even if its client waits."""
    thaw = threading.Timer(at_most, server.thaw)
    server.freeze()
    thaw.start()
    try:
        yield
    finally:
        thaw.cancel()
        thaw.join()
        server.thaw()


@everywhere
def test_frozen_server(alias: Alias) -> None:
    """The probe is bounded, and the connect after it, though nothing in OPTIONS bounds them."""
    alias.add("before")
    expected = ["before"]
    # libpq's shortest connect_timeout is 2 seconds (manual, database connection control functions).
    ping_timeout = 2 if alias.vendor == "postgresql" else 1
    for _ in range(3):  # a busy machine may hold this process up for a second, not three times
        with (
            override_settings(DBHEALTH={"PING_AFTER": 0.001, "PING_TIMEOUT": ping_timeout}),
            frozen(alias.server, at_most=30),  # for which an unbounded one would wait
        ):
            began = time.monotonic()
            with pytest.raises(Error):
                alias.add("never sent")
            took = time.monotonic() - began
        alias.add("next")
        expected.append("next")
        if took < 2 * ping_timeout + 1:
            break
    else:
        raise AssertionError(f"The answer took {took:.1f} s.")
    assert alias.rows() == expected


@everywhere
def test_other_alias_is_down(alias: Alias, mariadb: Server, postgresql: Server) -> None:
    """Its uses fail, those of the others do not; it heals when its server is back."""
    other = connections["postgresql" if alias.vendor == "postgresql" else DEFAULT_DB_ALIAS]
    before = session_id(other)
    alias.add("before")
    alias.server.stop()
    try:
        for _ in range(2):
            with pytest.raises(Error):
                alias.add("never sent")
            with pytest.raises(Error), alias.atomic():
                alias.add("never sent")
            assert session_id(other) == before
    finally:
        alias.server.start()
    alias.add("next")
    assert session_id(other) == before
    assert alias.rows() == ["before", "next"]


# An unbuffered result


def read_unbuffered(alias: Alias, configuration: Configuration) -> Iterator[int]:
    """Give the numbers from 1 to 5,000, most of which are still with the server."""
    if configuration is POSTGRESQL:
        # psycopg's own ways (stream(), copy()) hold its lock: another use would wait for itself.
        alias.objects.bulk_create([Row(number=number) for number in range(1, 5001)])
        for row in alias.objects.order_by("number").iterator(chunk_size=1):
            yield row.number
    else:
        cursors = pymysql.cursors if configuration is PYMYSQL else MySQLdb.cursors
        cursor = alias.connection.connection.cursor(cursors.SSCursor)
        cursor.execute("SELECT seq, REPEAT('x', 1000) FROM seq_1_to_5000")
        for row in iter(cursor.fetchone, None):
            yield row[0]


# What plain Django makes of it: the answer to the other use, and how many rows are read.
OUT_OF_SYNC, ANSWERED, TAKEN_AWAY = ("2014", 5000), ("mine", 5000), ("mine", 1)
UNBUFFERED = {
    SOCKET: OUT_OF_SYNC,
    TCP: OUT_OF_SYNC,
    PYMYSQL: TAKEN_AWAY,
    POSTGRESQL: ANSWERED,
}


@everywhere
@pytest.mark.parametrize("ping_after", [0.001, 30])
@pytest.mark.filterwarnings("ignore:Previous unbuffered result")  # PyMySQL's
def test_unbuffered_result(alias: Alias, configuration: Configuration, ping_after: float) -> None:
    """While it is read the connection is busy, not lost: all goes on as with plain Django."""
    before = session_id(alias.connection)
    answer, count = UNBUFFERED[configuration]
    rows = read_unbuffered(alias, configuration)
    assert next(rows) == 1
    with override_settings(DBHEALTH={"PING_AFTER": ping_after}):
        try:
            assert alias.execute("SELECT 'mine'") == answer
        except Error as error:
            assert str(error.args[0]) == answer  # noqa: PT017
    numbers = [1]
    with suppress(alias.connection.Database.ProgrammingError):  # the reader's 2014, after its last
        numbers.extend(rows)
    assert numbers == list(range(1, count + 1))
    assert session_id(alias.connection) == before
    assert alias.connects == 1
