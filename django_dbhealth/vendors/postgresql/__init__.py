"""PostgreSQL, through psycopg 3 and psycopg2."""

from __future__ import annotations

import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.vendors.base import Vendor

from .drivers import Psycopg, Psycopg2
from .faults import FAULTS, code_of
from .server import server_state, sessions, terminate
from .session_rules import SESSION_RULES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.vendors.base import Driver
    from django_dbhealth.vendors.server import Endpoint, ServerState, Session

# "-c idle_session_timeout=5min" or "--idle-session-timeout=5min", as libpq takes it.
_IDLE_SESSION_TIMEOUT = re.compile(
    r"(?:-c\s*|--)idle[_-]session[_-]timeout=(\d+(?:\.\d+)?)(?:\\\s)*(us|ms|s|min|h|d)?(?!\S)"
)
# The units of the manual's section 20.1.1, in seconds; the parameter's own is the millisecond.
_UNITS = {"us": 1e-6, "": 1e-3, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

DEFAULT_FOLDERS = ("/run/postgresql", "/tmp")  # Debian's and Red Hat's, libpq's own  # noqa: S108


class PostgreSQL(Vendor):
    """PostgreSQL. It drops idle sessions only when it was told to."""

    name = "postgresql"
    title = "PostgreSQL"
    drivers: ClassVar[Mapping[str, Driver]] = {"psycopg": Psycopg(), "psycopg2": Psycopg2()}
    has_server_side_cursors = True
    has_pool = True
    sessions_are_processes = True
    # Manual: Row and Array Comparisons. Measured, in the middle of 300,000 rows: 0.2 ms; with AND
    # and OR 16 ms. MariaDB: 60 and 2 ms.
    finds_row_values = True
    refuses_unknown_options = True
    session_option = "options"
    address_options = ("host", "hostaddr", "port", "service")

    def idle_timeout_in(self, session_option: str) -> float | None:
        found = _IDLE_SESSION_TIMEOUT.findall(session_option)
        if not found:
            return None
        number, unit = found[-1]
        return float(number) * _UNITS[unit] or None  # 0 switches it off

    def endpoints_in(self, settings: Mapping[str, Any]) -> Sequence[Endpoint]:
        options = settings["OPTIONS"]
        if "service" in options:
            return ()
        port = int(options.get("port") or settings["PORT"] or os.environ.get("PGPORT", "5432"))
        host = options.get("hostaddr") or options.get("host") or settings["HOST"]
        host = host or os.environ.get("PGHOST", "")
        if host and not host.startswith("/"):
            return tuple((name, port) for name in host.split(","))
        folders = (host,) if host else DEFAULT_FOLDERS
        return tuple(f"{folder}/.s.PGSQL.{port}" for folder in folders)

    def pooled_idle_time(self, pool_options: Mapping[str, Any]) -> float:
        # psycopg_pool looks at max_lifetime only when a connection is given back (measured with
        # 3.3.3: one idle past it is handed out all the same), and max_idle closes but one
        # connection in each interval, and only while there are more than min_size.
        if pool_options.get("min_size", 4) != 0:
            return math.inf
        try:
            return float((pool_options["max_size"] + 1) * pool_options.get("max_idle", 600))
        except (KeyError, TypeError, ValueError):
            return math.inf

    def pool_size(self, pool_options: Mapping[str, Any]) -> int:
        minimum = pool_options.get("min_size", 4)
        size = pool_options.get("max_size") or minimum
        return size if isinstance(size, int) else 0  # what is none, the pool refuses

    def forget_pools(self) -> Collection[object]:
        backend = sys.modules.get("django.db.backends.postgresql.base")
        by_alias = backend.DatabaseWrapper._connection_pools if backend else {}
        pools = list(by_alias.values())
        by_alias.clear()
        return pools

    session_rules = SESSION_RULES
    faults = FAULTS

    def code_of(self, error: BaseException) -> str | None:
        return code_of(error)

    def server_state(self, connection: BaseDatabaseWrapper) -> ServerState:
        return server_state(connection, self.driver_of(connection))

    def sessions(self, connection: BaseDatabaseWrapper) -> Iterator[Session]:
        return sessions(connection)

    def terminate(self, connection: BaseDatabaseWrapper, session_id: int) -> bool:
        return terminate(connection, session_id)
