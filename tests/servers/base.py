"""What the servers of both kinds have in common."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import psutil

from tests.servers.keeper import RUN, family, get_keeper, signal_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ADMIN = "admin"
USER = "shop"
# Characters that a URL and an SQL string must quote; a word that no message may carry.
PASSWORD = "open:sesame/@100%"

START_TIMEOUT = 30.0
STOP_TIMEOUT = 30.0
MAX_SOCKET_PATH = 103  # bytes: 107 on Linux, 103 on macOS

Transport = Literal["socket", "tcp"]


class ServerError(Exception):
    """A server could not be started, stopped or changed; the message says why."""


@dataclass(frozen=True)
class Session:
    """One client session, as the server lists it."""

    id: int
    user: str
    database: str | None
    state: str
    idle_seconds: float


def wait_for(
    condition: Callable[[], Any],
    *,
    timeout: float = 10.0,
    interval: float = 0.01,
    message: str | Callable[[], str] = "The event did not come.",
) -> Any:
    """Return the condition's first true value; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(message() if callable(message) else message)
        time.sleep(interval)
    return value


_reserved: dict[int, socket.socket] = {}  # by port


def free_port() -> int:
    """Return a TCP port that is free now, and that nobody else is given before `release()`.

    A server that is down finds it free when it starts again: meanwhile a UDP socket of the same
    number holds it.
    Below the ephemeral ports (32768 on Linux, 49152 on macOS): a client that keeps knocking at
    a stopped server's ephemeral port may be given that very port, and connect to itself.
    """
    while True:
        port = random.randrange(20000, 32000)
        with ExitStack() as stack:
            reservation = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            candidate = stack.enter_context(socket.socket())
            try:
                reservation.bind(("127.0.0.1", port))
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            candidate.close()
            stack.pop_all()
            _reserved[port] = reservation
            return port


def release(port: int) -> None:
    """Let others have a port that `free_port()` has returned."""
    if port in _reserved:
        _reserved.pop(port).close()


