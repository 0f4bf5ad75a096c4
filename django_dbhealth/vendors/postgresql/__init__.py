"""PostgreSQL, through psycopg 3 and psycopg2."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.vendors.base import Refusal, Vendor

from .drivers import Psycopg, Psycopg2
from .session_rules import SESSION_RULES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django_dbhealth.vendors.base import Driver

# "-c idle_session_timeout=5min" or "--idle-session-timeout=5min", as libpq takes it.
_IDLE_SESSION_TIMEOUT = re.compile(
    r"(?:-c\s*|--)idle[_-]session[_-]timeout=(\d+(?:\.\d+)?)(?:\\\s)*(us|ms|s|min|h|d)?(?!\S)"
)
# The units of the manual's section 20.1.1, in seconds; the parameter's own is the millisecond.
_UNITS = {"us": 1e-6, "": 1e-3, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


# An error at connect has no SQLSTATE, so these are texts: the server's, in English, and libpq's.
FINAL = ("authentication failed", "does not exist", "no pg_hba.conf entry")
REFUSALS = {
    "too many clients already": Refusal.NO_FREE_SLOT,
    "remaining connection slots are reserved": Refusal.NO_FREE_SLOT,
    "too many connections for": Refusal.NO_FREE_SLOT,  # a role, a database
    "no more connections allowed": Refusal.NO_FREE_SLOT,  # PgBouncer's
    "the database system is": Refusal.UNREACHABLE,  # starting up, shutting down, in recovery
    "Connection refused": Refusal.UNREACHABLE,
    "No such file or directory": Refusal.UNREACHABLE,  # of the unix socket
    "Connection reset by peer": Refusal.UNREACHABLE,
    "Connection timed out": Refusal.UNREACHABLE,
    "Network is unreachable": Refusal.UNREACHABLE,
    "No route to host": Refusal.UNREACHABLE,
    "server closed the connection": Refusal.UNREACHABLE,
    "timeout expired": Refusal.UNREACHABLE,
}


class PostgreSQL(Vendor):
    """PostgreSQL. It drops idle sessions only when it was told to."""

    name = "postgresql"
    drivers: ClassVar[Mapping[str, Driver]] = {"psycopg": Psycopg(), "psycopg2": Psycopg2()}
    has_server_side_cursors = True
    has_pool = True
    refuses_unknown_options = True
    session_option = "options"

    def idle_timeout_in(self, session_option: str) -> float | None:
        found = _IDLE_SESSION_TIMEOUT.findall(session_option)
        if not found:
            return None
        number, unit = found[-1]
        return float(number) * _UNITS[unit] or None  # 0 switches it off

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

    session_rules = SESSION_RULES

    def refusal(self, error: Exception) -> Refusal | None:
        text = str(error)
        if type(error).__name__ == "PoolTimeout":  # psycopg_pool may not be there to import
            return Refusal.NO_FREE_SLOT
        if any(words in text for words in FINAL):  # of one of several hosts, perhaps
            return None
        return next((refusal for words, refusal in REFUSALS.items() if words in text), None)
