"""Measure how fast large tables are read, and in how much memory.

Run by hand; benchmarks/README.md says how, and what each number means. A MariaDB of its own is
started and removed. Each way to read a table has a process of its own, so that its peak of memory
is its own; the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django
from django.apps import apps
from django.conf import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from guard import write_between_markers  # noqa: E402

from tests.servers import MariaDBServer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from django.db.models import QuerySet

TARGET_RATIO = 0.95  # of the rows per second, on the narrow table
TARGET_MEMORY = 100  # MiB above the start
MARKERS = "<!-- chunks -->", "<!-- /chunks -->"
DATABASE = "test"


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: str
    rows: int
    values: str  # of one row, whose number is {seq}


TABLES = {
    "narrow": Table(
        title="3 million narrow rows",
        columns="name VARCHAR(100) NOT NULL, number INT NOT NULL",
        rows=3_000_000,
        values="CONCAT('name ', {seq}), {seq}",
    ),
    "wide": Table(
        title="200,000 rows of 10 kB",
        columns="name TEXT NOT NULL, number INT NOT NULL",
        rows=200_000,
        values="REPEAT(CHAR(97 + {seq} % 26), 10000), {seq}",
    ),
}


# The ways to read one


def in_pieces(rows: QuerySet[Any], **options: int) -> Iterable[Any]:
    from django_dbhealth import chunked_iterator

    return chunked_iterator(rows, **options)


def with_iterator(rows: QuerySet[Any], **options: int) -> Iterable[Any]:
    return rows.iterator(**options)


def smartly(rows: QuerySet[Any]) -> Iterable[Any]:
    from django_mysql.models.query import SmartIterator

    return SmartIterator(rows)


WAYS: dict[str, Callable[[QuerySet[Any]], Iterable[Any]]] = {
    "`chunked_iterator()`": in_pieces,
    "`chunked_iterator(chunk_size=10_000)`": partial(in_pieces, chunk_size=10_000),
    "`.iterator()`": with_iterator,
    "`.iterator(chunk_size=10_000)`": partial(with_iterator, chunk_size=10_000),
    "django-mysql's `iter_smart()`": smartly,
}
OURS, OURS_LARGER, REFERENCE, REFERENCE_LARGER, _ = WAYS


# One process: one way, one table


def configure(server: MariaDBServer) -> None:
    settings.configure(
        SECRET_KEY="only-for-benchmarks",
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=["django_dbhealth", "tests.app"],
        DATABASES={"default": server.django(DATABASE)},
    )
    django.setup()


def work(task: dict[str, Any]) -> None:
    """Read a table and print the seconds and the MiB that it took."""
    server = MariaDBServer(Path(task["directory"]))
    configure(server)
    rows = apps.get_model("app", "Row")
    rows._meta.db_table = task["table"]
    rows.objects.exists()  # connects
    before = memory("VmRSS")
    begun = time.perf_counter()
    found = 0
    for _ in WAYS[task["way"]](rows.objects.all()):
        found += 1
    seconds = time.perf_counter() - begun
    assert found == task["rows"], found
    print(json.dumps({"seconds": seconds, "memory": memory("VmHWM") - before}))


def memory(name: str) -> float:
    """Return MiB: the resident set of now (VmRSS), or its peak (VmHWM)."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


# The rounds


def make_table(server: MariaDBServer, name: str, rows: int) -> None:
    table = TABLES[name]
    server.execute(
        f"CREATE TABLE {name} (id BIGINT AUTO_INCREMENT PRIMARY KEY, {table.columns})",
        database=DATABASE,
    )
    values = table.values.format(seq="seq")
    for first in range(1, rows + 1, 5_000):
        last = first + 4_999
        server.execute(
            f"INSERT INTO {name} SELECT seq, {values} FROM seq_{first}_to_{last}",
            database=DATABASE,
        )
    server.execute(f"ANALYZE TABLE {name}", database=DATABASE)


def measure(server: MariaDBServer, table: str, way: str, rows: int) -> dict[str, float]:
    task = {"directory": str(server.directory), "table": table, "way": way, "rows": rows}
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


