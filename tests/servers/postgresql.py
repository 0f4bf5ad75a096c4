"""A private PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from tests.servers.base import (
    ADMIN,
    PASSWORD,
    USER,
    Server,
    ServerError,
    Session,
    find_program,
    run,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psycopg

    from tests.servers.base import Transport

INSTALL = (
    "apt install postgresql (with create_main_cluster = false in "
    "/etc/postgresql-common/createcluster.conf, no cluster is created), or brew install postgresql."
)

DEFAULT_PORT = 5432

SMALL = {
    "autovacuum": "off",
    # In the data directory, where it goes with the data even after a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
    "fsync": "off",
    "full_page_writes": "off",
    "jit": "off",
    "max_wal_senders": 0,
    "shared_buffers": "16MB",
    "wal_level": "minimal",
}

ACCESS = f"""\
local all {ADMIN} trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
"""

# For single-user mode: one statement per line.
ACCOUNTS = f"""\
CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'
ALTER ROLE {ADMIN} PASSWORD '{PASSWORD}'
CREATE DATABASE test OWNER {USER}
"""


def find(name: str) -> str:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    return find_program(name, [*installed, *_configured()], INSTALL)


def _version(directory: Path) -> float:
    name = directory.parent.name
    return float(name) if name.replace(".", "", 1).isdigit() else 0.0


def _configured() -> list[str]:
    """Return the directory that pg_config names, if there is a pg_config."""
    if not (program := shutil.which("pg_config")):
        return []
    result = subprocess.run([program, "--bindir"], capture_output=True, text=True, check=False)
    return result.stdout.split()


def literal(value: Any) -> str:
    """Return a setting's value as a quoted string."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "'" + text.replace("'", "''") + "'"


def close_and_wait(connection: psycopg.Connection[Any]) -> None:
    """Close a connection and wait until its process has given the slot back."""
    process = connection.info.backend_pid
    connection.close()
    with suppress(AssertionError):  # a server that has been frozen meanwhile
        wait_for(lambda: not psutil.pid_exists(process), timeout=2.0, interval=0.001)


