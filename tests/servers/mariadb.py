"""A private MariaDB."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from tests.servers.base import ADMIN, PASSWORD, USER, Server, Session, find_program, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.servers.base import Transport

INSTALL = "apt install mariadb-server-core mariadb-client-core, or brew install mariadb."

# Given when the data are made and whenever they are used, or InnoDB would rewrite its log.
SMALL = [
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=8M",
    "--innodb-doublewrite=0",
    "--innodb-use-native-aio=0",
    "--aria-pagecache-buffer-size=4M",
    "--key-buffer-size=1M",
]

# Rights on every database, but no global one: limits do not apply to whoever has SUPER.
ACCOUNTS = f"""\
CREATE DATABASE IF NOT EXISTS test CHARACTER SET utf8mb4;
CREATE USER IF NOT EXISTS {ADMIN}@'%' IDENTIFIED BY '{PASSWORD}';
GRANT ALL PRIVILEGES ON *.* TO {ADMIN}@'%' WITH GRANT OPTION;
CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{PASSWORD}';
GRANT ALL PRIVILEGES ON `%`.* TO {USER}@'%';
"""


def find(name: str) -> str:
    return find_program(name, ["/usr/sbin", "/usr/local/sbin"], INSTALL)


class MariaDBServer(Server):
    """A private MariaDB; settings are server variables.

    `set(max_user_connections=…)` needs a server that was started with one that is not 0.
    """

    vendor = "mysql"
    engine = "django.db.backends.mysql"
    stop_signal = signal.SIGTERM

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    @property
    def operational_error(self) -> type[Exception]:
        import MySQLdb

        return MySQLdb.OperationalError

    def execute(
        self, sql: str, params: Sequence[Any] = (), database: str | None = None
    ) -> list[tuple[Any, ...]]:
        import MySQLdb

        connection = MySQLdb.connect(
            unix_socket=str(self.socket),
            user=ADMIN,
            password=PASSWORD,
            database=database or "",
            charset="utf8mb4",
            autocommit=True,
            connect_timeout=10,
            read_timeout=30,
            init_command="SET SESSION wait_timeout = 600",  # whatever others have
        )
        with closing(connection), closing(connection.cursor()) as cursor:
            cursor.execute(sql, params or None)
            return list(cursor.fetchall())

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            self.execute(f"SET GLOBAL {name} = %s", [value])
            self.settings[name] = value

    def sessions(self, user: str | None = None) -> list[Session]:
        rows = self.execute(
            "SELECT id, user, db, command, IF(command = 'Sleep', time_ms / 1000, 0)"
            " FROM information_schema.processlist"
            " WHERE user NOT IN (%s, 'system user', 'event_scheduler', 'unauthenticated user')"
            " AND user = COALESCE(%s, user) ORDER BY id",
            [ADMIN, user],
        )
        return [Session(*row[:4], float(row[4])) for row in rows]

    def status(self, name: str) -> int:
        """Return a global status variable, such as Connections."""
        [(_, value)] = self.execute("SHOW GLOBAL STATUS LIKE %s", [name])
        return int(value)

    def statements(self) -> list[str]:
        rows = self.execute(
            "SELECT info FROM information_schema.processlist WHERE command = 'Query'"
            " AND info IS NOT NULL AND id <> CONNECTION_ID()"
        )
        return [text for (text,) in rows]

    def _kill(self, session_id: int) -> None:
        self.execute("KILL %s", [session_id])

    def create_database(self, name: str) -> None:
        self.execute(f"CREATE DATABASE IF NOT EXISTS `{name}` CHARACTER SET utf8mb4")

    def grant_limit(self, user: str, max_user_connections: int) -> None:
        self.execute(
            "ALTER USER %s@'%%' WITH MAX_USER_CONNECTIONS %s", [user, max_user_connections]
        )

    def url(self, name: str = "test", transport: Transport = "socket") -> str:
        options = {"charset": "utf8mb4"}
        address = f"{self.host}:{self.port}"
        if transport == "socket":
            address, options["unix_socket"] = "", str(self.socket)
        return f"mysql://{USER}:{quote(PASSWORD, safe='')}@{address}/{name}?{urlencode(options)}"

    def _options(self) -> dict[str, Any]:
        return {"charset": "utf8mb4"}

    def _address(self, transport: Transport) -> dict[str, str]:
        if transport == "socket":
            return {"HOST": str(self.socket), "PORT": ""}
        return {"HOST": self.host, "PORT": str(self.port)}

    def _initialise(self, data: Path) -> None:
        run(
            [
                find("mariadb-install-db"),
                "--no-defaults",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
                f"--datadir={data}",
                f"--tmpdir={data}",  # in a shared one it deletes another's temporary tables
                *self._user_option(),
                *SMALL,
            ]
        )
        (data / "accounts.sql").write_text(ACCOUNTS)

    def _command(self) -> list[str]:
        data = self.directory / "data"
        return [
            find("mariadbd"),
            "--no-defaults",
            f"--datadir={data}",
            f"--tmpdir={self.directory}",
            f"--socket={self.socket}",
            f"--pid-file={self.directory / 'pid'}",
            f"--init-file={data / 'accounts.sql'}",
            f"--bind-address={self.host}",
            f"--port={self.port}",
            "--skip-name-resolve",
            "--skip-log-bin",
            # 2, not 0: what was committed outlives a SIGKILL, as it does in production.
            "--innodb-flush-log-at-trx-commit=2",
            *self._user_option(),
            *SMALL,
            *(f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items()),
        ]

    def _user_option(self) -> list[str]:
        return ["--user=root"] if os.geteuid() == 0 else []
