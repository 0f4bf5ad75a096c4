"""Which process of this machine holds a session: looked up once, for all sessions.

Linux tells it under /proc; the two ends of a unix socket are told by ``ss`` (of iproute2). What is
in another container, and, without root, what other users' processes hold, is not to be seen there.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import shutil
import socket
import struct
import subprocess
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .vendors.base import looked_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from .vendors.server import Endpoint, Session

PROC = Path("/proc")
SS_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process of this machine. ``command`` is its command line, without passwords in it."""

    pid: int
    user: str | None
    command: str


class Holding(NamedTuple):
    """How many sockets to a server a process holds; None: one that is not to be seen."""

    process: Process | None
    sockets: int


def why_unknown() -> list[str]:
    """Return what this process cannot see of others, a full sentence each."""
    if not _has_proc():
        return ["Which process holds a session is told on Linux only, by /proc."]
    reasons = []
    if os.geteuid() != 0:
        reasons.append("The processes of other users are shown to root only.")
    if not shutil.which("ss"):
        reasons.append("Who holds a unix socket is told by ss, which is not installed (iproute2).")
    return reasons


def _has_proc() -> bool:
    return (PROC / "net/tcp").exists()


# The processes

# A password in a URL or after --password. mysql hides what follows its -p itself.
_SECRETS = re.compile(r"(://[^:/@\s]*:)[^@\s]+(?=@)|(--?\w*pass(?:word|wd)?[= ])\S+")


