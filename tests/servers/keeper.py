"""A small process that runs the servers and ends them when its standard input ends.

A pipe ends whatever ends the test run: a clean exit, Ctrl-C or SIGKILL. The keeper is in a
session of its own, so Ctrl-C reaches neither it nor the servers before the tests' own teardown.
Both ends of the pipe stand here; one line of JSON each way starts one server.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

MEMORY = Path("/dev/shm")  # Linux: a file system without a disk
ROOM = 4 * 2**30  # bytes; three processes with servers of their own took 0.8 GiB at the most


def directory_of_runs() -> str:
    """Return where servers keep their data: in memory if there is room and nothing else is set.

    A run writes gigabytes. A disk that is slow, or shared, doubles its time, and a server that
    waits for one does not shut down in time.
    """
    is_set = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    if not is_set and os.access(MEMORY, os.W_OK | os.X_OK):
        free = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
        if free >= ROOM:
            return str(MEMORY)
    return tempfile.gettempdir()


def directory_of_run() -> Path:
    """Return the directory of this test run, the same in its subprocesses.

    Each of pytest-xdist's workers is a run of its own, though they inherit the environment.
    """
    run = os.environ.get("DBHEALTH_TEST_RUN")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if run is None:
        run = f"{directory_of_runs()}/dbhealth-{os.urandom(4).hex()}"
    if not run.endswith(worker):
        run = f"{run}-{worker}"
    os.environ["DBHEALTH_TEST_RUN"] = run
    return Path(run)


RUN = directory_of_run()


# The keeper's end: runs as a script.


def family(pid: int) -> list[psutil.Process]:
    """Return the process and its children, the parent first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def launch(request: dict[str, Any]) -> subprocess.Popen[bytes]:
    account: dict[str, Any] = {}
    if user := request["user"]:
        account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    with Path(request["log"]).open("ab") as log:
        return subprocess.Popen(
            request["command"],
            cwd=request["directory"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **account,
        )


def answer(request: dict[str, Any], servers: dict[subprocess.Popen[bytes], int]) -> dict[str, Any]:
    for server in [server for server in servers if server.poll() is not None]:
        del servers[server]
    try:
        server = launch(request)
    except OSError as error:
        return {"id": request["id"], "error": str(error)}
    servers[server] = request["stop_signal"]
    return {"id": request["id"], "pid": server.pid}


def end(servers: dict[subprocess.Popen[bytes], int]) -> None:
    for server, stop_signal in servers.items():
        if server.poll() is None:
            signal_all(family(server.pid), signal.SIGCONT)  # it may have been frozen
            server.send_signal(stop_signal)
    for server in servers:
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            signal_all(family(server.pid), signal.SIGKILL)
            server.wait()


def remove(directory: Path) -> None:
    """Remove the directory, again if somebody (initdb, cp) was still writing into it."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


def main(directory: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    directory.mkdir()
    directory.chmod(0o755)
    servers: dict[subprocess.Popen[bytes], int] = {}
    try:
        print(flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line), servers)), flush=True)
    except BrokenPipeError:
        pass
    finally:
        end(servers)
        remove(directory)
        os._exit(0)  # no flush into a pipe that nobody reads


# The tests' end.


class Keeper:
    """The keeper of this process, and the directory that goes with it."""

    def __init__(self) -> None:
        # A subprocess of a test run finds the run's directory taken, and has one of its own.
        taken = RUN.exists()
        self.directory = RUN.with_name(f"{RUN.name}-{os.getpid()}") if taken else RUN
        self._lock = threading.Lock()
        self._requests = 0
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.directory)],
            cwd="/",
            env=environment | {"LC_ALL": "C"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        if not self._stdout.readline():
            raise RuntimeError(f"The keeper of the test servers did not start: {self.directory}.")

    def start(self, **request: Any) -> dict[str, Any]:
        """Start a server; return {"pid": …} or {"error": …}."""
        with self._lock:
            self._requests += 1
            number = self._requests
            self._stdin.write(json.dumps({"id": number, **request}) + "\n")
            self._stdin.flush()
            # Ctrl-C may have left the answer to an earlier request unread.
            while (reply := json.loads(self._stdout.readline()))["id"] != number:
                pass
            return reply

    def close(self) -> None:
        """End all servers of this process and wait until their directory is gone."""
        self._stdin.close()
        self._process.wait(30)
        self._stdout.close()

    def forget(self) -> None:
        """Let go of the pipe in a forked child, or the keeper would outlive its parent with it."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self._stdin.fileno())
        os.close(null)
        self._process.returncode = 0


_keepers: list[Keeper] = []  # none or one


def get_keeper() -> Keeper:
    """Return the keeper of this process, starting it if need be."""
    if not _keepers:
        _keepers.append(Keeper())
    return _keepers[0]


@atexit.register
def close_keeper() -> None:
    """End all servers of this process."""
    while _keepers:
        _keepers.pop().close()


def _forget_keeper() -> None:
    while _keepers:
        _keepers.pop().forget()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
else:
    os.register_at_fork(after_in_child=_forget_keeper)
