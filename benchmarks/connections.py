"""Measure `dbhealth connections --format json` on thousands of sessions. Needs Linux and memory.

Run by hand; benchmarks/README.md says how. It starts a MariaDB of its own, has a few processes hold
the sessions, and runs by turns the command and a command of Django's that does nothing but the bare
query. What is compared is the time from the start of the process to its end.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.guard import write_between_markers  # noqa: E402
from tests.servers import MariaDBServer  # noqa: E402
from tests.servers.base import PASSWORD, USER  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.servers import Server

TARGET = 1.5
MARKERS = "<!-- connections -->", "<!-- /connections -->"
PROCESSES = 5

HOLD = """
import sys

import MySQLdb

port, count, user, password = sys.argv[1:]
held = [
    MySQLdb.connect(host="127.0.0.1", port=int(port), user=user, password=password)
    for _ in range(int(count))
]
print(len(held), flush=True)
sys.stdin.read()
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    peak: int  # bytes


def run(command: Sequence[str], url: str) -> Run:
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "benchmarks.connections_settings",
    }
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Run(took, usage.ru_maxrss * 1024)


def hold(stack: ExitStack, server: Server, count: int) -> None:
    """Have some processes hold sessions until the stack is left."""
    share = [count // PROCESSES] * (PROCESSES - 1)
    for number in [*share, count - sum(share)]:
        holder = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(server.port), str(number), USER, PASSWORD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(holder.kill)
        assert holder.stdout
        assert holder.stdout.readline() == f"{number}\n"


def measure(server: Server, rounds: int) -> tuple[list[Run], list[Run]]:
    """Return the runs of the command and of the bare query, by turns."""
    django = [sys.executable, "-m", "django"]
    ours = [*django, "dbhealth", "connections", "--format", "json"]
    bare = [*django, "processlist"]
    url = server.url(transport="tcp")
    run(ours, url), run(bare, url)  # warm
    pairs = [(run(ours, url), run(bare, url)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


class Figures(NamedTuple):
    """The medians of some runs."""

    sessions: int
    ours: float
    bare: float
    ratio: float
    our_peak: int
    bare_peak: int

    def row(self) -> str:
        return (
            f"| {self.sessions:,} | {self.ours:.2f} / {self.bare:.2f} | {self.ratio:.2f} |"
            f" {self.our_peak / 1e6:.0f} / {self.bare_peak / 1e6:.0f} |"
        )


def figures_of(sessions: int, ours: Sequence[Run], bare: Sequence[Run]) -> Figures:
    return Figures(
        sessions,
        median(each.seconds for each in ours),
        median(each.seconds for each in bare),
        median(one.seconds / other.seconds for one, other in zip(ours, bare, strict=True)),
        max(each.peak for each in ours),
        max(each.peak for each in bare),
    )


def report(found: Sequence[Figures], rounds: int) -> str:
    return "\n".join(
        [
            "| sessions | seconds | ratio | peak memory, MB |",
            "|---|---|---|---|",
            *(each.row() for each in found),
            "",
            f"Measured on {time.strftime('%Y-%m-%d')} with Python {sys.version.partition(' ')[0]}:",
            f"the command / the bare query, medians of {rounds} rounds.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="exit 1 if the target is missed")
    parser.add_argument("--output", type=Path, help="a Markdown page to write the table into")
    options = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    found = []
    limit = options.sessions + 1_000
    with MariaDBServer(max_connections=limit, thread_handling="pool-of-threads") as server:
        for sessions in (50, options.sessions):
            with ExitStack() as stack:
                hold(stack, server, sessions)
                found.append(figures_of(sessions, *measure(server, options.rounds)))
            server.wait_for_sessions(0, timeout=60)
    text = report(found, options.rounds)
    print(text)
    if options.output:
        write_between_markers(options.output, text, MARKERS)
    return 1 if options.check and found[-1].ratio > TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
