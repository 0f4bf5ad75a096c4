"""Random kills while a program writes: what it is told and what is stored, compared row by row.

A run kills some 150 connections for each driver; the whole of it, when dbapi.py or the guard is
changed, 2,000:

    scripts/test tests/test_dbapi_kills.py --hypothesis-profile=thorough -s
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis
import MySQLdb
import psycopg
import pytest

from django_dbhealth import Outcome, classify
from django_dbhealth.dbapi import Connection, InterfaceError
from tests.faults import DRIVERS
from tests.servers.base import ADMIN, PASSWORD, USER, wait_for
from tests.test_neighbours import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Server

INSERT = "INSERT INTO ledger (number, part) VALUES (%s, %s)"
FEW = 150


def kills() -> int:
    """Return how many connections are to be killed: hypothesis's profile says it."""
    thorough = hypothesis.settings.get_current_profile_name() == "thorough"
    return 2_000 if thorough else FEW


class Killer:
    """An administrator who kills the program's connections, at random moments."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.killed = 0
        connect = self._mysql if server.vendor == "mysql" else self._postgresql
        self.handle: Any = connect()

    def _mysql(self) -> Any:
        return MySQLdb.connect(
            unix_socket=str(self.server.socket), user=ADMIN, password=PASSWORD, autocommit=True
        )

    def _postgresql(self) -> Any:
        return psycopg.connect(
            host=str(self.server.socket),
            port=self.server.port,
            user=ADMIN,
            dbname="postgres",
            autocommit=True,
        )

    def kill(self) -> None:
        """Kill the connections that there are, after a moment."""
        time.sleep(self.random.uniform(0, 0.004))
        with closing(self.handle.cursor()) as cursor:
            cursor.execute(LIST[self.server.vendor], [USER])
            for (session,) in cursor.fetchall():
                with suppress(MySQLdb.OperationalError):  # 1094: it has gone by itself
                    cursor.execute(KILL[self.server.vendor], [session])
                    self.killed += 1

    def close(self) -> None:
        self.handle.close()


LIST = {
    "mysql": "SELECT id FROM information_schema.processlist WHERE user = %s",
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = %s",
}
KILL = {"mysql": "KILL %s", "postgresql": "SELECT pg_terminate_backend(%s)"}


@dataclass
class Ledger:
    """What the program was told of each number: all its parts stay, none does, nobody knows."""

    told: dict[int, str] = field(default_factory=dict)
    parts: dict[int, int] = field(default_factory=dict)

    def write(self, db: Connection, number: int, *, parts: int) -> None:
        self.parts[number] = parts
        try:
            if parts == 1:
                db.query(INSERT, [number, 0])
            else:
                with db.transaction():
                    for part in range(parts):
                        db.query(INSERT, [number, part])
        except InterfaceError:
            raise
        except Exception as error:
            fault = classify(error)
            if fault is None:  # nothing but losses may happen here
                raise
            unknown = fault.outcome is Outcome.UNKNOWN
            self.told[number] = "unknown" if unknown else "not stored"
        else:
            self.told[number] = "stored"

    def check(self, rows: list[tuple[int, int]]) -> Counter[str]:
        """Compare with the rows; return how often what was told, and what unknown ones became."""
        assert Counter(rows).most_common(1)[0][1] == 1  # none is there twice
        stored = Counter(number for number, _ in rows)
        assert stored.keys() <= self.told.keys()
        counts: Counter[str] = Counter()
        for number, told in self.told.items():
            allowed = {
                "stored": {self.parts[number]},
                "not stored": {0},
                "unknown": {0, self.parts[number]},
            }
            assert stored[number] in allowed[told], (number, told, stored[number])
            counts[told] += 1
            if told == "unknown":
                counts["unknown, and stored"] += stored[number] > 0
        return counts


@pytest.fixture
def server(request: pytest.FixtureRequest, new_server: Any) -> Server:
    server: Server = new_server(request.param)
    server.execute("CREATE TABLE ledger (number INT, part INT)", database="test")
    if server.vendor == "postgresql":
        server.execute(f"GRANT ALL ON ledger TO {USER}", database="test")
    return server


def run_under_fire(
    killer: Killer, count: int, write: Callable[[int], None], close: Callable[[], None]
) -> int:
    """Call write(0), write(1) and so on, until so many connections have been killed."""
    stop, failed = threading.Event(), []
    written = 0

    def work() -> None:
        nonlocal written
        try:
            while not stop.is_set():
                write(written)
                written += 1
            close()
        except BaseException as error:
            failed.append(error)
            stop.set()

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60 + count / 10
    while killer.killed < count and not stop.is_set() and time.monotonic() < deadline:
        killer.kill()
    before = written
    try:
        wait_for(lambda: stop.is_set() or written > before + 1, message="Nothing can be written.")
    finally:
        stop.set()
        thread.join(60)
    if failed:
        raise failed[0]
    assert killer.killed >= count
    return written


@pytest.mark.parametrize(
    ("server", "name"),
    [
        pytest.param("mariadb", "mysqlclient", id="mysqlclient"),
        pytest.param("mariadb", "PyMySQL", id="PyMySQL"),
        pytest.param("postgresql", "psycopg", id="psycopg"),
    ],
    indirect=["server"],
)
def test_connection(name: str, server: Server) -> None:
    """Nothing is written twice or lost without a word, half of it in transactions."""
    module, ledger = __import__(DRIVERS[name].module), Ledger()
    database = {"database" if server.vendor == "mysql" else "dbname": "test"}
    account = {"user": USER, "password": PASSWORD, "connect_timeout": 10, **database}
    if name == "PyMySQL":
        account["ssl_disabled"] = True  # it reads all certificates at each connect: 70 ms
    db = Connection(lambda: module.connect(host=server.host, port=server.port, **account))
    pause = random.Random(2)

    def write(number: int) -> None:
        ledger.write(db, number, parts=1 + number % 3)
        if number % 10 == 0:
            time.sleep(pause.uniform(0, 0.005))  # so that some are killed while they are idle

    with closing(Killer(server, seed=1)) as killer:
        run_under_fire(killer, kills(), write, db.close)
    rows = server.execute("SELECT number, part FROM ledger", database="test")
    counts = ledger.check(rows)
    print(f"{name}: {killer.killed} kills, {len(ledger.told)} times written: {dict(counts)}")
    assert counts["stored"] > 0
    assert counts["not stored"] + counts["unknown"] > 0


@pytest.mark.parametrize("server", ["mariadb"], indirect=True)
def test_usual_snippet(server: Server) -> None:
    """The query() that connects again writes some rows twice."""
    account = {"host": server.host, "port": server.port, "user": USER, "password": PASSWORD}
    numbers: list[Any] = []

    def write(number: int) -> None:
        with suppress(MySQLdb.Error):  # killed when it had just connected again
            db.query(INSERT, [number, 0])

    def close() -> None:
        with suppress(MySQLdb.Error):
            db.conn.close()

    for seed in range(20):  # on a busy machine a kill seldom hits between a commit and its answer
        server.execute("DELETE FROM ledger", database="test")
        db = load("class DB", account=account | {"database": "test"})["db"]
        with closing(Killer(server, seed=seed)) as killer:
            written = run_under_fire(killer, kills(), write, close)
        sql = "SELECT number FROM ledger GROUP BY number HAVING COUNT(*) > 1"
        numbers = server.execute(sql, database="test")
        print(f"DB.query(): {killer.killed} kills, {written} rows written, {len(numbers)} twice")
        if numbers:
            break
    assert numbers