@cache
def describe(pid: int) -> Process | None:
    """Return the process with this number, None where there is none (any more)."""
    folder = PROC / str(pid)
    try:
        words = (folder / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
        command = words.decode(errors="replace") or (folder / "comm").read_text().strip()
        uid = folder.stat().st_uid
    except OSError:
        return None
    return Process(pid=pid, user=_user(uid), command=without_passwords(command))


def without_passwords(command: str) -> str:
    """Return a command line as it may be shown."""
    return _SECRETS.sub(lambda match: f"{match[1] or match[2]}***", command)


@cache
def _start(pid: int) -> int:
    """Return when a process was started, in ticks; numbers of processes are used again."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# The sockets. An address is written as /proc/net/tcp writes it, which is what is looked up.


class TCPSocket(NamedTuple):
    """The near end of a TCP connection: its addresses, and its number on this machine."""

    local: str
    remote: str
    inode: str


class Sockets:
    """The connected sockets of this machine, as they were when this object was made."""

    def __init__(self) -> None:
        self._tcp: defaultdict[str, list[TCPSocket]] = defaultdict(list)
        for each in _tcp_sockets():
            self._tcp[each.local].append(each)

    def at(self, local: str) -> list[TCPSocket]:
        """Return the sockets with a local address."""
        return self._tcp.get(local, [])

    def far_end(self, near: TCPSocket) -> TCPSocket | None:
        """Return the other end of a connection, None where that is not on this machine."""
        return next((far for far in self.at(near.remote) if far.remote == near.local), None)

    def to(self, remote: str) -> Iterator[TCPSocket]:
        """Yield the sockets with a remote address."""
        return (each for group in self._tcp.values() for each in group if each.remote == remote)

    def pids(self, inode: str) -> list[int]:
        """Return the processes that hold a socket, after a fork several, the oldest first."""
        holders = self._holders.get(inode, [])
        return holders if len(holders) < 2 else sorted(holders, key=_start)

    @cached_property
    def _holders(self) -> dict[str, list[int]]:
        return _holders()

    # Unix sockets: the server's ends have a path, the clients' have none

    @cached_property
    def _unix_ends(self) -> dict[str, tuple[str, str]]:
        """The path, or "*", and the other end's number, by the number of each end."""
        return {inode: (path, peer) for path, inode, peer in _unix_sockets()}

    def clients_of_path(self, path: str) -> list[str]:
        """Return the clients' ends of the connections to a server's unix socket."""
        real = os.path.realpath(path)
        ends = self._unix_ends.values()
        return [peer for bound, peer in ends if bound != "*" and os.path.realpath(bound) == real]

    def clients_of_process(self, pid: int) -> list[str]:
        """Return the clients' ends of the connections to unix sockets that a process serves."""
        return [
            peer
            for inode, (path, peer) in self._unix_ends.items()
            if path != "*" and pid in self.pids(inode)
        ]


# Read by one expression, because there may be tens of thousands. An IPv4 address in tcp6 stands
# after the prefix of mapped ones; 01 is ESTABLISHED (include/net/tcp_states.h).
_MAPPED = "(?:0000000000000000FFFF0000)?"
_TCP_LINE = re.compile(
    rf"^ *\d+: {_MAPPED}(\S+) {_MAPPED}(\S+) 01 \S+ \S+ \S+ +\d+ +\d+ (\d+)", re.MULTILINE
)


def _tcp_sockets() -> Iterator[TCPSocket]:
    for name in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for found in _TCP_LINE.findall((PROC / "net" / name).read_text()):
                yield TCPSocket(*found)


def key_of(host: str, port: int) -> str:
    """Return an IP address and a port as /proc/net/tcp writes them."""
    return f"{_key_of_host(host)}:{port:04X}"


@cache  # there are thousands of sessions, and few hosts
def _key_of_host(host: str) -> str:
    address = ipaddress.ip_address(host.partition("%")[0])
    packed = (getattr(address, "ipv4_mapped", None) or address).packed
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def _holders() -> dict[str, list[int]]:
    """Return which processes hold each socket."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    if not _has_proc():
        return found
    for pid in [int(each.name) for each in PROC.iterdir() if each.name.isdigit()]:
        for inode in _sockets_of(pid):
            found[inode].append(pid)
    return found


def _sockets_of(pid: int) -> Iterator[str]:
    try:
        folder = os.open(f"{PROC}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # another user's, or gone
        return
    try:
        for number in os.listdir(folder):  # noqa: PTH208 (of a descriptor)
            with suppress(OSError):
                kind, _, inode = os.readlink(number, dir_fd=folder).partition(":[")
                if kind == "socket":
                    yield inode[:-1]
    finally:
        os.close(folder)


_UNIX_LINE = re.compile(r"u_\S+\s+ESTAB\s+\d+\s+\d+\s+(.*?) (\d+)\s+\S.*? (\d+)\s*$")


def _unix_sockets() -> Iterator[tuple[str, str, str]]:
    """Yield the path, the number and the other end's number of each unix socket."""
    command = shutil.which("ss")
    if command is None or not _has_proc():
        return
    try:
        result = subprocess.run(  # noqa: S603
            [command, "-Hxn"], capture_output=True, text=True, timeout=SS_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in result.stdout.splitlines():
        if match := _UNIX_LINE.match(line):
            yield match[1], match[2], match[3]


def all_sockets() -> Sockets:
    """Return the sockets and who holds them, looked up now: for thousands that takes a while."""
    sockets = Sockets()
    sockets.pids("")
    return sockets


# A session's process


class OwnEnd(NamedTuple):
    """The near end of the connection which asks, and the process that listens at its other end.

    Over TCP the addresses are known, over a unix socket the process.
    """

    local: str | None = None
    remote: str | None = None
    server_pid: int | None = None


def own_end(descriptor: int) -> OwnEnd:
    """Return what the system knows of a connected socket."""
    with looked_at(descriptor) as end:
        if end.family == socket.AF_UNIX:
            if not hasattr(socket, "SO_PEERCRED"):  # Linux only
                return OwnEnd()
            peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return OwnEnd(server_pid=struct.unpack("3i", peer)[0])
        near, far = end.getsockname(), end.getpeername()
        return OwnEnd(local=key_of(*near[:2]), remote=key_of(*far[:2]))


class Locator:
    """Names the processes behind the sessions of one server, where that is certain.

    ``own`` is the connection which asks, ``seen`` the host and port from which its server sees it
    come: others, where a proxy stands between. ``sessions_are_processes``: a session's id is the
    number of the server's process for it.
    """

    def __init__(
        self,
        sockets: Sockets,
        own: OwnEnd,
        seen: tuple[str, int] | None,
        *,
        sessions_are_processes: bool,
    ) -> None:
        self._sockets = sockets
        self._own = own
        self._seen = seen
        self._sessions_are_processes = sessions_are_processes
        self._server = self._find_server()
        self._server_is_here = own.server_pid is not None or self._has_local(self._server)

    def processes_of(self, session: Session) -> list[Process]:
        """Return the processes that hold a session's socket; none: it is not known."""
        return [each for each in map(describe, self._pids(session)) if each]

    def _pids(self, session: Session) -> Collection[int]:
        if session.is_own:
            return [os.getpid()]
        if session.port is not None:
            return self._pids_over_tcp(session, session.port)
        if not self._server_is_here:
            return []
        if self._sessions_are_processes:
            clients = self._sockets.clients_of_process(session.id)
            return self._sockets.pids(clients[0]) if len(clients) == 1 else []
        return _told(session)

    def _pids_over_tcp(self, session: Session, port: int) -> Collection[int]:
        found = {
            each.inode
            for local in self._locals_of(session.host, port)
            for each in self._sockets.at(local)
            if self._leads_to_server(each, session)
        }
        if len(found) != 1:
            return []
        return self._sockets.pids(found.pop()) or _told(session)

    def _locals_of(self, host: str | None, port: int) -> list[str]:
        """Return the address of the client's end, as this machine would call it."""
        if host is None:
            return []
        with suppress(ValueError):
            return [key_of(host, port)]
        if host == "localhost":
            return [key_of("127.0.0.1", port), key_of("::1", port)]
        if self._seen and self._own.local and host == self._seen[0]:
            return [f"{self._own.local.partition(':')[0]}:{port:04X}"]
        return []

    def _leads_to_server(self, near: TCPSocket, session: Session) -> bool:
        if self._server is not None:
            return near.remote == self._server or (
                near.remote.rpartition(":")[2] == self._server.rpartition(":")[2]
                and self._has_local(self._server)
                and self._has_local(near.remote)
            )
        far = self._sockets.far_end(near)
        if far is None or self._own.server_pid is None:
            return False
        server = session.id if self._sessions_are_processes else self._own.server_pid
        return server in self._sockets.pids(far.inode)

    def _has_local(self, address: str | None) -> bool:
        return address is not None and bool(self._sockets.at(address))

    # Where the server is: a proxy on this machine has a socket to it

    def _find_server(self) -> str | None:
        own, seen = self._own, self._seen
        if own.local is None or own.remote is None or seen is None:
            return None
        if own.local.rpartition(":")[2] == f"{seen[1]:04X}":
            return own.remote
        proxy = self._pids_of_far_end(TCPSocket(own.local, own.remote, ""))
        remotes = {
            each.remote
            for local in self._locals_of(*seen)
            for each in self._sockets.at(local)
            if proxy & set(self._sockets.pids(each.inode))
        }
        return remotes.pop() if len(remotes) == 1 else None

    def _pids_of_far_end(self, near: TCPSocket) -> set[int]:
        far = self._sockets.far_end(near)
        return set(self._sockets.pids(far.inode)) if far else set()


def _told(session: Session) -> Collection[int]:
    """Return the process that the client named when it connected, if it is there."""
    return [session.client_pid] if session.client_pid and describe(session.client_pid) else []


# Without any session


def sockets_to(endpoints: Iterable[Endpoint], sockets: Sockets | None = None) -> list[Holding]:
    """Return which processes of this machine hold sockets to a server, those with most first.

    The server is not asked. The process that calls this is left out.
    """
    sockets = sockets or Sockets()
    inodes = {inode for endpoint in endpoints for inode in _clients_of(endpoint, sockets)}
    counts = Counter(_first(sockets.pids(inode)) for inode in inodes)
    counts.pop(os.getpid(), None)
    return [Holding(describe(pid) if pid else None, count) for pid, count in counts.most_common()]


def _first(pids: Collection[int]) -> int | None:
    return next(iter(pids), None)


def _clients_of(endpoint: Endpoint, sockets: Sockets) -> Iterator[str]:
    if isinstance(endpoint, str):
        yield from sockets.clients_of_path(endpoint)
        return
    host, port = endpoint
    with suppress(OSError):  # a name that is not known here
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for address in {key_of(*info[4][:2]) for info in found}:
            yield from (each.inode for each in sockets.to(address))
