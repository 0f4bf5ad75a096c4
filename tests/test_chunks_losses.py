"""chunked_iterator() while its connection is lost, its server restarts and others write."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Self

import MySQLdb
import MySQLdb.cursors
import pytest
from asgiref.sync import async_to_sync
from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.models import Func, TextField, Value
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_dbhealth import chunked_iterator
from django_dbhealth.signals import connection_refused
from tests.app.models import Row
from tests.conftest import administrator
from tests.servers import Proxy
from tests.servers.base import PASSWORD, USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.conftest import Database
    from tests.servers import Server

SLEEP = {"mysql": "SLEEP", "postgresql": "pg_sleep"}
ALIAS = "database"


def fill(alias: str, count: int) -> None:
    Row.objects.using(alias).bulk_create(
        Row(name=str(number), number=number) for number in range(count)
    )
    connections[alias].close()


def slow_rows(alias: str, seconds: float) -> Any:
    """Return a queryset whose SELECT takes so many seconds for each row."""
    pause = Func(
        Value(seconds), function=SLEEP[connections[alias].vendor], output_field=TextField()
    )
    return Row.objects.using(alias).annotate(pause=pause)


def numbers(chunks: Iterable[list[Row]]) -> list[int]:
    return [row.number for chunk in chunks for row in chunk]


SELECTING = {
    "mysql": "SELECT id FROM information_schema.processlist"
    f" WHERE user = '{USER}' AND info LIKE 'SELECT %SLEEP(%'",
    "postgresql": "SELECT pid FROM pg_stat_activity"
    f" WHERE usename = '{USER}' AND state = 'active' AND query LIKE 'SELECT %pg_sleep(%'",
}


def selecting(server: Server) -> list[int]:
    """Return the sessions that are reading slow rows, and not just connecting or at BEGIN."""
    return [session for (session,) in server.execute(SELECTING[server.vendor])]


@contextmanager
def killed_once(server: Server) -> Iterator[None]:
    """End the block's session in the middle of its first slow SELECT.

    A lock holds the SELECT until then, however late the end comes.
    """
    locker = administrator(ALIAS)
    locker.inc_thread_sharing()
    lock(locker)

    def kill() -> None:
        try:
            for session in wait_for(lambda: selecting(server), timeout=30, interval=0.002):
                server.kill_connection(session)
                server.wait_until_gone(session)
        finally:
            locker.close()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def lock(connection: Any) -> None:
    """Let every SELECT wait until this connection is closed."""
    if connection.vendor == "postgresql":
        connection.set_autocommit(False)
    with connection.cursor() as cursor:
        cursor.execute(LOCK_TABLE[connection.vendor])


LOCK_TABLE = {
    "mysql": "LOCK TABLES app_row WRITE",
    "postgresql": "LOCK TABLE app_row IN ACCESS EXCLUSIVE MODE",
}


@contextmanager
def guarding(alias: str, guard: bool) -> Iterator[None]:
    """Use a connection that was made with the guard on or off."""
    with override_settings(DBHEALTH={"GUARD": guard}):
        renew(alias)
        yield
    renew(alias)


def renew(alias: str) -> None:
    connections[alias].close()
    del connections[alias]


GUARDED = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])


# A piece is read again


@GUARDED
def test_killed_while_it_selects(database: Database, guard: bool) -> None:
    """The piece is read again at half the size, which grows back afterwards."""
    with guarding(ALIAS, guard):
        fill(ALIAS, 33)
        rows = chunked_iterator(slow_rows(ALIAS, 0.02), chunk_size=16)
        with killed_once(database.server):
            chunks = list(rows.chunks())
    assert [len(chunk) for chunk in chunks] == [8, 9, 10, 6]
    assert numbers(chunks) == [*range(33)]


def test_killed_while_it_selects_one_row(database: Database) -> None:
    """A single row is read again once."""
    fill(ALIAS, 3)
    with killed_once(database.server):
        chunks = list(chunked_iterator(slow_rows(ALIAS, 0.1), chunk_size=1).chunks())
    assert numbers(chunks) == [0, 1, 2]


@GUARDED
def test_killed_in_an_instances_loop(database: Database, guard: bool) -> None:
    """Rows that were given out are not given out again."""
    with guarding(ALIAS, guard):
        fill(ALIAS, 30)
        with killed_once(database.server):
            seen = [row.number for row in chunked_iterator(slow_rows(ALIAS, 0.01), chunk_size=10)]
    assert seen == [*range(30)]


@GUARDED
def test_killed_in_async_code(database: Database, guard: bool) -> None:
    """The piece is read again, in the thread in which the ORM works."""

    async def read() -> list[int]:
        return [row.number async for row in chunked_iterator(rows, chunk_size=10)]

    with guarding(ALIAS, guard):
        fill(ALIAS, 30)
        rows = slow_rows(ALIAS, 0.01)
        with killed_once(database.server):
            assert async_to_sync(read)() == [*range(30)]


def test_cancelled_while_it_selects(database: Database) -> None:
    """A loop that is cancelled leaves nothing behind: another one goes on after its last row."""
    fill(ALIAS, 60)
    rows = chunked_iterator(slow_rows(ALIAS, 0.05), chunk_size=3)
    seen: list[int] = []

    async def read() -> None:
        async for row in rows:
            seen.append(row.number)  # noqa: PERF401 (seen is looked at meanwhile)

    async def read_twice() -> None:
        loop = asyncio.create_task(read())
        await asyncio.to_thread(wait_for, lambda: seen and selecting(database.server), timeout=30)
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
        assert seen == [*range(len(seen))]
        assert 0 < len(seen) < 60
        await read()

    async_to_sync(read_twice)()
    assert seen == [*range(60)]


TIMEOUTS: dict[str, dict[str, Any]] = {
    "mysql": {"init_command": "SET max_statement_time = 1"},
    "postgresql": {"options": "-c statement_timeout=1000"},
}


@pytest.fixture
def impatient(database: Database, add_database: Callable[..., str]) -> Callable[..., str]:
    """Add an alias whose statements may take a second."""
    settings = connections.settings[ALIAS]
    options = settings["OPTIONS"] | TIMEOUTS[database.server.vendor]
    return add_database({**settings, "OPTIONS": options})


@GUARDED
def test_timeout(impatient: str, guard: bool) -> None:
    """A piece that takes too long is read in smaller ones, on the same connection."""
    fill(ALIAS, 7)
    with guarding(impatient, guard):
        list(Row.objects.using(impatient)[:1])
        handle = connections[impatient].connection
        chunks = list(chunked_iterator(slow_rows(impatient, 0.2), chunk_size=10).chunks())
        assert connections[impatient].connection is handle
    assert numbers(chunks) == [*range(7)]
    assert max(map(len, chunks)) <= 5


def test_row_that_always_takes_too_long(impatient: str, caplog: pytest.LogCaptureFixture) -> None:
    """Half the size, half of that, and when a single row fails it is an error."""
    fill(ALIAS, 9)
    rows = chunked_iterator(slow_rows(impatient, 30), chunk_size=4)
    with (
        caplog.at_level(logging.INFO, logger="django_dbhealth.chunks"),
        pytest.raises(OperationalError) as caught,
    ):
        list(rows)
    assert "1969" in str(caught.value) or "statement timeout" in str(caught.value)
    messages = [record.getMessage() for record in caplog.records]
    assert [re.findall(r"again, (\d+) rows", message) for message in messages] == [["2"], ["1"]]
    assert {record.alias for record in caplog.records} == {impatient}  # type: ignore[attr-defined]
    assert rows.position is None


# An error is raised


def test_killed_in_a_transaction(database: Database) -> None:
    fill(ALIAS, 8)
    rows = chunked_iterator(slow_rows(ALIAS, 0.05), chunk_size=4)
    with (
        pytest.raises((OperationalError, InterfaceError)),
        killed_once(database.server),
        transaction.atomic(using=ALIAS),
    ):
        list(rows)
    assert rows.position is None


def test_timeout_in_a_transaction(impatient: str) -> None:
    """Also where the connection is fine: PostgreSQL's transaction is not."""
    fill(ALIAS, 8)
    rows = chunked_iterator(slow_rows(impatient, 0.2).select_for_update(), chunk_size=8)
    with pytest.raises(OperationalError), transaction.atomic(using=impatient):
        list(rows)


