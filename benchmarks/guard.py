"""Measure what the guard costs: guarded against plain connections, as ratios within one run.

Run by hand; benchmarks/README.md says how, and what each number means. Servers of its own are
started and removed.

Why not pyperf's own Runner: it measures one benchmark after the other, each in processes of its
own. Two such measurements of the very same query differ by several per cent on a shared machine,
more than what is looked for here. So each comparison is made inside one process, by turns: a block
of queries on the first connection, two on the second, one on the first, and so on. Whatever slows
the machine for longer than some milliseconds slows both. Clock, metadata and file format are
pyperf's.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from unittest.mock import patch

import django
import pyperf
from django.apps import apps
from django.conf import settings
from django.db import Error, connections
from django.db.models.expressions import RawSQL

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from django_dbhealth import wrappers  # noqa: E402
from tests.servers import MariaDBServer, PostgreSQLServer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from tests.servers import Server

    Block = Callable[[int], float]  # makes so many queries, returns the seconds that they took
    Maker = Callable[[BaseDatabaseWrapper, Server], Block]
    Results = dict[tuple[str, str], "Result"]  # by server and case

SERVERS: dict[str, type[Server]] = {"MariaDB": MariaDBServer, "PostgreSQL": PostgreSQLServer}
DRIVERS = {"MariaDB": "mysqlclient", "PostgreSQL": "psycopg"}
# Django's aliases are SERVER_SIDE. Two plain ones: what is compared needs a connection each.
GUARDED, PLAIN, OTHER = "guarded", "plain", "other"
SIDES = (GUARDED, PLAIN, OTHER)

ROWS = 1000
LONG_TEXT = 50_000  # characters
CONFIDENCE = 0.95
MARKERS = "<!-- results -->", "<!-- /results -->"


# What is measured


def orm_query(connection: BaseDatabaseWrapper, server: Server) -> Block:
    return timed(getter(connection))


def getter(connection: BaseDatabaseWrapper) -> Callable[[], object]:
    """Return what gets one object by its primary key."""
    return partial(apps.get_model("app", "Row").objects.db_manager(connection.alias).get, pk=1)


def new_orm_query(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Get one object with SQL that no one has seen before."""
    rows = apps.get_model("app", "Row").objects.db_manager(connection.alias)
    return timed(lambda: rows.annotate(number_of_query=RawSQL(str(next(numbers)), ())).get(pk=1))


def timed(query: Callable[[], object]) -> Block:
    def block(count: int) -> float:
        begun = pyperf.perf_counter()
        for _ in itertools.repeat(None, count):
            query()
        return pyperf.perf_counter() - begun

    return block


def raw_query(connection: BaseDatabaseWrapper, new_text: Callable[[], str]) -> Block:
    """Run texts that no one has seen before, each on a cursor of its own."""

    def block(count: int) -> float:
        texts = [new_text() for _ in range(count)]
        begun = pyperf.perf_counter()
        for text in texts:
            with connection.cursor() as cursor:
                cursor.execute(text)
                cursor.fetchall()
        return pyperf.perf_counter() - begun

    return block


numbers = itertools.count(1)


def new_sql(connection: BaseDatabaseWrapper, server: Server) -> Block:
    def text() -> str:
        number = next(numbers)
        return f"SELECT name FROM app_row WHERE id = {number % ROWS + 1} /* {number} */"

    return raw_query(connection, text)


