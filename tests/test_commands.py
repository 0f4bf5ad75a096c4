"""LongRunningCommand: steps, signals, progress, in processes and terminals of their own."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import pytest
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.db import connections, transaction
from django.test import TestCase, override_settings

from django_dbhealth import LongRunningCommand, chunked_iterator, connection_boundary
from django_dbhealth.management.base import Sleep
from tests.app.management.commands.job import Command as Job
from tests.app.models import Row
from tests.conftest import create_tables, register, unregister
from tests.servers.base import USER, wait_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent


class JobProcess:
    """`manage.py job SCENARIO` in a process of its own."""

    def __init__(self, server: Server, *arguments: str, log: bool = True, **popen: Any) -> None:
        self.server = server
        self.output = b""
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.job_settings",
            "DATABASE_URL": server.url(),
            "SHOW_LOG": str(log),
            "TERM": "xterm",  # also where the suite itself runs without a terminal
        }
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            cwd=ROOT,
            env=environment,
            **{**streams, **popen},
        )

    def wait_for_event(self, event: str) -> None:
        """Read standard output up to an event that the command tells."""
        while f"<{event}>".encode() not in self.output:
            assert (line := self.process.stdout.readline()), self.finish()  # type: ignore[union-attr]
            self.output += line

    def answer(self) -> None:
        """Let a command go on that reads its standard input."""
        self.process.stdin.write(b"\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def finish(self, answer: bytes | None = None, timeout: float = 20) -> tuple[int, str, str]:
        """Return the status and the rest of what was written."""
        out, err = self.process.communicate(answer, timeout=timeout)
        return self.process.returncode, (self.output + (out or b"")).decode(), (err or b"").decode()


@contextmanager
def running(server: Server, *arguments: str, **options: Any) -> Iterator[JobProcess]:
    job = JobProcess(server, *arguments, **options)
    try:
        yield job
    finally:
        job.process.kill()
        job.process.communicate()


@pytest.fixture
def server(new_server: Callable[..., Server]) -> Server:
    """A private MariaDB with the table."""
    server = new_server("mariadb")
    register("job", server.django())
    create_tables("job")
    unregister("job")
    return server


def stored(server: Server) -> list[str]:
    return [name for (name,) in server.execute("SELECT name FROM app_row ORDER BY id", (), "test")]


# Steps


def test_three_slow_steps(server: Server) -> None:
    """Steps longer than the idle timeout finish, and hold no connection meanwhile."""
    server.set(wait_timeout=3)
    with running(server, "job", "three_steps") as job:
        for number in range(3):
            job.wait_for_event(f"pause {number}")
            server.wait_for_sessions(0, USER)
            job.wait_for_event(f"between {number}")
            server.wait_for_sessions(0, USER)
            job.answer()
        status, _, error = job.finish()
    # It hung up itself: what the server has dropped is counted.
    assert server.status("Aborted_clients") == 0
    assert (status, stored(server)) == (
        0,
        [f"{number} {when}" for number in range(3) for when in ("before", "after")],
    )
    assert re.findall(r"LOG INFO (Step \d): done in \d+\.\d s", error) == [
        "Step 0",
        "Step 1",
        "Step 2",
    ]


def test_step_begins_without_a_connection(server: Server) -> None:
    """What was open before a slow step is closed for it."""
    with running(server, "job", "slow_step") as job:
        job.wait_for_event("inside")
        server.wait_for_sessions(0, USER)
        assert job.finish(b"\n")[0] == 0


def test_failure_names_its_step(server: Server) -> None:
    """The traceback and the log say in which step it happened; the exit status is Django's."""
    with running(server, "job", "failing") as job:
        status, _, error = job.finish()
    assert status == 1
    assert re.search(
        r"LookupError: no such price\nThe step 'Save prices' failed after \d+\.\d s\.", error
    )
    assert "LOG WARNING The step 'Save prices' failed" in error
    with running(server, "job", "failing_politely") as job:
        status, _, error = job.finish()
    assert status == 1
    assert "Traceback" not in error
    assert "The step 'Save prices' failed" in error
    assert "CommandError: The supplier has no prices today." in error
    assert stored(server) == ["kept"]