class PostgreSQLServer(Server):
    """A private PostgreSQL; settings are those of postgresql.conf."""

    vendor = "postgresql"
    engine = "django.db.backends.postgresql"
    stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave

    @property
    def socket(self) -> Path:
        return self.directory

    @property
    def owner(self) -> str | None:
        """Another account where the tests run as root: PostgreSQL refuses to."""
        if os.geteuid():
            return None
        accounts = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in accounts else "nobody"

    @property
    def operational_error(self) -> type[Exception]:
        import psycopg

        return psycopg.OperationalError

    def execute(
        self, sql: str, params: Sequence[Any] = (), database: str | None = None
    ) -> list[tuple[Any, ...]]:
        import psycopg

        connection = psycopg.connect(
            host=str(self.socket),
            port=self.port,
            user=ADMIN,
            dbname=database or "postgres",
            autocommit=True,
            connect_timeout=10,
            options="-c idle_session_timeout=0",  # whatever others have
        )
        try:
            cursor = connection.execute(sql.encode(), params or None)
            return cursor.fetchall() if cursor.description else []
        finally:
            close_and_wait(connection)

    def set(self, **settings: Any) -> None:
        loaded = "SELECT pg_conf_load_time()"
        before = self.execute(loaded)
        for name, value in settings.items():
            self.execute(f"ALTER SYSTEM SET {name} = {literal(value)}")
        self.execute("SELECT pg_reload_conf()")
        # A new session inherits what its parent had loaded when it was forked.
        wait_for(lambda: self.execute(loaded) != before, message="The settings were not loaded.")
        if pending := self.execute("SELECT name FROM pg_settings WHERE pending_restart"):
            names = ", ".join(name for (name,) in pending)
            raise ServerError(f"{names}: takes effect at the next restart() only.")

    def sessions(self, user: str | None = None) -> list[Session]:
        rows = self.execute(
            "SELECT pid, usename, datname, coalesce(state, ''), CASE WHEN state LIKE 'idle%%'"
            " THEN extract(epoch FROM clock_timestamp() - state_change) ELSE 0 END"
            " FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND usename <> %s AND usename = coalesce(%s, usename) ORDER BY backend_start",
            [ADMIN, user],
        )
        return [Session(*row[:4], float(row[4])) for row in rows]

    def statements(self) -> list[str]:
        rows = self.execute(
            "SELECT query FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        )
        return [text for (text,) in rows]

    def _kill(self, session_id: int) -> None:
        self.execute("SELECT pg_terminate_backend(%s)", [session_id])

    def wait_until_gone(self, session_id: int, *, timeout: float = 10.0) -> None:
        # A session leaves pg_stat_activity before its process ends and closes the socket.
        wait_for(
            lambda: not psutil.pid_exists(session_id),
            timeout=timeout,
            message=f"Session {session_id} is still there after {timeout:g} s.",
        )

    def create_database(self, name: str) -> None:
        if not self.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]):
            self.execute(f'CREATE DATABASE "{name}" OWNER {USER}')

    def grant_limit(self, user: str, max_user_connections: int) -> None:
        self.execute(f'ALTER ROLE "{user}" CONNECTION LIMIT {max_user_connections or -1}')

    def url(self, name: str = "test", transport: Transport = "socket") -> str:
        account = f"{USER}:{quote(PASSWORD, safe='')}"
        if transport == "socket":
            return f"postgresql://{account}@:{DEFAULT_PORT}/{self.socket}/{name}"
        return f"postgresql://{account}@{self.host}:{self.port}/{name}"

    def remove(self) -> None:
        self._remove_shared_memory()
        super().remove()

    def _address(self, transport: Transport) -> dict[str, str]:
        if transport == "socket":
            return {"HOST": str(self.socket), "PORT": str(DEFAULT_PORT)}
        return {"HOST": self.host, "PORT": str(self.port)}

    def _initialise(self, data: Path) -> None:
        account = {"user": self.owner, "group": self._group(), "cwd": data}
        run(
            [
                find("initdb"),
                f"--pgdata={data}",
                f"--username={ADMIN}",
                "--auth=trust",
                "--locale=C",
                "--encoding=UTF8",
                "--wal-segsize=1",
                "--no-sync",
            ],
            **account,
        )
        with (data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = {literal(value)}\n" for name, value in SMALL.items())
        (data / "pg_hba.conf").write_text(ACCESS)
        run([find("postgres"), "--single", "-D", str(data), "postgres"], input=ACCOUNTS, **account)

    def _create(self) -> None:
        super()._create()
        with (self.directory / "data" / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = {literal(v)}\n" for name, v in self.settings.items())

    def _launch(self) -> bool:
        # The socket's name contains the port. A link by a name that is known beforehand lets
        # settings and URLs be written before the server has a port.
        link = self.socket / f".s.PGSQL.{DEFAULT_PORT}"
        link.unlink(missing_ok=True)
        link.symlink_to(f".s.PGSQL.{self.port}")
        return super()._launch()

    def _command(self) -> list[str]:
        return [
            find("postgres"),
            *("-D", str(self.directory / "data")),
            *("-k", str(self.socket)),
            *("-h", self.host),
            *("-p", str(self.port)),
        ]

    def _group(self) -> int | None:
        return pwd.getpwnam(self.owner).pw_gid if self.owner else None

    def _remove_shared_memory(self) -> None:
        """Remove the segment that a killed server has left; a running one removes its own."""
        if self.running:
            return
        with suppress(FileNotFoundError, IndexError):
            lines = (self.directory / "data" / "postmaster.pid").read_text().splitlines()
            subprocess.run(["ipcrm", "-m", lines[6].split()[1]], capture_output=True, check=False)