def test_killed_without_autocommit(database: Database) -> None:
    fill(ALIAS, 8)
    rows = chunked_iterator(slow_rows(ALIAS, 0.05), chunk_size=4)
    connections[ALIAS].set_autocommit(False)
    with pytest.raises((OperationalError, InterfaceError)), killed_once(database.server):
        list(rows)


LOCK = {
    "mysql": ("SELECT GET_LOCK('chunks', 0)", "lock by GET_LOCK"),
    "postgresql": ("SELECT pg_advisory_lock(31)", "advisory lock"),
}


@pytest.mark.parametrize("setting", ["raise", "warn", "ignore"])
def test_killed_with_session_state(database: Database, setting: str) -> None:
    """The program is told that its lock is gone, unless it does not want to know."""
    fill(ALIAS, 8)
    statement, name = LOCK[database.server.vendor]
    rows = chunked_iterator(slow_rows(ALIAS, 0.05), chunk_size=4)
    with override_settings(DBHEALTH={"ON_SESSION_STATE_LOSS": setting}):
        with connections[ALIAS].cursor() as cursor:
            cursor.execute(statement)
        if setting == "raise":
            with pytest.raises(OperationalError) as caught, killed_once(database.server):
                list(rows)
            assert name in str(caught.value.__notes__)
        else:
            with killed_once(database.server):
                assert numbers([list(rows)]) == [*range(8)]