def test_step_in_the_commands_own_transaction(server: Server) -> None:
    """A step inside the command's own atomic() is a mistake: the error names step and alias."""
    with running(server, "job", "own_transaction") as job:
        status, _, error = job.finish()
    assert status == 1
    assert "The step 'Download' cannot give back the connection 'default'" in error
    assert stored(server) == []


def test_without_logging_nothing_is_printed(server: Server) -> None:
    """Cron mails every line, so a command that succeeds writes none of its own."""
    with running(server, "job", "sleeping_short", log=False) as job:
        assert job.finish()[0] == 1  # no such scenario: an ordinary error
    with running(server, "job", "progress", log=False) as job:
        assert job.finish() == (0, "thing 0\nthing 1\nthing 2\n", "")


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("scenario", ["sleeping", "sleeping_in_a_step", "without_steps"])
def test_stops_at_once_while_waiting(server: Server, scenario: str, signum: signal.Signals) -> None:
    """While it sleeps, or where nothing was begun, a signal ends the command at once."""
    with running(server, "job", scenario) as job:
        job.wait_for_event("ready")
        began = time.monotonic()
        job.process.send_signal(signum)
        status, _, error = job.finish()
        assert time.monotonic() - began < 15  # of the 60 s of its sleep
    assert status == -signum
    assert f"Stopped by {signum.name}. What was committed stays committed." in error
    assert "Traceback" not in error
    assert stored(server) == ["finished"]
    server.wait_for_sessions(0, USER)


def test_step_that_does_not_end_is_interrupted(server: Server) -> None:
    """After stop_grace seconds a step is interrupted: its transaction is rolled back."""
    with running(server, "job", "stuck_step") as job:
        job.wait_for_event("ready")
        began = time.monotonic()
        job.process.terminate()
        status, _, error = job.finish()
        took = time.monotonic() - began
    assert status == -signal.SIGTERM
    assert Job.stop_grace <= took < 9.9  # the default is 10
    assert "SIGTERM: finishing the step 'Stuck', at most 2 s." in error
    assert stored(server) == ["finished"]


def test_second_signal_does_not_wait(server: Server) -> None:
    """Whoever sends SIGTERM twice means it."""
    with running(server, "job", "stuck_step_with_time") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        for line in job.process.stderr:  # type: ignore[union-attr]
            if b"finishing" in line:
                break
        job.process.terminate()
        assert job.finish(timeout=30)[0] == -signal.SIGTERM  # of the 60 s that it might take


def test_current_step_is_finished(server: Server) -> None:
    """A step that ends in time is finished, the next one is not begun."""
    with running(server, "job", "short_step") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        assert job.finish(b"\n")[0] == -signal.SIGTERM
    assert stored(server) == ["finished"]


def test_current_item_is_finished(server: Server) -> None:
    """track() stops between two items."""
    with running(server, "job", "items") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        status, _, error = job.finish(b"\n")
    assert status == -signal.SIGTERM
    assert "finishing the current item of 'rows'" in error
    assert stored(server) == ["item 0"]


def test_stop_passes_a_careless_except(server: Server) -> None:
    """`except Exception` around a step does not swallow the request to stop."""
    with running(server, "job", "deaf") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        assert job.finish()[0] == -signal.SIGTERM
    assert stored(server) == []


