"""A private PgBouncer before a private PostgreSQL."""

from __future__ import annotations

from tests.servers.base import PASSWORD, USER, find_program
from tests.servers.between import Between

INSTALL = "apt install pgbouncer, or brew install pgbouncer."


class PgBouncer(Between):
    """A context manager; settings are those of pgbouncer.ini."""

    name = "pgbouncer"

    @property
    def owner(self) -> str | None:
        return self.server.owner  # it refuses to be run by root

    def _files(self) -> dict[str, str]:
        return {"users.txt": f'"{USER}" "{PASSWORD}"\n', "pgbouncer.ini": self._configuration()}

    def _command(self) -> list[str]:
        return [find_program("pgbouncer", ["/usr/sbin"], INSTALL), "pgbouncer.ini"]

    def _configuration(self) -> str:
        address = f"host={self.server.host} port={self.server.port}"
        settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": "users.txt",
            "ignore_startup_parameters": "extra_float_digits",
            **self.settings,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        return "\n".join(["[databases]", f"test = {address}", "[pgbouncer]", *lines, ""])