Measured = dict[tuple[str, str], list[dict[str, float]]]  # by table and way, one a round


def run(server: MariaDBServer, sizes: dict[str, int], rounds: int) -> Measured:
    measured: Measured = {}
    for number in range(rounds):
        for table, rows in sizes.items():
            for way in random.sample(list(WAYS), len(WAYS)):
                result = measure(server, table, way, rows)
                measured.setdefault((table, way), []).append(result)
                print(
                    f"round {number + 1}, {table}, {way}: {rows / result['seconds']:,.0f} rows/s,"
                    f" {result['memory']:,.0f} MiB",
                    file=sys.stderr,
                )
    return measured


# What it means


def ratio(measured: Measured, table: str, way: str, reference: str) -> float:
    """Return the rows per second beside those of another way."""
    return best(measured, table, reference) / best(measured, table, way)


def best(measured: Measured, table: str, way: str) -> float:
    """Return the seconds of the round that was disturbed least."""
    return min(result["seconds"] for result in measured[table, way])


def peak(measured: Measured, table: str, way: str) -> float:
    return max(result["memory"] for result in measured[table, way])


def lines(measured: Measured, sizes: dict[str, int]) -> Iterator[str]:
    columns = ["", "way", "rows/s", "ratio", "peak memory above the start"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    for table, rows in sizes.items():
        for way in WAYS:
            cells = [
                TABLES[table].title,
                way,
                f"{rows / best(measured, table, way):,.0f}",
                f"{ratio(measured, table, way, REFERENCE):.2f}",
                f"{peak(measured, table, way):,.0f} MiB",
            ]
            yield f"| {' | '.join(cells)} |"


def surroundings(server: MariaDBServer) -> Iterator[str]:
    for name in ("django-dbhealth", "Django", "django-mysql", "mysqlclient"):
        yield f"{name} {version(name)}"
    yield f"Python {platform.python_version()}"
    [[text]] = server.execute("SELECT VERSION()")
    yield f"MariaDB {text.partition('-')[0]}"
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    yield model[1] if model else "unknown CPU"


def report(server: MariaDBServer, measured: Measured, sizes: dict[str, int]) -> str:
    rounds = len(next(iter(measured.values())))
    text = [
        *lines(measured, sizes),
        "",
        f"Measured on {time.strftime('%Y-%m-%d')} with {', '.join(surroundings(server))}.",
        f"The best of {rounds} rounds; the memory is the most of all.",
    ]
    return "\n".join(text) + "\n"


def judge(measured: Measured, sizes: dict[str, int]) -> int:
    """Say which targets are missed; return the exit status."""
    missed = [
        f"{table}: {most:,.0f} MiB above the start, at most {TARGET_MEMORY}"
        for table in sizes
        if (most := peak(measured, table, OURS)) > TARGET_MEMORY
    ]
    missed += [
        f"narrow: {found:.3f} of {reference}'s rows/s, at least {TARGET_RATIO}"
        for way, reference in ((OURS, REFERENCE), (OURS_LARGER, REFERENCE_LARGER))
        if (found := ratio(measured, "narrow", way, reference)) < TARGET_RATIO
    ]
    for line in missed:
        print(f"Missed: {line}", file=sys.stderr)
    return 1 if missed else 0


# The command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a tenth of the rows")
    parser.add_argument("--rounds", type=int, default=5, help="of all ways, by turns")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--output", type=Path, help="a Markdown page to write the table into")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output and options.fast:
        parser.error("--output is for complete runs.")
    return options


def main() -> int:
    options = parse()
    if options.worker:
        work(options.worker)
        return 0
    share = 10 if options.fast else 1
    sizes = {name: table.rows // share for name, table in TABLES.items()}
    # The tables fit into the server's memory: nothing is compared but the reading.
    with MariaDBServer(innodb_buffer_pool_size="4G") as server:
        for table, rows in sizes.items():
            make_table(server, table, rows)
        measured = run(server, sizes, options.rounds)
        text = report(server, measured, sizes)
    print(text)
    if options.output:
        write_between_markers(options.output, text, MARKERS)
    return judge(measured, sizes) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
