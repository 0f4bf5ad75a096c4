"""MySQL and MariaDB, through mysqlclient and PyMySQL."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from django_dbhealth.vendors.base import Vendor

from .drivers import MySQLClient, PyMySQL
from .faults import FAULTS, code_of
from .server import server_state, sessions, terminate
from .session_rules import SESSION_RULES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.vendors.base import Driver
    from django_dbhealth.vendors.server import Endpoint, ServerState, Session

# An assignment with the word before it: "SET", a comma's nothing, or the scope. lock_wait_timeout
# and @wait_timeout, a variable of the user's, are others.
_WAIT_TIMEOUT = re.compile(
    r"(?<![\w@.])(?:@@)?(?:(\w+)(?:\s+|\s*\.\s*))?`?wait_timeout`?\s*:?=\s*(\d+)",
    re.IGNORECASE,
)
_SCOPES_OF_OTHERS = ("GLOBAL", "PERSIST", "PERSIST_ONLY")

DEFAULT_PORT = 3306
# Debian's, Red Hat's, the libraries' own.
DEFAULT_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")  # noqa: S108


class MySQL(Vendor):
    """MySQL and MariaDB: to Django, and for most questions, they are one."""

    name = "mysql"
    title = "MySQL and MariaDB"
    drivers: ClassVar[Mapping[str, Driver]] = {"MySQLdb": MySQLClient(), "pymysql": PyMySQL()}
    # The servers' own default is 28800; hosts that share a server set 300 and less.
    default_idle_timeout = 300
    refuses_unknown_options = True
    session_option = "init_command"
    address_options = ("host", "port", "unix_socket", "read_default_file")

    def idle_timeout_in(self, session_option: str) -> float | None:
        found = [
            float(seconds)
            for scope, seconds in _WAIT_TIMEOUT.findall(session_option)
            if scope.upper() not in _SCOPES_OF_OTHERS
        ]
        return found[-1] if found else None

    def endpoints_in(self, settings: Mapping[str, Any]) -> Sequence[Endpoint]:
        options = settings["OPTIONS"]
        host = options.get("host") or settings["HOST"]
        path = options.get("unix_socket") or (host if host.startswith("/") else "")
        if path:
            return (path,)
        port = int(options.get("port") or settings["PORT"] or DEFAULT_PORT)
        if host and host != "localhost":
            return ((host, port),)
        if "read_default_file" in options:  # it says where
            return ()
        # The C libraries take "localhost" for a unix socket, PyMySQL for an address.
        return (*DEFAULT_SOCKETS, ("localhost", port))

    def driver_problem(self) -> str | None:
        # Django imports "MySQLdb", which may be PyMySQL in disguise. Then its version_info and
        # __version__ are mysqlclient's; VERSION is its own.
        driver = sys.modules.get("MySQLdb")
        if driver is None or driver.__name__ != "pymysql" or driver.VERSION[:2] >= (1, 2):
            return None
        version = ".".join(str(number) for number in driver.VERSION[:3])
        return (
            f"PyMySQL {version} is older than 1.2: its ping(), and so Django's health check, "
            "connects again by itself, and what the session carried is gone without an error."
        )

    session_rules = SESSION_RULES
    faults = FAULTS

    def code_of(self, error: BaseException) -> int | None:
        return code_of(error)

    def server_state(self, connection: BaseDatabaseWrapper) -> ServerState:
        return server_state(connection, self.driver_of(connection))

    def sessions(self, connection: BaseDatabaseWrapper) -> Iterator[Session]:
        return sessions(connection)

    def terminate(self, connection: BaseDatabaseWrapper, session_id: int) -> bool:
        return terminate(connection, session_id)
