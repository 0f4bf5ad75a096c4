"""One Django, the one of this interpreter: its tests on each database, the guard off and on."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django_suite.outcomes import (
    BAD,
    EXPECTED_FAILURE,
    PASSED,
    SKIPPED,
    Run,
    differences,
    fails_in_both,
)
from tests.servers import MariaDBServer, PostgreSQLServer, ServerError
from tests.servers.base import ADMIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "django-suite"
DJANGO = version("django")
TIME_LIMIT = 3600  # seconds that one run may take

# The kinds of server, and how the test databases are made there.
SERVERS: dict[str, tuple[type[Server], dict[str, str]]] = {
    "mariadb": (MariaDBServer, {"CHARSET": "utf8mb4"}),
    "postgresql": (PostgreSQLServer, {}),
}

# Of the caller's environment the tests get no address, no password and no settings.
LEFT_OUT = ("COVERAGE", "DATABASE_URL", "DBHEALTH", "DJANGO", "MYSQL", "PG", "PYTHON")


class SuiteError(Exception):
    """The tests could not be run; the message says why."""


def main() -> int:
    databases, *labels = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with alone():
            tests = tests_of_django()
            check(labels, tests)
            same = [compare(database, tests, labels) for database in databases.split(",")]
    except (SuiteError, ServerError) as reason:
        print(f"scripts/django-suite: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if all(same) else 1


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another run in this tree: it writes the same files."""
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another run of scripts/django-suite to end.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# Django's tests


def tests_of_django() -> Path:
    """Return the directory of the tests of this very Django, fetched once."""
    directory = CACHE / f"django-{DJANGO}"
    if not directory.exists():
        say(f"Downloading the sdist of Django {DJANGO}")
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            unpack(download(unfinished), Path(unfinished))
            (Path(unfinished) / directory.name).rename(directory)
    return directory / "tests"


def download(directory: str) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq"]
    command += ["download", "--no-deps", "--no-binary=django", f"--dest={directory}"]
    if subprocess.run([*command, f"django=={DJANGO}"], check=False).returncode:
        raise SuiteError(
            f"pip could not download the sdist of Django {DJANGO}. Is there a network?"
        )
    [archive] = Path(directory).glob("*.tar.gz")
    return archive


def unpack(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    root = directory / f"django-{DJANGO}"
    if not (root / "tests" / "runtests.py").exists():
        raise SuiteError(f"{archive.name} holds no {root.name}/tests/runtests.py.")


def check(labels: list[str], tests: Path) -> None:
    for label in labels:
        if not (tests / label.split(".")[0]).is_dir():
            raise SuiteError(f"Django {DJANGO} has no tests {label}; {tests} has what there is.")


# One database


def compare(database: str, tests: Path, labels: list[str]) -> bool:
    """Run the tests with the guard off and on, print both, tell whether they are the same."""
    runs = {}
    for guard in ("off", "on"):
        with addresses(database) as (server, databases):
            say(f"Running Django's tests, Django {DJANGO}, {server}, guard {guard} ...")
            runs[guard] = run(f"{DJANGO}-{database}-{guard}", guard, databases, tests, labels)
    print(f"\nDjango {DJANGO}, {server}, Python {platform.python_version()}")
    return report(runs["off"], runs["on"])


@contextmanager
def addresses(database: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the name of a server, a new one for each run, and DATABASES on it."""
    if database == "sqlite":
        engine = {"ENGINE": "django.db.backends.sqlite3"}
        yield database, {"default": engine, "other": engine}
        return
    kind, test = SERVERS[database]
    with kind() as server:
        [(banner,)] = server.execute("SELECT VERSION()")
        number = re.search(r"\d[\d.]*", banner)
        yield (
            f"{database} {number[0] if number else banner}",
            {
                "default": server.django("django", USER=ADMIN, TEST=test),
                "other": server.django("django_other", USER=ADMIN, TEST=test),
            },
        )


def run(name: str, guard: str, databases: dict[str, Any], tests: Path, labels: list[str]) -> Run:
    """Run the tests once, in a process of their own."""
    outcomes, log = CACHE / f"{name}.jsonl", CACHE / f"{name}.log"
    outcomes.write_text("")
    begun, used = time.monotonic(), cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="dbhealth-suite-") as temporary:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(LEFT_OUT)},
            "DJANGO_SUITE_DATABASES": json.dumps(databases),
            "DJANGO_SUITE_GUARD": guard,
            "DJANGO_SUITE_OUTCOMES": str(outcomes),
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(ROOT / "scripts"),
            "TMPDIR": temporary,
        }
        command = [sys.executable, "-X", "faulthandler", "runtests.py", "--noinput"]
        command += ["--parallel=1", "--settings=django_suite.settings", *labels]
        with log.open("w") as output:
            finish(
                subprocess.Popen(
                    command,
                    cwd=tests,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    result = Run.read(outcomes)
    result.seconds, result.cpu_seconds = time.monotonic() - begun, cpu_seconds() - used
    if result.problem:
        raise SuiteError(f"The guard should be {guard}, but {result.problem}")
    if not result.outcomes or (guard == "off" and not result.ended):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SuiteError(f"Django's tests broke off with the guard {guard}. {log} ends in:\n{tail}")
    if not_found := result.not_found():
        raise SuiteError(f"Django's tests cannot be loaded: {not_found}")
    if not result.ended:
        print(f"\nThe run broke off in or after {result.last}; {log} may say why.")
    return result


def cpu_seconds() -> float:
    """Return what the processes that have ended took; the servers have not, they go on."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the process to end; whatever happens, leave nothing of it running."""
    try:
        process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        say(f"It takes longer than {TIME_LIMIT} s: ending it.")
        process.send_signal(signal.SIGABRT)  # faulthandler writes to the log where it stands
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# What came of it


def report(off: Run, on: Run) -> bool:
    names = ["tests", "passed", "failed", "skipped", "xfailed", "seconds", "CPU s"]
    print(f"{'':9}{''.join(f'{name:>9}' for name in names)}")
    for name, each in (("guard off", off), ("guard on", on)):
        numbers = [len(each.outcomes), each.count(PASSED), each.count(*BAD)]
        numbers += [each.count(SKIPPED), each.count(EXPECTED_FAILURE)]
        numbers += [round(each.seconds), round(each.cpu_seconds)]
        print(f"{name:9}{''.join(f'{number:9}' for number in numbers)}")
    if both := fails_in_both(off, on):
        print(f"Fails in both, {len(both)}:")
        for test in both:
            print(f"  {test}\n      {indented(off.of(test))}")
    different = differences(off, on)
    print(f"Different, {len(different)}:" if different else "No difference.")
    for test in different:
        print(f"  {test}\n      off: {indented(off.of(test))}\n      on:  {indented(on.of(test))}")
    sys.stdout.flush()
    return not different and on.ended


def indented(outcome: Any) -> str:
    return str(outcome).replace("\n", "\n           ")


if __name__ == "__main__":
    sys.exit(main())
