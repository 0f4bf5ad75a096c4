"""What stands between a client and a private server: programs that production has there too."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Self

import psutil

from tests.servers.base import free_port, is_gone, release, wait_for
from tests.servers.keeper import get_keeper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.servers.base import Server


class Between(ABC):
    """A context manager. Its settings are those of its configuration file."""

    name: ClassVar[str]
    host = "127.0.0.1"
    _numbers = itertools.count(1)

    def __init__(self, server: Server, **settings: Any) -> None:
        self.server = server
        self.settings = settings
        self.port = free_port()
        self.directory = get_keeper().directory / f"{self.name}{next(self._numbers)}"

    @property
    def owner(self) -> str | None:
        """The account that it runs as, None for the one that runs the tests."""
        return None

    @abstractmethod
    def _files(self) -> Mapping[str, str]:
        """Return the files that it reads, by name."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that runs it in the foreground, in its directory."""

    def __enter__(self) -> Self:
        self.directory.mkdir()
        for name, text in self._files().items():
            (self.directory / name).write_text(text)
        if self.owner:
            for path in (self.directory, *self.directory.iterdir()):
                shutil.chown(path, self.owner)
        reply = get_keeper().start(
            command=self._command(),
            directory=str(self.directory),
            log=str(self.directory / "log"),
            user=self.owner,
            stop_signal=signal.SIGTERM,
        )
        self._process = psutil.Process(reply["pid"])
        wait_for(self._answers, message=f"{self.name} does not answer.")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        wait_for(lambda: is_gone(self._process), message=f"{self.name} does not end.")
        release(self.port)
        shutil.rmtree(self.directory)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
            return True
        return False
