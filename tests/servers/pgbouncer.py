"""A private PgBouncer before a private PostgreSQL."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import psutil

from tests.servers.base import PASSWORD, USER, find_program, free_port, is_gone, wait_for
from tests.servers.keeper import get_keeper

if TYPE_CHECKING:
    from tests.servers.base import Server

INSTALL = "apt install pgbouncer, or brew install pgbouncer."


class PgBouncer:
    """A context manager; settings are those of pgbouncer.ini."""

    host = "127.0.0.1"
    _numbers = itertools.count(1)

    def __init__(self, server: Server, **settings: Any) -> None:
        self.server = server
        self.settings = settings
        self.port = free_port()
        self.directory = get_keeper().directory / f"pgbouncer{next(self._numbers)}"

    def __enter__(self) -> Self:
        self.directory.mkdir()
        self._write("users.txt", f'"{USER}" "{PASSWORD}"\n')
        self._write("pgbouncer.ini", self._configuration())
        if self.server.owner:  # it refuses to be run by root
            for path in (self.directory, *self.directory.iterdir()):
                shutil.chown(path, self.server.owner)
        reply = get_keeper().start(
            command=[
                find_program("pgbouncer", ["/usr/sbin"], INSTALL),
                str(self.directory / "pgbouncer.ini"),
            ],
            directory=str(self.directory),
            log=str(self.directory / "log"),
            user=self.server.owner,
            stop_signal=signal.SIGTERM,
        )
        self._process = psutil.Process(reply["pid"])
        wait_for(self._answers, message="PgBouncer does not answer.")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        wait_for(lambda: is_gone(self._process), message="PgBouncer does not end.")
        shutil.rmtree(self.directory)

    def _configuration(self) -> str:
        address = f"host={self.server.host} port={self.server.port}"
        settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": self.directory / "users.txt",
            "ignore_startup_parameters": "extra_float_digits",
            **self.settings,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        return "\n".join(["[databases]", f"test = {address}", "[pgbouncer]", *lines, ""])

    def _write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
            return True
        return False