def find_program(name: str, directories: Sequence[str | Path], install: str) -> str:
    """Return the path of a program on PATH or in one of the directories."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, directories)])
    if found := shutil.which(name, path=path):
        return found
    raise ServerError(
        f"The tests need {name}, which is neither on PATH nor in "
        f"{', '.join(map(str, directories))}. Install it: {install}"
    )


def run(command: Sequence[str], **options: Any) -> None:
    """Run a command that prepares a server, to its end."""
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        start_new_session=True,
        check=False,
        **options,
    )
    if result.returncode:
        raise ServerError(f"{command[0]} exited with {result.returncode}:\n{result.stdout}")


def is_gone(process: psutil.Process) -> bool:
    """Tell whether the process has ended: its last thread too, which holds the sockets open."""
    try:
        if not process.is_running():
            return True
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.NoSuchProcess:  # a ZombieProcess is one
        return True


def is_stopped(process: psutil.Process) -> bool:
    """Tell whether every thread of the process is stopped: SIGSTOP reaches them one by one."""
    threads = list(Path(f"/proc/{process.pid}/task").glob("*/stat"))
    try:
        if not threads:
            return is_gone(process) or process.status() == psutil.STATUS_STOPPED
        states = {thread.read_text().rpartition(")")[2].split()[0] for thread in threads}
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return False
    return states <= {"T", "Z", "X"}


def freeze(pid: int) -> list[psutil.Process]:
    """Stop the process and its children where they are, as a hung machine would; return them."""
    processes: list[psutil.Process] = []

    def all_stopped() -> bool:
        nonlocal processes
        before, processes = processes, family(pid)
        signal_all(processes, signal.SIGSTOP)
        return processes == before and all(map(is_stopped, processes))  # or one was forked

    wait_for(all_stopped, message=f"Process {pid} does not freeze.")
    return processes


class Server(ABC):
    """A private server in a directory of its own; its settings are keyword arguments.

    As a context manager it is started, and removed with its data at the end.
    """

    vendor: ClassVar[str]
    engine: ClassVar[str]
    stop_signal: ClassVar[int]
    host = "127.0.0.1"
    _numbers = itertools.count(1)

    def __init__(self, directory: Path | None = None, /, **settings: Any) -> None:
        self.directory = directory or get_keeper().directory / str(next(self._numbers))
        self.settings = settings
        self.port = 0  # known once started
        self.log = self.directory / "log"
        self._process: psutil.Process | None = None
        self._log_start = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self.directory}, port {self.port}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    # What each kind answers

    @property
    @abstractmethod
    def socket(self) -> Path:
        """The unix socket, or the directory of it where the client wants that."""

    @property
    def owner(self) -> str | None:
        """The account that the server runs as, None for the one that runs the tests."""
        return None

    @property
    @abstractmethod
    def operational_error(self) -> type[Exception]:
        """The OperationalError of the driver that `execute()` uses."""

    @abstractmethod
    def _initialise(self, data: Path) -> None:
        """Fill a data directory."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    @abstractmethod
    def execute(
        self, sql: str, params: Sequence[Any] = (), database: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a statement as the administrator, on a connection of its own."""

    @abstractmethod
    def set(self, **settings: Any) -> None:
        """Change global settings, for sessions to come; they survive a restart."""

    @abstractmethod
    def sessions(self, user: str | None = None) -> list[Session]:
        """Return the client sessions, the administrator's own excepted."""

    def kill_connection(self, session_id: int) -> None:
        """End a session from the server's side; `wait_until_gone()` waits for it.

        Not within half a millisecond of its last answer, which the guard still believes.
        """
        time.sleep(0.0005)
        self._kill(session_id)

    @abstractmethod
    def _kill(self, session_id: int) -> None:
        """End a session, now."""

    @abstractmethod
    def statements(self) -> list[str]:
        """Return the texts of the statements that run now, the administrator's own excepted."""

    @abstractmethod
    def create_database(self, name: str) -> None:
        """Create a database if there is none of that name."""

    @abstractmethod
    def grant_limit(self, user: str, max_user_connections: int) -> None:
        """Limit the simultaneous connections of one account; 0: no limit."""

    @abstractmethod
    def url(self, name: str = "test", transport: Transport = "socket") -> str:
        """Return a DATABASE_URL."""

    # Life and death

    @property
    def running(self) -> bool:
        return self._process is not None and not is_gone(self._process)

    @property
    def pid(self) -> int:
        return self._alive().pid

    def start(self) -> None:
        """Start the server and return when it answers."""
        if self.running:
            return
        if not self.directory.exists():
            self._create()
        if self.port:  # clients know the port: it stays
            if self._launch():
                return
        else:
            for _ in range(5):
                self.port = free_port()
                if self._launch():
                    return
                if "Address already in use" not in self._last_log():
                    break
            self.port = 0
        raise ServerError(f"{self._command()[0]} did not start. Its log:\n{self.log_tail()}")

    def stop(self) -> None:
        """Shut the server down cleanly and wait until it is gone; its data stay."""
        if not self.running:
            return
        self.thaw()
        process = self._alive()
        process.send_signal(self.stop_signal)
        try:
            wait_for(lambda: is_gone(process), timeout=STOP_TIMEOUT)
        except AssertionError:
            self.kill()
            raise ServerError(f"{self} had to be killed. Its log:\n{self.log_tail()}") from None

    def restart(self) -> None:
        """Stop and start: the same port, the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill all of the server's processes at one moment and wait until they are gone."""
        self.freeze()
        processes = family(self.pid)
        signal_all(processes, signal.SIGKILL)
        wait_for(lambda: all(map(is_gone, processes)), message=f"{self} survives SIGKILL.")

    def remove(self) -> None:
        """Stop the server and delete its data."""
        try:
            self.stop()
        finally:
            release(self.port)
            shutil.rmtree(self.directory, ignore_errors=True)

    def freeze(self) -> None:
        """Stop all of the server's processes where they are, as a hung machine would."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        signal_all(family(self.pid), signal.SIGCONT)

    def log_tail(self, lines: int = 20) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # Sessions

    def wait_for_sessions(
        self, count: int, user: str | None = None, *, timeout: float = 10.0
    ) -> list[Session]:
        """Return the sessions once there are `count` of them."""
        sessions: list[Session] = []

        def there() -> bool:
            sessions[:] = self.sessions(user)
            return len(sessions) == count

        wait_for(
            there,
            timeout=timeout,
            message=lambda: (
                f"Expected {count} sessions, after {timeout:g} s there are {len(sessions)}: "
                f"{sessions}"
            ),
        )
        return sessions

    def wait_until_running(self, text: str) -> None:
        """Wait until a statement runs that has this text in it.

        A session's state does not tell which: MariaDB says "Query" for some time after the answer.
        """
        wait_for(
            lambda: any(text in each for each in self.statements()),
            message=f"No statement with {text!r} runs.",
        )

    def wait_until_gone(self, session_id: int, *, timeout: float = 10.0) -> None:
        """Wait until the server has closed a session's socket."""
        wait_for(
            lambda: session_id not in {session.id for session in self.sessions()},
            timeout=timeout,
            message=f"Session {session_id} is still there after {timeout:g} s.",
        )

    # Addresses

    def django(
        self, name: str = "test", transport: Transport = "socket", **overrides: Any
    ) -> dict[str, Any]:
        """Return settings for DATABASES; overrides are keys of it, OPTIONS are merged."""
        options = self._options() | overrides.pop("OPTIONS", {})
        return {
            "ENGINE": self.engine,
            "NAME": name,
            "USER": USER,
            "PASSWORD": PASSWORD,
            **self._address(transport),
            "OPTIONS": options,
            **overrides,
        }

    def _options(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _address(self, transport: Transport) -> dict[str, str]: ...

    # Inside

    def _alive(self) -> psutil.Process:
        if self._process is None or not self.running:
            raise ServerError(f"{self} is not running.")
        return self._process

    def _create(self) -> None:
        if len(os.fsencode(self.socket)) + len("/.s.PGSQL.65535") > MAX_SOCKET_PATH:
            raise ServerError(f"{self.socket} is too long for a socket. Set a shorter TMPDIR.")
        template = self._template()
        self._make_directory(self.directory)
        run(["cp", "-Rp", str(template), str(self.directory / "data")])

    def _template(self) -> Path:
        """Return a data directory to copy, made once per run."""
        template = get_keeper().directory / "templates" / self.vendor
        if not template.exists():
            unfinished = template.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            template.parent.mkdir(exist_ok=True)
            self._make_directory(unfinished)
            self._initialise(unfinished)
            unfinished.rename(template)
        return template

    def _make_directory(self, directory: Path) -> None:
        directory.mkdir()
        directory.chmod(0o755)
        if self.owner:
            shutil.chown(directory, self.owner)

    def _launch(self) -> bool:
        """Start the process; tell whether it got as far as answering."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        reply = get_keeper().start(
            command=self._command(),
            directory=str(self.directory),
            log=str(self.log),
            user=self.owner,
            stop_signal=self.stop_signal,
        )
        if "error" in reply:
            raise ServerError(f"{self._command()[0]} cannot be run: {reply['error']}")
        try:
            self._process = psutil.Process(reply["pid"])
        except psutil.NoSuchProcess:
            return False
        wait_for(
            lambda: not self.running or self._answers(),
            timeout=START_TIMEOUT,
            message=lambda: f"{self} does not answer. Its log:\n{self.log_tail()}",
        )
        return self.running

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except self.operational_error:
            return False
        return True

    def _last_log(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")


def shared(kind: type[Server]) -> Server:
    """Return the server of a kind that a test run shares; its address is known before it runs."""
    return kind(RUN / kind.vendor)