def long_sql(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Run texts of 50 kB, most of it names with underscores in an IN list."""
    return raw_query(
        connection, long_text("north_warehouse/aisle_07/left_shelf_{:06}/box_12_of_40")
    )


def long_prose(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Likewise, with characters in the literals that would mean something outside of them."""
    return raw_query(
        connection, long_text("{:06} <first.last@example.com> &amp; all of the others")
    )


def long_text(literal: str) -> Callable[[], str]:
    """Return a maker of such texts. The row is found by its id, so most of the work is to read.

    From 1,000 literals on MariaDB would make a temporary table of them.
    """
    count = LONG_TEXT // len(f"'{literal.format(0)}', ")
    literals = ", ".join(f"'{literal.format(number)}'" for number in range(count))

    def text() -> str:
        number = next(numbers)
        return (
            f"SELECT name FROM app_row WHERE id = {number % ROWS + 1}"
            f" AND name NOT IN ({literals}) /* {number} */"
        )

    return text


def pinged_query(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Ask the server for a sign of life before every query."""
    get = getter(connection)

    def query() -> None:
        connection.is_usable()
        get()

    return timed(query)


def connected_query(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Connect for every query, as CONN_MAX_AGE=0 does for one request."""
    get = getter(connection)

    def query() -> None:
        connection.close()
        get()

    return timed(query)


def query_after_loss(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Only the query is timed, not the killing of the session before it."""

    def prepare() -> None:
        server.wait_until_gone(lose(connection, server))

    return prepared_query(connection, server, prepare)


def query_after_close(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Do what a program without the guard would: close the lost connection, then make the query.

    The query is timed, and the connect with it; the close is not. What comes right before the
    query is the same for both, so that the processor's caches hold the same.
    """

    def prepare() -> None:
        session = lose(connection, server)
        connection.close()
        server.wait_until_gone(session)

    return prepared_query(connection, server, prepare)


def lose(connection: BaseDatabaseWrapper, server: Server) -> int:
    """Let the server end the connection's session; return which one it was."""
    sql = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor])
        (session,) = cursor.fetchone()
    server.kill_connection(session)
    server.wait_until_gone(session)
    return int(session)


def prepared_query(
    connection: BaseDatabaseWrapper, server: Server, prepare: Callable[[], None]
) -> Block:
    query = orm_query(connection, server)

    def block(count: int) -> float:
        seconds = 0.0
        for _ in range(count):
            prepare()
            seconds += query(1)
        return seconds

    return block


def connect(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Connect, as far from the program's own code as a query of the ORM is."""

    def block(count: int) -> float:
        seconds = 0.0
        for _ in range(count):
            connection.close()
            begun = pyperf.perf_counter()
            at_depth(ORM_DEPTH, connection.ensure_connection)
            seconds += pyperf.perf_counter() - begun
        return seconds

    return block


def connect_unnoted(connection: BaseDatabaseWrapper, server: Server) -> Block:
    """Connect without the entry for open_connections()."""
    block = connect(connection, server)

    def unnoted(count: int) -> float:
        with (
            patch.object(wrappers, "find_opener", nothing),
            patch.object(wrappers, "note_opened", nothing),
        ):
            return block(count)

    return unnoted


def nothing(*args: object) -> None:
    pass


ORM_DEPTH = 10  # frames, as between the program's line and the connect in objects.create()


def at_depth(depth: int, function: Callable[[], object]) -> None:
    """Call a function from so many frames of Django's ORM."""
    source = "def call(n, function):\n    return call(n - 1, function) if n else function()"
    if not djangos:
        exec(compile(source, str(Path(django.__file__).parent / "db" / "x.py"), "exec"), djangos)
    djangos["call"](depth, function)


djangos: dict[str, Callable[..., object]] = {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two ways to do the same: the ratio is that of the first's time to the second's."""

    title: str
    first: tuple[Maker, str]  # and the side whose connection it takes
    second: tuple[Maker, str]
    target: float | None = None  # the most that the ratio may be
    block: int  # queries
    rounds: int  # of four blocks
    connects: bool = False  # it opens sessions, so each side needs its own


# Blocks of some milliseconds: a turn costs the interpreter the shortcuts that it has taken for the
# other's classes, and it finds them anew only after dozens of queries.
CASES = {
    "orm": Case(
        title="healthy ORM query, guarded / plain",
        first=(orm_query, GUARDED),
        second=(orm_query, PLAIN),
        target=1.03,
        block=50,
        rounds=8,
    ),
    "new": Case(
        title="ORM query of SQL never seen before, guarded / plain",
        first=(new_orm_query, GUARDED),
        second=(new_orm_query, PLAIN),
        target=1.03,
        block=50,
        rounds=8,
    ),
    "raw": Case(
        title="60 characters of raw SQL never seen before, guarded / plain",
        first=(new_sql, GUARDED),
        second=(new_sql, PLAIN),
        block=100,
        rounds=10,
    ),
    "long": Case(
        title="50 kB of raw SQL never seen before, guarded / plain",
        first=(long_sql, GUARDED),
        second=(long_sql, PLAIN),
        target=1.03,
        block=10,
        rounds=10,
    ),
    "prose": Case(
        title="the same with e-mail addresses and HTML in it",
        first=(long_prose, GUARDED),
        second=(long_prose, PLAIN),
        block=10,
        rounds=5,
    ),
    "loss": Case(
        title="first query after a loss / connect and query",
        first=(query_after_loss, GUARDED),
        second=(query_after_close, PLAIN),
        target=1.05,
        block=1,
        rounds=24,
        connects=True,
    ),
    "noted": Case(
        title="a connect, noted for open_connections() / not noted",
        first=(connect, GUARDED),
        second=(connect_unnoted, GUARDED),
        target=1.02,
        block=20,
        rounds=20,
        connects=True,
    ),
    "ping": Case(
        title="for comparison: ping before every query / plain",
        first=(pinged_query, OTHER),
        second=(orm_query, PLAIN),
        block=50,
        rounds=3,
    ),
    "connect": Case(
        title="for comparison: connect for every query / plain",
        first=(connected_query, OTHER),
        second=(orm_query, PLAIN),
        block=10,
        rounds=3,
        connects=True,
    ),
    "control": Case(
        title="control: the same ORM query, plain / plain",
        first=(orm_query, OTHER),
        second=(orm_query, PLAIN),
        block=50,
        rounds=8,
    ),
}


# The worker: one process that measures the cases by turns


def configure(servers: dict[str, Server]) -> None:
    """Set up Django with three connections to each server, one of them guarded."""
    aliases = {
        f"{name}_{side}": (server, side) for name, server in servers.items() for side in SIDES
    }
    settings.configure(
        SECRET_KEY="only-for-benchmarks",
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=["django_dbhealth", "tests.app"],
        DATABASES={
            "default": {},
            **{alias: server.django() for alias, (server, _) in aliases.items()},
        },
        DBHEALTH={
            "DATABASES": {alias: {"GUARD": side == GUARDED} for alias, (_, side) in aliases.items()}
        },
    )
    django.setup()
    for alias, (server, side) in aliases.items():
        kind = type(connections[alias])
        is_djangos = kind.__mro__[0] is sys.modules[f"{server.engine}.base"].DatabaseWrapper
        assert is_djangos is (side != GUARDED), f"{alias} is a {kind}"


def address_of(server: Server) -> tuple[str, int]:
    return str(server.directory), server.port


def servers_at(addresses: dict[str, tuple[str, int]]) -> dict[str, Server]:
    """Return what is needed to use servers that another process has started."""
    servers = {}
    for name, (directory, port) in addresses.items():
        servers[name] = SERVERS[name](Path(directory))
        servers[name].port = port
    return servers


def name_of(server: str, case: str, side: str) -> str:
    return f"{server}, {case}, {side}"


FIRST, SECOND = "first", "second"


def work(options: argparse.Namespace) -> None:
    """Measure each case on so many pairs of connections, all cases by turns."""
    task = json.loads(options.worker)
    servers = servers_at(task["servers"])
    configure(servers)
    todo = [(name, case) for name in servers for case in task["cases"]]
    runs: dict[str, list[pyperf.Run]] = {}
    for _ in range(task["pairs"]):
        for name, case in random.sample(todo, len(todo)):
            try:
                times = measure(CASES[case], name, servers[name])
            except Error as error:  # not healed, for one
                todo.remove((name, case))
                print(f"{name}, {case}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for side, values in zip((FIRST, SECOND), times, strict=True):
                key = name_of(name, case, side)
                metadata = {"name": key, "loops": CASES[case].block}
                runs.setdefault(key, []).append(pyperf.Run(values, metadata=metadata))
    if runs:
        suite = pyperf.BenchmarkSuite([pyperf.Benchmark(each) for each in runs.values()])
        suite.dump(str(options.json), replace=True)


def measure(case: Case, name: str, server: Server) -> tuple[list[float], list[float]]:
    """Return the seconds per query of both ways, one number per round; the rounds are pairs."""
    sides = [(maker, connections[f"{name}_{side}"]) for maker, side in (case.first, case.second)]
    with ExitStack() as stack:
        for _, connection in sides:
            connection.ensure_connection()
            stack.callback(connection.close)
        if not case.connects:
            share_session(*(connection for _, connection in sides))
            stack.callback(setattr, sides[1][1], "connection", None)
        first, second = (maker(connection, server) for maker, connection in sides)
        for block in (first, second):
            block(case.block)  # warm
        gc.collect()
        gc.disable()  # as timeit does: a collection would hit one of the two by chance
        stack.callback(gc.enable)
        return rounds_of(first, second, case.block, case.rounds)


def share_session(first: BaseDatabaseWrapper, second: BaseDatabaseWrapper) -> None:
    """Let the second use the first's session in place of its own.

    The server answers one session faster than another, depending on the cores that the two
    processes are on: measured on two sessions, the same query differed by up to a half.
    """
    second.connection.close()
    second.connection = first.connection


def rounds_of(
    first: Block, second: Block, count: int, rounds: int
) -> tuple[list[float], list[float]]:
    firsts, seconds = [], []
    for number in range(rounds):
        if number % 2:
            b1, a1, a2, b2 = second(count), first(count), first(count), second(count)
        else:
            a1, b1, b2, a2 = first(count), second(count), second(count), first(count)
        firsts.append((a1 + a2) / (2 * count))
        seconds.append((b1 + b2) / (2 * count))
    return firsts, seconds


# What it means


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case on one server; times in seconds."""

    server: str
    case: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    queries: int  # on each side

    @property
    def is_missed(self) -> bool:
        target = CASES[self.case].target
        return target is not None and round(self.ratio, 3) > target

    @property
    def in_words(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def result_of(server: str, case: str, suite: pyperf.BenchmarkSuite) -> Result | None:
    """Take the median of the rounds' ratios for each pair of connections, then that of the pairs.

    The interval is a bootstrap's over the pairs: the rounds on one pair of connections have their
    session in common, and are no independent measurements.
    """
    try:
        first, second = (
            suite.get_benchmark(name_of(server, case, side)) for side in (FIRST, SECOND)
        )
    except KeyError:
        return None
    ratios = [
        median(a / b for a, b in zip(one.values, other.values, strict=True))
        for one, other in zip(first.get_runs(), second.get_runs(), strict=True)
    ]
    low, high = interval_of(ratios)
    return Result(
        server=server,
        case=case,
        first=first.median(),
        second=second.median(),
        ratio=median(ratios),
        low=low,
        high=high,
        queries=sum(2 * CASES[case].block * len(run.values) for run in first.get_runs()),
    )


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the confidence interval of a median."""
    choose = random.Random(len(values)).choices
    medians = sorted(median(choose(values, k=len(values))) for _ in range(2000))
    margin = round(len(medians) * (1 - CONFIDENCE) / 2)
    return medians[margin], medians[-1 - margin]


# The report


def microseconds(value: float) -> str:
    return f"{value * 1e6:,.0f}" if value >= 1e-4 else f"{value * 1e6:.1f}"


def table(results: Results, names: Sequence[str], cases: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a Markdown table, one row a case, two columns a server."""
    columns = ["", "at most"]
    for name in names:
        columns += [f"{name}: µs", "ratio"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    for case in cases:
        target = CASES[case].target
        cells = [CASES[case].title, f"{target:.2f}" if target else "-"]
        for name in names:
            result = results.get((name, case))
            cells += (
                [f"{microseconds(result.first)} / {microseconds(result.second)}", result.in_words]
                if result
                else ["-", "failed"]
            )
        yield f"| {' | '.join(cells)} |"


def report(
    results: Results, suite: pyperf.BenchmarkSuite, names: Sequence[str], cases: Sequence[str]
) -> str:
    queries = [result.queries for result in results.values()]
    few, many = min(queries), max(queries)
    lines = [
        *table(results, names, cases),
        "",
        f"Measured on {time.strftime('%Y-%m-%d')} with {', '.join(surroundings(suite, names))}.",
        f"Each number stands for {few:,} to {many:,} queries a side; in parentheses the",
        f"{CONFIDENCE:.0%} confidence interval.",
    ]
    return "\n".join(lines) + "\n"


def surroundings(suite: pyperf.BenchmarkSuite, names: Iterable[str]) -> Iterator[str]:
    metadata = suite.get_metadata()
    yield f"django-dbhealth {version('django-dbhealth')}"
    yield f"Django {django.get_version()}"
    yield f"Python {metadata.get('python_version', '').partition(' ')[0]}"
    for name in names:
        with connections[f"{name}_{PLAIN}"].cursor() as cursor:
            cursor.execute("SELECT VERSION()")
            (text,) = cursor.fetchone()
        number = re.search(r"\d+(\.\d+)+", text)
        yield f"{name} {number[0] if number else text}"
        yield f"{DRIVERS[name]} {version(DRIVERS[name])}"
    yield f"{metadata.get('cpu_model_name', 'unknown CPU')} ({metadata.get('cpu_count')} cores)"
    yield metadata.get("platform", "")


def write_between_markers(page: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    before, begin, rest = page.read_text().partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not end:
        sys.exit(f"{page} has no place for the results, {markers[0]} and {markers[1]}.")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


# The command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a quick look: wide intervals")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--output", type=Path, help="a Markdown page to write the table into")
    parser.add_argument("--json", type=Path, help="a file to keep all times in, pyperf's format")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; repeatable")
    parser.add_argument("--server", action="append", choices=SERVERS, help="only this one")
    parser.add_argument("--processes", type=int, help="how many, one after the other")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output and (options.fast or options.case or options.server or options.processes):
        parser.error("--output is for complete runs.")
    return options


def main() -> int:
    options = parse()
    if options.worker:
        work(options)
        return 0
    names, cases = options.server or list(SERVERS), options.case or list(CASES)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(SERVERS[name]()) for name in names}
        configure(servers)
        make_rows(names)
        stack.callback(connections.close_all)
        suite = run(options, servers, cases)
        results = {
            (name, case): result
            for case in cases
            for name in names
            if (result := result_of(name, case, suite))
        }
        text = report(results, suite, names, cases)
    print(text)
    if options.json:
        suite.dump(str(options.json), replace=True)
    if options.output:
        write_between_markers(options.output, text)
    return judge(results, names, cases) if options.check else 0


def make_rows(names: Iterable[str]) -> None:
    row = apps.get_model("app", "Row")
    for name in names:
        connection = connections[f"{name}_{PLAIN}"]
        with connection.schema_editor() as editor:
            editor.create_model(row)
        row.objects.using(connection.alias).bulk_create(
            row(name=f"name {number}", number=number) for number in range(ROWS)
        )
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE TABLE app_row" if connection.vendor == "mysql" else "ANALYZE")
        connection.close()


def run(
    options: argparse.Namespace, servers: dict[str, Server], cases: Sequence[str]
) -> pyperf.BenchmarkSuite:
    """Let one process after the other measure; return what all have found."""
    # Each new process has its own hash seed and its own layout of memory.
    processes = options.processes or (2 if options.fast else 5)
    task = {
        "servers": {name: address_of(server) for name, server in servers.items()},
        "cases": cases,
        "pairs": 3 if options.fast else 6,
    }
    suites = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(processes):
            file = Path(directory) / f"{number}.json"
            command = [sys.executable, __file__, "--worker", json.dumps(task), "--json", str(file)]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "random"})
            if file.exists():
                suites.append(pyperf.BenchmarkSuite.load(str(file)))
            print(f"Process {number + 1} of {processes} has ended.", file=sys.stderr)
    if not suites:
        sys.exit("Nothing could be measured.")
    for suite in suites[1:]:
        suites[0].add_runs(suite)
    return suites[0]


def judge(results: Results, names: Sequence[str], cases: Sequence[str]) -> int:
    """Say which targets are missed; return the exit status."""
    missed = [
        f"{name}: {CASES[case].title}"
        for case in cases
        for name in names
        if ((name, case) not in results or results[name, case].is_missed)
    ]
    for line in missed:
        print(f"Missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