def test_timeout_keeps_session_state(impatient: str) -> None:
    """The connection is there, and the lock with it: the piece is read again."""
    fill(ALIAS, 7)
    statement, _ = LOCK[connections[impatient].vendor]
    with connections[impatient].cursor() as cursor:
        cursor.execute(statement)
    assert numbers([list(chunked_iterator(slow_rows(impatient, 0.2), chunk_size=7))]) == [*range(7)]


def test_other_errors_are_raised(database: Database) -> None:
    """At once, and the connection stays as it is."""
    fill(ALIAS, 3)
    rows = chunked_iterator(Row.objects.using(ALIAS).extra(where=["nowhere > 1"]))
    connections[ALIAS].ensure_connection()
    handle = connections[ALIAS].connection
    with CaptureQueriesContext(connections[ALIAS]) as queries, pytest.raises(DatabaseError):
        list(rows)
    assert len(queries) == 1
    assert connections[ALIAS].connection is handle


@GUARDED
@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_dead_server(
    new_server: Callable[..., Server],
    add_database: Callable[..., str],
    kind: str,
    guard: bool,
) -> None:
    """It is an error at the first refused connect, and a loop after it goes on at the place."""
    server = new_server(kind)
    alias = add_database(server.django())
    refused: list[Any] = []

    def note(**arguments: Any) -> None:
        refused.append(arguments)

    connection_refused.connect(note)
    try:
        with guarding(alias, guard):
            fill(alias, 20)
            rows = chunked_iterator(Row.objects.using(alias), chunk_size=8)
            seen = []
            with pytest.raises((OperationalError, InterfaceError)):
                for row in rows:
                    seen.append(row.number)
                    if len(seen) == 3:
                        server.kill()
            assert seen == [*range(8)]
            assert len(refused) == guard
            server.start()
            seen += [row.number for row in rows]
        assert seen == [*range(20)]
    finally:
        connection_refused.disconnect(note)
    connections[alias].close()


@GUARDED
def test_server_that_takes_no_connection(
    mariadb: Server,
    add_database: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    guard: bool,
) -> None:
    """A connect that fails like a statement, with 2013, is not tried again for smaller pieces."""
    mariadb.create_database("silent")
    with Proxy(mariadb.host, mariadb.port) as proxy:
        settings = mariadb.django("silent", transport="tcp", OPTIONS={"connect_timeout": 4})
        alias = add_database({**settings, "PORT": str(proxy.port)})
        with guarding(alias, guard):
            Row.objects.using(alias).all().delete()
            fill(alias, 20)
            chunks = chunked_iterator(Row.objects.using(alias), chunk_size=8).chunks()
            assert len(next(chunks)) == 8
            proxy.accept_silently()
            proxy.cut()
            with (
                caplog.at_level(logging.INFO, logger="django_dbhealth.chunks"),
                pytest.raises(OperationalError, match="2013"),
            ):
                next(chunks)
            proxy.pass_through()
    again = [record for record in caplog.records if record.name == "django_dbhealth.chunks"]
    assert len(again) <= 1


# A slow loop


def test_slow_loop(new_server: Callable[..., Server], add_database: Callable[..., str]) -> None:
    """The pieces come although the server loses its patience; the rows of an SSCursor do not."""
    server = new_server("mariadb", wait_timeout=1, net_write_timeout=1)
    alias = add_database(server.django())
    count = 100_000
    server.execute(
        f"INSERT INTO app_row SELECT seq, REPEAT('x', 100), seq FROM seq_1_to_{count}",
        database="test",
    )

    def work(chunks: Iterable[Any]) -> int:
        """Take 3 s for each of the first two pieces."""
        done = 0
        for number, rows in enumerate(chunks):
            done += len(rows)
            if number < 2:
                time.sleep(3)
        return done

    assert work(chunked_iterator(Row.objects.using(alias), chunk_size=40_000).chunks()) == count
    unbuffered = MySQLdb.connect(
        unix_socket=str(server.socket),
        user=USER,
        password=PASSWORD,
        database="test",
        cursorclass=MySQLdb.cursors.SSCursor,
        init_command="SET SESSION wait_timeout = 60",  # net_write_timeout ends the read
    )
    with closing(unbuffered):
        cursor = unbuffered.cursor()
        cursor.execute("SELECT id, name, number FROM app_row")
        with pytest.raises(MySQLdb.OperationalError) as caught:
            work(iter(lambda: cursor.fetchmany(40_000), ()))
    assert caught.value.args[0] == 2013


# Faults at random moments


