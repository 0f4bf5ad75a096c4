"""Measure how fast large tables are read, and in how much memory.

Run by hand; benchmarks/README.md says how, and what each number means. A MariaDB of its own is
started and removed. To read a whole table each way has a process of its own, so that its peak of
memory is its own. The ratios are found otherwise: in one process, by turns, on short parts of the
table, so that whatever slows the machine slows both.
"""

from __future__ import annotations

import argparse
import gc
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
from statistics import median
from typing import TYPE_CHECKING, Any

import django
from django.apps import apps
from django.conf import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from guard import interval_of, write_between_markers  # noqa: E402

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
    part: int  # rows that are compared at a time
    values: str  # of one row, whose number is {seq}


TABLES = {
    "narrow": Table(
        title="3 million narrow rows",
        columns="name VARCHAR(100) NOT NULL, number INT NOT NULL",
        rows=3_000_000,
        part=60_000,
        values="CONCAT('name ', {seq}), {seq}",
    ),
    "wide": Table(
        title="200,000 rows of 10 kB",
        columns="name TEXT NOT NULL, number INT NOT NULL",
        rows=200_000,
        part=10_000,
        values="REPEAT(CHAR(97 + {seq} % 26), 10000), {seq}",
    ),
}


# The ways to read one


def in_pieces(rows: QuerySet[Any], **options: int) -> Iterable[Any]:
    from django_dbhealth import chunked_iterator

    return chunked_iterator(rows, **options)


def with_iterator(rows: QuerySet[Any], *, chunk_size: int) -> Iterable[Any]:
    return rows.iterator(chunk_size=chunk_size)


def smartly(rows: QuerySet[Any]) -> Iterable[Any]:
    from django_mysql.models.query import SmartIterator

    return SmartIterator(rows)


WAYS: dict[str, Callable[[QuerySet[Any]], Iterable[Any]]] = {
    "`chunked_iterator()`": in_pieces,
    "`chunked_iterator(chunk_size=10_000)`": partial(in_pieces, chunk_size=10_000),
    "`.iterator(chunk_size=2000)`": partial(with_iterator, chunk_size=2000),
    "`.iterator(chunk_size=10_000)`": partial(with_iterator, chunk_size=10_000),
    "django-mysql's `iter_smart()`": smartly,
}
OURS, OURS_LARGER, REFERENCE, REFERENCE_LARGER, _ = WAYS
# Narrow rows are worth larger pieces, of which a wide table's would not be small.
FAST = "narrow", OURS_LARGER
WITHIN_MEMORY = [("narrow", OURS), FAST, ("wide", OURS)]
REFERENCES = {OURS_LARGER: REFERENCE_LARGER, REFERENCE_LARGER: REFERENCE_LARGER}


# One process


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
    """Do the task and print what was measured."""
    configure(MariaDBServer(Path(task["directory"])))
    model = apps.get_model("app", "Row")
    model._meta.db_table = task["table"]
    model.objects.exists()  # connects
    do = compare if "parts" in task else read_whole
    print(json.dumps(do(task, model.objects.all())))


def read_whole(task: dict[str, Any], rows: QuerySet[Any]) -> dict[str, float]:
    """Return the seconds that it takes, and the MiB above the start."""
    before = memory("VmRSS")
    seconds = time_of(task["way"], rows, task["rows"])
    return {"seconds": seconds, "memory": memory("VmHWM") - before}


def compare(task: dict[str, Any], rows: QuerySet[Any]) -> list[float]:
    """Return the ratio to the reference for each part: the one, the other twice, the one."""
    way, part = task["way"], TABLES[task["table"]].part
    reference = REFERENCES.get(way, REFERENCE)
    ratios = []
    for _ in range(task["parts"]):
        first = random.randrange(task["rows"] - part)
        there = rows.filter(pk__gt=first, pk__lte=first + part)
        own, other, again, last = (
            time_of(each, there, part) for each in (way, reference, reference, way)
        )
        ratios.append((other + again) / (own + last))
    return ratios


def time_of(way: str, rows: QuerySet[Any], expected: int) -> float:
    gc.collect()
    begun = time.perf_counter()
    found = 0
    for _ in WAYS[way](rows):
        found += 1
    seconds = time.perf_counter() - begun
    assert found == expected, found
    return seconds


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


def measure(server: MariaDBServer, table: str, way: str, rows: int, **more: int) -> Any:
    task = {"directory": str(server.directory), "table": table, "way": way, "rows": rows, **more}
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"{table}, {way}: {output.strip()[:100]}", file=sys.stderr)
    return json.loads(output)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way to read one table."""

    table: str
    way: str
    pace: float  # rows per second, in the best round
    memory: float  # MiB, in the worst
    ratios: list[float]


def run(server: MariaDBServer, sizes: dict[str, int], rounds: int, parts: int) -> list[Result]:
    todo = [(table, way) for table in sizes for way in WAYS]
    whole: dict[tuple[str, str], list[dict[str, float]]] = {each: [] for each in todo}
    ratios: dict[tuple[str, str], list[float]] = {each: [] for each in todo}
    for _ in range(rounds):
        for table, way in random.sample(todo, len(todo)):
            rows = sizes[table]
            whole[table, way].append(measure(server, table, way, rows))
            ratios[table, way] += measure(server, table, way, rows, parts=parts)
    return [
        Result(
            table=table,
            way=way,
            pace=sizes[table] / min(each["seconds"] for each in whole[table, way]),
            memory=max(each["memory"] for each in whole[table, way]),
            ratios=ratios[table, way],
        )
        for table, way in todo
    ]


# What it means


def lines(results: list[Result]) -> Iterator[str]:
    columns = ["", "way", "rows/s", "ratio", "peak memory above the start"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    for result in results:
        low, high = interval_of(result.ratios)
        cells = [
            TABLES[result.table].title,
            result.way,
            f"{result.pace:,.0f}",
            f"{median(result.ratios):.3f} ({low:.3f} to {high:.3f})",
            f"{result.memory:,.0f} MiB",
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


def report(server: MariaDBServer, results: list[Result], rounds: int) -> str:
    text = [
        *lines(results),
        "",
        f"Measured on {time.strftime('%Y-%m-%d')} with {', '.join(surroundings(server))}.",
        f"Rows a second: the best of {rounds} rounds. Memory: the worst. Ratio: the median of",
        f"{len(results[0].ratios)} parts; in parentheses its 95% confidence interval.",
    ]
    return "\n".join(text) + "\n"


def judge(results: list[Result]) -> int:
    """Say which targets are missed; return the exit status."""
    missed = []
    for result in results:
        name = f"{result.table}, {result.way}"
        if (result.table, result.way) in WITHIN_MEMORY and result.memory > TARGET_MEMORY:
            missed.append(f"{name}: {result.memory:,.0f} MiB, at most {TARGET_MEMORY}")
        ratio = median(result.ratios)
        if (result.table, result.way) == FAST and ratio < TARGET_RATIO:
            missed.append(f"{name}: {ratio:.3f} of {REFERENCE_LARGER}, at least {TARGET_RATIO}")
    for line in missed:
        print(f"Missed: {line}", file=sys.stderr)
    return 1 if missed else 0


# The command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a tenth of the rows")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, in random order")
    parser.add_argument("--parts", type=int, default=20, help="compared in each round")
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
        results = run(server, sizes, options.rounds, options.parts)
        text = report(server, results, options.rounds)
    print(text)
    if options.output:
        write_between_markers(options.output, text, MARKERS)
    return judge(results) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
