"""Task queues on a server that drops the idle after two seconds, restarts, and is full once.

Run by scripts/test --workers, on a Django that has tasks (6.0 and later).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.served import ROOT
from tests.servers.base import PASSWORD, USER, free_port, freeze, wait_for
from tests.servers.keeper import signal_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("celery", reason="scripts/test --workers installs what these tests need")

WORKERS = {
    "celery-prefork": ["celery", "prefork"],
    "celery-threads": ["celery", "threads"],
    "celery-solo": ["celery", "solo"],
    "rq": ["rq"],
    "django-tasks": ["django_tasks"],
    "apscheduler": ["apscheduler", "{start}"],
}
NUMBER, SPACING = 30, 2.3
SLOTS = 26  # for all workers of both kinds, and two more


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Start a broker; return its address."""
    program, port = shutil.which("redis-server"), free_port()
    assert program is not None, "scripts/setup workers installs redis-server."
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(20)


class Processes:
    """The processes of this test, each with its log."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = {**os.environ, **environment}
        self._stack = ExitStack()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str, plain: bool) -> subprocess.Popen[bytes]:
        log = self._directory / f"{'plain-' if plain else ''}{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**self._environment, "PLAIN_DJANGO": str(int(plain))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(end, process)
        self._started.append(process)
        return process

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all of them in the block, where they are."""
        running = [process.pid for process in self._started if process.poll() is None]
        with ExitStack() as stack:
            for pid in running:
                stack.callback(signal_all, freeze(pid), signal.SIGCONT)
            yield

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")

    def run(self, name: str, *command: str, plain: bool = False) -> None:
        status = self.start(name, *command, plain=plain).wait(60)
        assert status == 0, self.log(name)

    def end(self) -> None:
        self._stack.close()


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def processes(tmp_path: Path, redis: str, server: Any) -> Iterator[Processes]:
    environment = {
        "DATABASE_URL": server.url(),
        "DJANGO_SETTINGS_MODULE": "tests.workers.settings",
        "REDIS_URL": redis,
    }
    processes = Processes(tmp_path, environment)
    yield processes
    processes.end()


@pytest.fixture
def server(new_server: Any) -> Any:
    server = new_server("mariadb", wait_timeout=2, max_user_connections=100)
    server.grant_limit(USER, SLOTS)
    return server


def saved(server: Any) -> dict[str, list[int]]:
    """Return which tasks have been done, by worker."""
    rows = server.execute("SELECT name, number FROM app_row ORDER BY number", database="test")
    done: dict[str, list[int]] = {}
    for name, number in rows:
        done.setdefault(name, []).append(number)
    return done


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def restart(server: Any, processes: Processes) -> None:
    """Have the server away while every worker has a task or two to do.

    It goes while none is in the middle of a statement or transaction: those may fail.
    """

    def stopped_between_tasks() -> bool:
        with processes.frozen():
            time.sleep(0.2)  # what was under way arrives
            used_lately = [each for each in server.sessions(USER) if each.idle_seconds < 0.3]
            if used_lately or server.execute("SELECT 1 FROM information_schema.innodb_trx"):
                return False
            server.stop()
            return True

    wait_for(stopped_between_tasks, interval=0.3)
    time.sleep(2 * SPACING)
    server.start()


def take_all_slots(server: Any, seconds: float) -> None:
    import MySQLdb

    deadline = time.time() + seconds
    with ExitStack() as stack:
        while time.time() < deadline:
            with suppress(MySQLdb.OperationalError):
                handle = MySQLdb.connect(
                    unix_socket=str(server.socket), user=USER, password=PASSWORD
                )
                stack.enter_context(closing(handle))
                handle.query("SET SESSION wait_timeout = 100")
            time.sleep(0.02)


def test_thirty_of_thirty(server: Any, processes: Processes) -> None:
    """Each worker does all its tasks with the app, once, and not all without it."""
    processes.run("migrate", "-m", "django", "migrate", "--run-syncdb", "--verbosity=0")
    start = time.time() + 15
    for plain in (False, True):
        processes.run("give_out", "-m", "tests.workers", "give_out", str(start), plain=plain)
        for name, arguments in WORKERS.items():
            formatted = [each.format(start=start) for each in arguments]
            processes.start(name, "-m", "tests.workers", *formatted, plain=plain)
    sleep_until(start + 8.4 * SPACING)
    restart(server, processes)
    sleep_until(start + 18 * SPACING)
    take_all_slots(server, 2 * SPACING)

    def all_done() -> bool:
        done = saved(server)
        return all(len(done.get(name, [])) >= NUMBER for name in WORKERS)

    sleep_until(start + NUMBER * SPACING)
    with suppress(AssertionError):
        wait_for(all_done, timeout=30, interval=0.2)
    done = saved(server)
    print({name: len(numbers) for name, numbers in sorted(done.items())})
    for name in WORKERS:
        assert done.get(name) == list(range(NUMBER)), f"{name}: {processes.log(name)}"
        assert len(done.get(f"plain-{name}", [])) < NUMBER, name