class Chaos:
    """A thread that makes so many faults, one after the other, at random moments."""

    def __init__(self, server: Server, proxy: Proxy, faults: int) -> None:
        self._server, self._proxy = server, proxy
        self._left = faults
        self._random = random.Random(faults)
        self.made: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._left = 0
        self._thread.join()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._left > 0:
            time.sleep(self._random.uniform(0.02, 0.15))
            if self._left % 2:  # every other one while a piece is read
                wait_for(lambda: selecting(self._server), timeout=60, interval=0.002)
            fault = self._random.choice([self._restart, self._proxy.cut, self._proxy.reset])
            fault()
            self.made.append(fault.__name__)
            self._left -= 1

    def _restart(self) -> None:
        self._server.kill()
        self._server.start()


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        pytest.param("mariadb", "django.db.backends.mysql", id="mysqlclient"),
        pytest.param("mariadb", "tests.pymysql_backend", id="PyMySQL"),
        pytest.param("postgresql", "django.db.backends.postgresql", id="psycopg"),
    ],
)
def test_random_faults(
    new_server: Callable[..., Server],
    add_database: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    engine: str,
) -> None:
    """The server killed and restarted, the wire cut: every row comes exactly once, in order.

    Ten faults; 200 with --hypothesis-profile=thorough.
    """
    faults = settings.default.max_examples // 10
    server = new_server(kind)
    count, loops = 300, 0
    with Proxy(server.host, server.port) as proxy:
        address = {"ENGINE": engine, "HOST": proxy.host, "PORT": str(proxy.port)}
        # PyMySQL reads all certificates at each connect: 70 ms.
        options = {"ssl_disabled": True} if engine == "tests.pymysql_backend" else {}
        alias = add_database({**server.django(transport="tcp", OPTIONS=options), **address})
        fill(alias, count)
        with (
            override_settings(DBHEALTH={"CONNECT_RETRY_TIMEOUT": 60}),
            caplog.at_level(logging.INFO, logger="django_dbhealth.chunks"),
            Chaos(server, proxy, faults) as chaos,
        ):
            while not chaos.is_over:
                rows = chunked_iterator(slow_rows(alias, 0.001), chunk_size=32)
                assert [row.number for row in rows] == [*range(count)]
                loops += 1
        connections[alias].close()
    assert len(chaos.made) == faults
    again = [record for record in caplog.records if record.name == "django_dbhealth.chunks"]
    print(f"{engine}: {faults} faults, {len(again)} pieces read again, {loops} loops")
    assert again


# Others write meanwhile


KEY = st.integers(1, 30)
CHANGES = st.lists(st.tuples(st.sampled_from(["insert", "delete"]), KEY), max_size=3)


class Table:
    """A table whose rows come and go, changed on a connection of its own."""

    def __init__(self) -> None:
        self.connection = connections[ALIAS].copy()
        self.now: set[int] = set()
        self.cursor = self.connection.cursor()

    def begin(self, keys: set[int]) -> None:
        self.cursor.execute("DELETE FROM app_row")
        self.now, self.ever, self.throughout = set(), set(), set(keys)
        for key in keys:
            self.insert(key)

    def insert(self, key: int) -> None:
        if key not in self.now:
            sql = "INSERT INTO app_row (id, name, number) VALUES (%s, %s, %s)"
            self.cursor.execute(sql, [key, "", key % 3])
            self.now.add(key)
            self.ever.add(key)

    def delete(self, key: int) -> None:
        self.cursor.execute("DELETE FROM app_row WHERE id = %s", [key])
        self.now.discard(key)
        self.throughout.discard(key)


@pytest.fixture
def table(database: Database) -> Iterator[Table]:
    table = Table()
    yield table
    table.cursor.close()
    table.connection.close()


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    keys=st.sets(KEY),
    size=st.integers(1, 8),
    order_by=st.sampled_from([["id"], ["-id"], ["number", "id"], ["-number", "id"]]),
    rounds=st.lists(CHANGES, max_size=30),
)
def test_concurrent_changes(
    table: Table, keys: set[int], size: int, order_by: list[str], rounds: list[Any]
) -> None:
    """What exists throughout comes exactly once, in order; what never existed does not come."""
    table.begin(keys)
    rows = chunked_iterator(Row.objects.using(ALIAS), chunk_size=size, order_by=order_by)
    seen = []
    changes = iter(rounds)
    for row in rows:
        seen.append((row.number, row.pk))
        for change, key in next(changes, []):
            getattr(table, change)(key)
    assert seen == sorted(set(seen), key=lambda row: place(row, order_by))
    found = {key for _, key in seen}
    assert table.throughout <= found <= table.ever


def place(row: tuple[int, int], order_by: list[str]) -> list[int]:
    values = dict(zip(["number", "id"], row, strict=True))
    return [-values[name[1:]] if name[0] == "-" else values[name] for name in order_by]
