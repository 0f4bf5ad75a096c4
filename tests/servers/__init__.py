"""Private database servers for the tests: started in milliseconds, gone with the test run."""

from __future__ import annotations

from tests.servers.base import Server, ServerError, Session, wait_for
from tests.servers.haproxy import HAProxy
from tests.servers.mariadb import MariaDBServer
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgresql import PostgreSQLServer
from tests.servers.proxy import Proxy

__all__ = [
    "HAProxy",
    "MariaDBServer",
    "PgBouncer",
    "PostgreSQLServer",
    "Proxy",
    "Server",
    "ServerError",
    "Session",
    "wait_for",
]
