"""Threads, async tasks and forks in a loop, on servers that restart: nothing may pile up.

Run by hand; benchmarks/README.md says how. Servers of its own are started and removed. The exit
status is 1 if sockets, threads or memory grow, or if an error comes that no restart explains.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import mmap
import os
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import django
import psutil
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.db import Error, connections, transaction

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.servers import MariaDBServer, PostgreSQLServer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Server

SERVERS: dict[str, type[Server]] = {"default": MariaDBServer, "postgresql": PostgreSQLServer}
RESTART_EVERY = 15.0  # seconds; the servers take turns
DOWN = 0.5  # seconds
PAUSE = 0.2  # seconds between rounds: it is not the speed that is looked at
SESSION_ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}


class Sample(NamedTuple):
    """What the process holds between two rounds."""

    sockets: int
    threads: int
    memory: float  # MB, resident


# Restarts, and what they explain


class Restarts:
    """One server after the other restarts. Children know of it too."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers
        self._memory = mmap.mmap(-1, 8)  # shared with forked children
        self._set_end(-math.inf)
        self.number = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def explain(self, work_began: float) -> bool:
        """Return whether a server was down at some moment since then."""
        (end,) = struct.unpack("d", self._memory[:])
        return bool(end >= work_began)

    def _set_end(self, moment: float) -> None:
        self._memory[:] = struct.pack("d", moment)

    def _run(self) -> None:
        while not self._over.wait(RESTART_EVERY):
            server = self._servers[self.number % len(self._servers)]
            self._set_end(math.inf)
            server.stop()
            time.sleep(DOWN)
            server.start()
            self._set_end(time.monotonic())
            self.number += 1


class Errors:
    """What went wrong, and whether a restart explains it."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts
        self.explained: Counter[str] = Counter()
        self.unexplained: list[str] = []

    def attempt(self, work: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            work()
        except Exception as error:  # noqa: BLE001 (each is counted, and none is forgotten)
            if isinstance(error, Error) and self._restarts.explain(began):
                self.explained[type(error).__name__] += 1
            else:
                self.unexplained.append(traceback.format_exc())


# The work


def query() -> None:
    for alias in SERVERS:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)


def in_threads(errors: Errors) -> None:
    threads = [threading.Thread(target=errors.attempt, args=[query]) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_tasks(errors: Errors) -> None:
    from django_dbhealth import close_old_connections

    bounded = close_old_connections(query)

    async def request() -> None:
        async with ThreadSensitiveContext():
            await sync_to_async(errors.attempt)(query)

    async def main() -> None:
        attempt = sync_to_async(errors.attempt)
        tasks = [attempt(bounded) for _ in range(10)]
        threads = [asyncio.to_thread(errors.attempt, query) for _ in range(5)]
        await asyncio.gather(*tasks, *threads, *(request() for _ in range(5)))

    asyncio.run(main())


def in_forks(errors: Errors) -> None:
    for alias in SERVERS:
        errors.attempt(lambda alias=alias: fork_in_a_transaction(alias, errors))


def fork_in_a_transaction(alias: str, errors: Errors) -> None:
    with transaction.atomic(alias):
        before = session_id(alias)
        for _ in range(2):
            fork(errors)
            assert session_id(alias) == before


def session_id(alias: str) -> int:
    connection = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute(SESSION_ID[connection.vendor])
        return int(cursor.fetchone()[0])


def fork(errors: Errors) -> None:
    child = os.fork()
    if not child:
        errors.unexplained.clear()
        errors.attempt(query)
        for text in errors.unexplained:
            print(text, file=sys.stderr)
        os._exit(len(errors.unexplained))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"A child ended with {status}."


# What it holds


def sample() -> Sample:
    process = psutil.Process()
    return Sample(
        sockets=len(process.net_connections("all")),
        threads=process.num_threads(),
        memory=process.memory_info().rss / 2**20,
    )


def grew(samples: list[Sample]) -> list[str]:
    """Compare the second quarter with the last: the first one is for warming up."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    verdicts = []
    for name, slack in (("sockets", 1), ("threads", 1), ("memory", 5)):
        before, after = (median(getattr(each, name) for each in part) for part in (early, late))
        word = "GREW" if after > before + slack else "flat"
        verdicts.append(f"{name}: {before:.0f} -> {after:.0f}, {word}")
    return verdicts


def run(duration: float, errors: Errors) -> tuple[list[Sample], int]:
    began, samples, rounds = time.monotonic(), [], 0
    while (elapsed := time.monotonic() - began) < duration:
        for work in (in_threads, in_tasks, in_forks):
            work(errors)
        rounds += 1
        time.sleep(PAUSE)
        samples.append(sample())
        if elapsed // 60 != (time.monotonic() - began) // 60:
            print(f"{elapsed / 60:5.1f} min, {rounds} rounds, {samples[-1]}", flush=True)
    return samples, rounds


def configure(servers: dict[str, Server]) -> None:
    settings.configure(
        DATABASES={
            alias: {**server.django(), "CONN_MAX_AGE": None} for alias, server in servers.items()
        },
        DBHEALTH={"CONNECT_RETRY_TIMEOUT": 10},
        INSTALLED_APPS=["django_dbhealth"],
        LOGGING={"version": 1, "loggers": {"django_dbhealth": {"level": "CRITICAL"}}},
        USE_TZ=True,
    )
    django.setup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    duration = parser.parse_args().minutes * 60
    servers = {alias: kind() for alias, kind in SERVERS.items()}
    try:
        for server in servers.values():
            server.start()
        configure(servers)
        restarts = Restarts(list(servers.values()))
        errors = Errors(restarts)
        restarts.start()
        try:
            samples, rounds = run(duration, errors)
        finally:
            restarts.stop()
        connections.close_all()
    finally:
        for server in servers.values():
            with suppress(OSError):
                server.remove()
    verdicts = grew(samples)
    print(f"{duration / 60:.0f} min, {rounds} rounds, {restarts.number} restarts")
    print("\n".join(verdicts))
    print(f"errors that a restart explains: {dict(errors.explained)}")
    print(f"others: {len(errors.unexplained)}", *errors.unexplained[:5], sep="\n")
    return int(bool(errors.unexplained) or any("GREW" in each for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