def test_shell_sees_143(server: Server) -> None:
    """A shell's $? is 128 + 15, as systemd and Docker expect of SIGTERM."""
    script = f'{sys.executable} -m django job sleeping >"$FIFO" & wait $!; echo "status $?" >&2'
    reader, writer = os.pipe()
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.job_settings",
        "DATABASE_URL": server.url(),
        "FIFO": f"/dev/fd/{writer}",
    }
    shell = subprocess.Popen(
        ["bash", "-c", f"echo $$; {script}"],
        cwd=ROOT,
        env=environment,
        pass_fds=[writer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as events, shell:
        assert b"<ready>" in events.readline()
        import psutil

        (command,) = psutil.Process(shell.pid).children()
        command.terminate()
        assert b"status 143" in shell.communicate()[1]


def test_interrupt_from_the_keyboard_stays_pythons(server: Server) -> None:
    """SIGINT raises KeyboardInterrupt at once, as in every Python program."""
    with running(server, "job", "stuck_step") as job:
        job.wait_for_event("ready")
        job.process.send_signal(signal.SIGINT)
        status, _, error = job.finish()
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in error
    assert stored(server) == ["finished"]


def test_ignored_hangup_stays_ignored(server: Server) -> None:
    """Under nohup the terminal's end is no reason to stop."""
    with running(
        server,
        "job",
        "short_step",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as job:
        job.wait_for_event("ready")
        job.process.send_signal(signal.SIGHUP)
        assert job.finish(b"\n")[0] == 0
    assert stored(server) == ["finished", "never begun"]


def test_handlers_are_put_back(database: Any) -> None:
    """call_command() sets no handler; run_from_argv() removes its own."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    seen: list[Any] = []

    class Command(LongRunningCommand):
        requires_system_checks = ()  # type: ignore[assignment]

        def handle(self, *args: Any, **options: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    call_command(Command())
    Command().run_from_argv(["manage.py", "x"])
    assert seen[0] == before[0]
    assert seen[1] != before[0]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


def test_exit_functions_run_before_the_end(server: Server, tmp_path: Path) -> None:
    """Logs are flushed and exit functions called, though the process ends by a signal."""
    marker = tmp_path / "marker"
    program = (
        "import atexit, pathlib, sys; from django.core.management import execute_from_command_line;"
        f"atexit.register(pathlib.Path({str(marker)!r}).touch);"
        "execute_from_command_line(['manage.py', 'job', 'sleeping'])"
    )
    with running(server, "version") as other:
        other.finish()
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.job_settings",
        "DATABASE_URL": server.url(),
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ) as process:
        assert b"<ready>" in process.stdout.readline()  # type: ignore[union-attr]
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    assert marker.exists()


# Async


def test_async_handle(server: Server) -> None:
    """handle() may be a coroutine function; its connections are closed, its text is printed."""
    with running(server, "async_job", "steps") as job:
        status, out, error = job.finish()
    assert (status, out) == (0, "3 rows\n")
    assert "LOG INFO First: done in" in error
    assert stored(server) == ["first", "number 1", "number 2"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_async_sleep_is_cancelled(server: Server, signum: signal.Signals) -> None:
    """A stop cancels the coroutine, and the process does not wait for its sixty seconds."""
    with running(server, "async_job", "sleeping") as job:
        job.wait_for_event("ready")
        job.process.send_signal(signum)
        status, _, error = job.finish()
    assert status == -signum
    assert ("Stopped by SIGTERM" in error) is (signum == signal.SIGTERM)
    if signum == signal.SIGTERM:
        assert stored(server) == ["finished", "cleaned up"]


def test_async_step_is_interrupted(server: Server) -> None:
    """An async step that does not end is cancelled after stop_grace seconds."""
    with running(server, "async_job", "stuck") as job:
        job.wait_for_event("ready")
        began = time.monotonic()
        job.process.terminate()
        status, _, error = job.finish()
        assert Job.stop_grace <= time.monotonic() - began < 9.9  # the default is 10
    assert status == -signal.SIGTERM
    assert "Traceback" not in error


def test_current_item_is_finished_in_async(server: Server) -> None:
    """`async for` over track() stops between two items, as `for` does."""
    with running(server, "async_job", "items") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        status, _, error = job.finish(b"\n")
    assert status == -signal.SIGTERM
    assert "finishing the current item of 'rows'" in error
    assert "Traceback" not in error
    done = server.execute("SELECT name FROM app_row WHERE number = 1", (), "test")
    assert [name for (name,) in done] == ["row 0"]


def test_blocking_sleep_is_refused_in_async(server: Server) -> None:
    """sleep() on the event loop would stop everything: the error names the async form."""
    with running(server, "async_job", "blocking_sleep") as job:
        status, _, error = job.finish()
    assert status == 1
    assert "SynchronousOnlyOperation" in error
    assert "asleep" in error


# call_command()


class TransactionOfATest(TestCase):
    """A TestCase's own transaction, which a command must leave alone."""

    databases = {"default", "postgresql"}

    def test_steps_leave_it_alone(self) -> None:
        for alias in sorted(self.databases):
            Row.objects.using(alias).create(name="of the test")
        call_command(StepsOnBoth())
        call_command("async_job", "steps", stdout=io.StringIO())
        for alias in sorted(self.databases):
            names = set(Row.objects.using(alias).values_list("name", flat=True))
            assert {"of the test", "of the command"} <= names
            assert connections[alias].in_atomic_block

    def test_and_the_next_test_finds_it_whole(self) -> None:
        for alias in sorted(self.databases):
            assert not Row.objects.using(alias).exists()


class StepsOnBoth(LongRunningCommand):
    def handle(self, *args: Any, **options: Any) -> None:
        for alias in ("default", "postgresql"):
            with self.step(alias):
                Row.objects.using(alias).create(name="of the command")
            self.sleep(0)


def test_step_in_own_transaction_is_refused_in_a_test_too(database: Any) -> None:
    """The mistake shows in a test, not only in production: only the caller's blocks are free."""

    class Command(LongRunningCommand):
        def handle(self, *args: Any, **options: Any) -> None:
            with transaction.atomic(using="database"), self.step("Download"):
                pass

    with (
        transaction.atomic(using="database"),
        pytest.raises(transaction.TransactionManagementError, match="The step 'Download'"),
    ):
        call_command(Command())


def test_call_command_gives_back_what_it_opened(database: Any) -> None:
    """Called from code that holds no connection, a command leaves none behind."""

    class Command(LongRunningCommand):
        def handle(self, *args: Any, **options: Any) -> None:
            Row.objects.using("database").count()

    call_command(Command())
    assert connections["database"].connection is None
    before = connections["database"].cursor()
    with before:
        call_command(Command())
    assert connections["database"].connection is not None


def test_nested_command_in_a_step(database: Any) -> None:
    """A command that calls another one: the inner steps close what the outer one holds."""

    class Inner(LongRunningCommand):
        def handle(self, *args: Any, **options: Any) -> None:
            with self.step("Inner"):
                assert connections["database"].connection is None

    class Outer(LongRunningCommand):
        def handle(self, *args: Any, **options: Any) -> None:
            with self.step("Outer"):
                Row.objects.using("database").count()
                call_command(Inner())

    call_command(Outer())


# Output


def test_progress_without_a_terminal(server: Server) -> None:
    """Each loop is one line in the log when it ends; nothing at verbosity 0."""
    with running(server, "job", "progress") as job:
        _, out, error = job.finish()
    assert out == "thing 0\nthing 1\nthing 2\n"
    assert re.search(r"LOG INFO things: 3\b", error)
    assert error.count("LOG INFO parts: 4 of 4 (100%)") == 3
    with running(server, "job", "progress", "--verbosity", "0") as job:
        _, out, error = job.finish()
    assert "things" not in error


@contextmanager
def terminal(columns: int = 80) -> Iterator[tuple[int, IO[bytes]]]:
    """Give the two ends of a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "wb") as end:
        yield master, end


def read_all(master: int, job: JobProcess) -> str:
    """Read what a terminal shows until the command has ended."""
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not part:
            break
        shown += part
    job.process.wait(20)
    return shown.decode()


def test_terminal(server: Server) -> None:
    """On a terminal: the step's name and duration, and a bar for each loop."""
    with (
        terminal() as (master, end),
        running(server, "job", "progress", stdout=end, stderr=end, log=False) as job,
    ):
        end.close()
        shown = read_all(master, job)
    os.close(master)
    assert job.process.returncode == 0, shown
    assert "Save …" in shown
    assert re.search(r"Save: done in \d\.\d s", shown)
    assert re.search(r"things .*3/\?", shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"(^|[\r\n])thing 2\r?\n", plain)


def test_terminal_without_progress(server: Server) -> None:
    """--no-progress, and a file instead of a terminal, leave out the bar."""
    with (
        terminal() as (master, end),
        running(
            server, "job", "progress", "--no-progress", stdout=end, stderr=end, log=False
        ) as job,
    ):
        end.close()
        shown = read_all(master, job)
    os.close(master)
    assert job.process.returncode == 0
    assert "parts: 4 of 4 (100%)" in shown
    assert "/?" not in shown


def test_terminal_at_verbosity_0(server: Server) -> None:
    """Nothing of ours is shown; the lines of a step are logged."""
    with (
        terminal() as (master, end),
        running(server, "job", "progress", "-v", "0", stdout=end, stderr=end) as job,
    ):
        end.close()
        shown = read_all(master, job)
    os.close(master)
    begin, end_of_step = [line for line in shown.splitlines() if "Save" in line]
    assert begin == "LOG INFO Save …"
    assert re.fullmatch(r"LOG INFO Save: done in \d\.\d s", end_of_step)


def test_file_gets_its_lines_under_a_bar(server: Server, tmp_path: Path) -> None:
    """With standard output in a file and the bar on the terminal each gets what is its own."""
    path = tmp_path / "out"
    with (
        path.open("wb") as out,
        terminal() as (master, end),
        running(server, "job", "progress", stdout=out, stderr=end, log=False) as job,
    ):
        end.close()
        shown = read_all(master, job)
    os.close(master)
    assert job.process.returncode == 0
    assert path.read_text() == "thing 0\nthing 1\nthing 2\n"
    assert "3/?" in shown


def test_terminal_that_goes_away(server: Server) -> None:
    """Its output fails from then on; the work goes on to its end, without a traceback."""
    with (
        terminal() as (master, end),
        running(
            server,
            "job",
            "talkative",
            stdout=end,
            stderr=end,
            start_new_session=True,
        ) as job,
    ):
        end.close()
        seen = b""
        while b"<ready>" not in seen:
            seen += os.read(master, 1000)
        os.close(master)
        assert job.finish(b"\n")[0] == 0
    assert stored(server) == ["row 0", "row 1", "row 2"]


def test_pipe_that_nobody_reads(server: Server) -> None:
    """`manage.py … | head` ends the reading, not the work; one message, exit status 0."""
    with running(server, "job", "talkative") as job:
        job.wait_for_event("ready")
        job.process.stdout.close()  # type: ignore[union-attr]
        job.process.stdin.write(b"\n")  # type: ignore[union-attr]
        job.process.stdin.close()  # type: ignore[union-attr]
        error = job.process.stderr.read().decode()  # type: ignore[union-attr]
        assert job.process.wait(20) == 0, error
        job.process.stdin = job.process.stdout = None
    assert error.count("Nobody reads the output any more") == 1
    assert "Traceback" not in error
    assert "and an error" in error
    assert stored(server) == ["row 0", "row 1", "row 2"]


def test_full_disk_is_an_error(server: Server) -> None:
    """Output that is lost otherwise than for want of a reader is not lost in silence."""
    with (
        Path("/dev/full").open("wb") as full,
        running(server, "job", "returns_text", stdout=full) as job,
    ):
        status, _, error = job.finish()
    assert status != 0
    assert "No space left on device" in error


def test_process_without_standard_error(server: Server) -> None:
    """A daemon may run without descriptor 2: a signal must not write into the database's socket."""
    with running(server, "job", "short_step", preexec_fn=lambda: os.close(2)) as job:
        job.wait_for_event("ready")
        job.process.terminate()
        assert job.finish(b"\n")[0] == -signal.SIGTERM
    assert stored(server) == ["finished"]


def test_many_inner_loops(server: Server) -> None:
    """A thousand nested loops on a terminal are not a thousand bars."""
    with (
        terminal() as (master, end),
        running(server, "job", "many_loops", stdout=end, stderr=end, log=False) as job,
    ):
        end.close()
        shown = read_all(master, job)
    os.close(master)
    assert job.process.returncode == 0
    assert shown.count("inner") < 100
    assert "1000/1000" in shown
    assert "2/3" in shown


def test_child_does_not_inherit_the_handlers(server: Server) -> None:
    """A process forked inside a step dies of SIGTERM as ever, at once."""
    with running(server, "job", "child") as job:
        status, out, error = job.finish()
    assert (status, out) == (0, f"exit code {-signal.SIGTERM}\n"), error
    assert "finishing" not in error


def test_signal_in_a_nested_command(server: Server) -> None:
    """The steps of a command that a command calls are finished first, too."""
    with running(server, "job", "nested") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        assert job.finish(b"\n")[0] == -signal.SIGTERM
    assert stored(server) == ["finished"]


def test_signal_while_only_one_task_sleeps(server: Server) -> None:
    """A task that sleeps does not end another one's step."""
    with running(server, "async_job", "group") as job:
        job.wait_for_event("ready")
        job.process.terminate()
        assert job.finish(b"\n")[0] == -signal.SIGTERM
    assert stored(server) == ["step done"]


def test_own_no_progress_option() -> None:
    """A command that has had an option of that name keeps it."""

    class Command(LongRunningCommand):
        def add_arguments(self, parser: Any) -> None:
            parser.add_argument("--no-progress", action="store_true", help="Mine.")

        def handle(self, *args: Any, **options: Any) -> str:
            return str(options["no_progress"])

    assert "Mine." in Command().create_parser("manage.py", "x").format_help()
    assert call_command(Command(), no_progress=True, stdout=io.StringIO()) == "True"


def test_text_that_handle_returns(server: Server) -> None:
    """As with every command, it is printed."""
    with running(server, "job", "returns_text") as job:
        assert job.finish()[:2] == (0, "done\n")


# Details


def quiet(handle: Callable[[LongRunningCommand], Any], **options: Any) -> Any:
    class Command(LongRunningCommand):
        def handle(self, *args: Any, **options: Any) -> Any:
            return handle(self)

    return call_command(Command(), **options)


def test_track_yields_every_item() -> None:
    """Items come unchanged and in order, from lists, generators and empty iterables."""
    seen: list[Any] = []
    for source in ([1, 2], iter("ab"), range(0)):
        quiet(lambda command, source=source: seen.extend(command.track(source, "things")))
    assert seen == [1, 2, "a", "b"]


def test_track_left_early() -> None:
    """A loop left by break or by an error ends its meter, and the error passes."""

    def handle(command: LongRunningCommand) -> None:
        for _ in command.track(range(10), "things"):
            break
        with pytest.raises(KeyError):
            for _ in command.track(range(10), "things", total=5):
                raise KeyError
        assert command._stop._units == []

    quiet(handle)


def test_track_forgets_the_query_log(database: Any) -> None:
    """With DEBUG Django keeps every query: a long loop would fill the memory."""

    def handle(command: LongRunningCommand) -> None:
        for number in command.track(range(30), "rows"):
            Row.objects.using("database").create(name=str(number))
            assert len(connections["database"].queries_log) < 10

    with override_settings(DEBUG=True):
        quiet(handle)


def test_track_forgets_the_query_log_in_async(database: Any) -> None:
    """The log is that of the thread in which the ORM works."""
    queries = connections["database"].queries_log
    logged = []

    class Command(LongRunningCommand):
        async def handle(self, *args: Any, **options: Any) -> None:
            rows = chunked_iterator(Row.objects.using("database"), chunk_size=1)
            async for row in self.track(rows, "rows"):
                await row.asave()
                logged.append(len(queries))

    Row.objects.using("database").bulk_create([Row(name=str(n)) for n in range(20)])
    with override_settings(DEBUG=True):
        call_command(Command())
    assert len(logged) == 20
    assert max(logged) < 10


def test_track_left_early_in_async() -> None:
    """A loop left by break or by an error ends its meter when the event loop has its turn."""

    class Command(LongRunningCommand):
        async def handle(self, *args: Any, **options: Any) -> None:
            async for _ in self.track(numbers(), "things"):
                break
            with pytest.raises(KeyError):
                async for _ in self.track(numbers(), "things"):
                    raise KeyError
            gc.collect()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert self._stop._units == []

    call_command(Command())


async def numbers() -> AsyncIterator[int]:
    for number in range(10):
        yield number


def test_track_touches_no_connection(database: Any) -> None:
    """A loop over a server-side cursor is not cut off."""
    Row.objects.using("database").bulk_create([Row(name=str(n)) for n in range(20)])

    def handle(command: LongRunningCommand) -> int:
        rows = Row.objects.using("database").iterator(chunk_size=5)
        seen = sum(1 for _ in command.track(rows, "rows", total=20))
        return str(seen)  # type: ignore[return-value]

    assert quiet(handle, stdout=io.StringIO()) == "20"


def test_track_tells_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal a long loop logs a line every LINE_EVERY seconds."""
    from django_dbhealth.management import progress

    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with caplog.at_level("INFO", logger="django_dbhealth.command"):
        quiet(lambda command: all(command.track(range(1, 3), "rows")) and None)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "rows: 1 of 2 (50%)",
        "rows: 2 of 2 (100%)",
        "rows: 2 of 2 (100%)",
    ]


def test_meter_tells_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first second on the line says how many items a second are done."""
    from django_dbhealth.management import progress

    meter = progress.Meter("rows", None)
    meter.done = 30
    now = meter.started + 10
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    assert meter.line() == "rows: 30, 3 a second"


def test_bar_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra `cli` lines are printed instead."""
    from django_dbhealth.management.progress import Meter, Progress

    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines: list[str] = []
    with Progress(lines.append, bar=True).shown(Meter("rows", 2)) as update:
        update()
    assert lines == ["rows: 0 of 2 (0%)"]


def test_no_progress_is_an_option_of_every_command() -> None:
    """It is there though the subclass's add_arguments() calls no super(), and in call_command()."""
    parser = Job().create_parser("manage.py", "job")
    assert parser.parse_args(["x", "--no-progress"]).no_progress is True
    assert "--no-progress" in parser.format_help()
    quiet(lambda command: None, no_progress=True)
    with pytest.raises(TypeError, match="no_progres"):
        quiet(lambda command: None, no_progres=True)


def test_it_is_a_base_command() -> None:
    """Whatever Django does with a command it can do with this one."""
    assert issubclass(LongRunningCommand, BaseCommand)
    with pytest.raises(CommandError, match="can't be used together"):
        LongRunningCommand(no_color=True, force_color=True)


def test_step_object_is_for_one_with() -> None:
    """Two steps are two objects; one after the other a step can be used again."""

    def handle(command: LongRunningCommand) -> None:
        step = command.step("Twice")
        for _ in range(2):
            with step:
                pass
        with step, pytest.raises(RuntimeError, match="entered already"), step:
            pass

    quiet(handle)


def test_step_inside_a_boundary_of_the_command(database: Any) -> None:
    """Boundaries and steps nest."""

    def handle(command: LongRunningCommand) -> None:
        with connection_boundary(), command.step("Inner"):
            Row.objects.using("database").create(name="inside")

    quiet(handle)
    assert connections["database"].connection is None


def test_sleep_gives_back(database: Any) -> None:
    """While it sleeps the server lists no connection of ours."""

    def handle(command: LongRunningCommand) -> None:
        Row.objects.using("database").count()
        command.sleep(0.01)
        assert connections["database"].connection is None

    quiet(handle)
    with (
        connection_boundary(),
        transaction.atomic(using="database"),
        pytest.raises(transaction.TransactionManagementError, match=r"sleep\(\) cannot give back"),
    ):
        Sleep().__enter__()
    with pytest.raises(ValueError, match="non-negative"):
        quiet(lambda command: command.sleep(-1))
    wait_for(lambda: database.server.wait_for_sessions(0, USER) == [])
