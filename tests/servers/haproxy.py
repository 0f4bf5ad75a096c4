"""A private HAProxy before a private server."""

from __future__ import annotations

from tests.servers.base import find_program
from tests.servers.between import Between

INSTALL = "apt install haproxy, or brew install haproxy."


class HAProxy(Between):
    """A context manager; settings are timeouts of haproxy.cfg, such as `client="10s"`."""

    name = "haproxy"

    def _files(self) -> dict[str, str]:
        timeouts = {"connect": "5s", "client": "60s", "server": "60s", **self.settings}
        lines = [
            "global",
            "    maxconn 64",
            "listen database",
            "    mode tcp",
            *(f"    timeout {name} {value}" for name, value in timeouts.items()),
            f"    bind {self.host}:{self.port}",
            f"    server database {self.server.host}:{self.server.port}",
            "",
        ]
        return {"haproxy.cfg": "\n".join(lines)}

    def _command(self) -> list[str]:
        return [find_program("haproxy", ["/usr/sbin"], INSTALL), "-db", "-f", "haproxy.cfg"]
