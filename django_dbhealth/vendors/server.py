"""What a server says of itself: its limits, its timeouts and the sessions on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Endpoint = str | tuple[str, int]  # where a server listens: a unix socket's path, or host and port


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How many connections there may be at once, and how many there are."""

    name: str  # the server's: "max_user_connections"
    scope: str  # "server", "account" or "database"
    maximum: int | None  # None: no limit
    used: int | None  # None: not to be seen with the account's rights


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What a server says of itself to one account."""

    product: str  # "MariaDB", "MySQL", "PostgreSQL", "SQLite"
    version: str
    user: str | None = None
    is_read_only: bool = False
    proxy: str | None = None  # what stands between, in words, where it can be told
    client_address: tuple[str, int] | None = None  # as the server sees it; None: a unix socket
    is_pooled: bool = False  # by a proxy whose clients share its sessions: ids are not theirs
    timeouts: Mapping[str, float | None] = field(default_factory=dict)  # seconds; None: none
    idle_timeout: str | None = None  # which of them drops an idle session; None: nobody knows
    limits: Sequence[Limit] = ()
    unseen: Sequence[str] = ()  # what the account has no right to see, a full sentence each


class Session(NamedTuple):
    """One connection as its server sees it. None: the server does not say.

    A tuple, because there may be thousands: a frozen dataclass takes ten times as long to make.
    """

    id: int
    user: str | None
    host: str | None  # None: also for a unix socket
    port: int | None  # the client's
    database: str | None
    state: str  # the server's own word: "Sleep", "Query", "idle in transaction"
    idle_seconds: float | None  # since the last statement ended; 0 while one runs
    statement: str | None
    client_pid: int | None = None  # what the client said of itself (MySQL's _pid)
    is_replication: bool = False  # never to be terminated
    is_own: bool = False  # that of the connection which asks
