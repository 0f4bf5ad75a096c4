"""Which process holds a socket: real sockets, and the kernel's word for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Self

import psutil
import pytest

from django_dbhealth import processes
from django_dbhealth.processes import (
    Locator,
    OwnEnd,
    Sockets,
    all_sockets,
    describe,
    key_of,
    own_end,
    sockets_to,
    why_unknown,
    without_passwords,
)
from django_dbhealth.vendors.server import Session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIENT = """
import socket, sys
host, *port = sys.argv[1:]
if not port:
    client = socket.socket(socket.AF_UNIX)
    client.connect(host)
else:
    client = socket.create_connection((host, port[0]))
with client:
    print("connected", flush=True)
    sys.stdin.read()
"""


class Client:
    """Another process with a connection to a socket of ours."""

    def __init__(self, *address: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "connected\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()


def session(**values: object) -> Session:
    blank = dict.fromkeys(("user", "host", "port", "database", "idle_seconds", "statement"))
    return Session(**{"id": 1, "state": "Sleep", **blank, **values})  # type: ignore[arg-type]


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def listener(request: pytest.FixtureRequest) -> Iterator[tuple[str, socket.socket]]:
    """An address, and a socket that listens there; the last is one of both families."""
    host = request.param
    is_mapped = host.startswith("::ffff")
    family = socket.AF_INET if host == "127.0.0.1" else socket.AF_INET6
    bound = "::" if is_mapped else host
    with socket.create_server((bound, 0), family=family, dualstack_ipv6=is_mapped) as server:
        yield ("127.0.0.1" if is_mapped else host), server


def test_over_tcp(listener: tuple[str, socket.socket]) -> None:
    """The other process is found by its address, and no other session is taken for it."""
    host, server = listener
    port = server.getsockname()[1]
    with (
        Client(host, str(port)) as client,
        closing(server.accept()[0]) as accepted,
        socket.create_connection((host, port)) as own,
    ):
        seen_host, seen_port = accepted.getpeername()[:2]
        own_address = own.getsockname()[:2]
        locator = Locator(
            Sockets(), own_end(own.fileno()), own_address, sessions_are_processes=False
        )

        def pids(**values: object) -> list[int]:
            return [each.pid for each in locator.processes_of(session(**values))]

        assert pids(host=seen_host, port=seen_port) == [client.process.pid]
        assert pids(host=seen_host, port=1) == []
        assert pids(host="192.0.2.1", port=seen_port) == []
        assert pids(host="elsewhere.example", port=seen_port) == []
        assert pids(host="localhost", port=seen_port) == [client.process.pid]
        assert pids(is_own=True, host="192.0.2.1", port=1) == [os.getpid()]
        # Over a unix socket of a server whose sessions have no processes
        assert pids() == []
        assert pids(client_pid=client.process.pid) == [client.process.pid]
        held = {
            each.process.pid: each.sockets for each in sockets_to([(host, port)]) if each.process
        }
        assert held == {client.process.pid: 1}


def test_same_address_of_another_server(listener: tuple[str, socket.socket]) -> None:
    """A socket to something else is not the session's, whatever its address."""
    host, server = listener
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        Client(host, str(server.getsockname()[1])),
        closing(server.accept()[0]) as accepted,
        socket.create_connection(other.getsockname()) as own,
    ):
        seen = accepted.getpeername()[:2]
        locator = Locator(
            Sockets(), own_end(own.fileno()), own.getsockname(), sessions_are_processes=False
        )
        assert locator.processes_of(session(host=seen[0], port=seen[1])) == []


def test_remote_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sessions from its own loopback are not this machine's."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as near,
    ):
        own = OwnEnd(local=key_of("192.0.2.1", 40000), remote=key_of("192.0.2.9", 3306))
        locator = Locator(Sockets(), own, ("192.0.2.1", 40000), sessions_are_processes=False)
        host, port = near.getsockname()
        assert locator.processes_of(session(host=host, port=port)) == []
        assert locator.processes_of(session(client_pid=os.getpid())) == []


def test_unix_socket(tmp_path: Path) -> None:
    """Both by the server's path and, where each session has a process, by that."""
    path = str(tmp_path / "a socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with Client(path) as client, closing(server.accept()[0]) as accepted:
            (tmp_path / "link").symlink_to(path)
            for name in (path, str(tmp_path / "link")):
                [held] = sockets_to([name])
                assert held.process
                assert (held.process.pid, held.sockets) == (client.process.pid, 1)
            assert accepted.fileno() > 0
            with socket.socket(socket.AF_UNIX) as own:
                own.connect(path)
                assert own_end(own.fileno()) == OwnEnd(server_pid=os.getpid())
    assert sockets_to([path, ("127.0.0.1", 1), ("no.such.host.invalid", 1)]) == []


def test_socket_of_a_family() -> None:
    """After a fork both hold it; the older one is named first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as own:
            child = subprocess.Popen(["sleep", "60"], pass_fds=[own.fileno()])
            try:
                sockets = Sockets()
                [near] = sockets.at(key_of(*own.getsockname()))
                assert sockets.pids(near.inode) == [os.getpid(), child.pid]
            finally:
                child.kill()
                child.wait()


def test_agrees_with_psutil() -> None:
    """Another reader of the same files finds the same processes."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client("127.0.0.1", str(server.getsockname()[1])),
        closing(server.accept()[0]) as accepted,
    ):
        sockets = Sockets()
        for each in psutil.net_connections("tcp4"):
            if each.status == "ESTABLISHED" and each.laddr.port in (
                accepted.getpeername()[1],
                accepted.getsockname()[1],
            ):
                near = next(
                    found
                    for found in sockets.at(key_of(*each.laddr))
                    if found.remote == key_of(*each.raddr)
                )
                assert each.pid in sockets.pids(near.inode)


def test_describe() -> None:
    own = describe(os.getpid())
    assert own
    assert own.command == " ".join(psutil.Process().cmdline())
    assert own.user == psutil.Process().username()
    assert describe(2**22 + 1) is None


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python load.py mysql://shop:secret@db/shop", "python load.py mysql://shop:***@db/shop"),
        ("mysqldump --password=secret shop", "mysqldump --password=*** shop"),
        ("run --db-password secret -p 8000", "run --db-password *** -p 8000"),
        ("python manage.py runserver", "python manage.py runserver"),
    ],
)
def test_no_password_is_shown(command: str, shown: str) -> None:
    assert without_passwords(command) == shown


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One sentence for each thing that hides processes."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root cannot be somebody else and back
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(why_unknown()) == 2
    monkeypatch.setattr(processes, "PROC", tmp_path)
    [sentence] = why_unknown()
    assert "Linux" in sentence
    assert all_sockets().at(key_of("127.0.0.1", 1)) == []
    assert sockets_to(["/tmp/socket", ("127.0.0.1", 1)]) == []
