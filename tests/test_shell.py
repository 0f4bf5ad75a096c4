"""`manage.py shell` in a terminal, left alone longer than the server's idle timeout."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pexpect
import pytest

from tests.servers.base import USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
PROMPT = re.escape(">>> ")
ROUNDS = 10

# pexpect forks, and the suite has threads (of asgiref): the child calls exec at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of forkpty:DeprecationWarning")


class Shell:
    """A shell that a person types into."""

    def __init__(self, server: Server, **environment: str) -> None:
        self._server = server
        self._terminal = pexpect.spawn(
            sys.executable,
            ["-m", "django", "shell", "--interface", "python"],
            cwd=str(ROOT),
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.job_settings",
                "DATABASE_URL": server.url(),
                "TERM": "dumb",
                "PYTHON_BASIC_REPL": "1",  # 3.13's own draws over its lines
                **environment,
            },
            encoding="utf-8",
            timeout=20,
            dimensions=(50, 200),
        )
        self._terminal.expect(PROMPT)

    def type(self, *lines: str) -> str:
        """Type lines, the last of which ends the statement; return what is shown then."""
        shown = ""
        for line in lines:
            self._terminal.sendline(line)
            self._terminal.expect([PROMPT, re.escape("... ")])
            shown = self._terminal.before.replace("\r", "").partition("\n")[2]
        return shown

    def wait_until_dropped(self) -> None:
        """Leave the shell alone until the server has dropped its connection."""
        self._server.wait_for_sessions(0, USER, timeout=15)

    def close(self) -> None:
        self._terminal.close(force=True)


@pytest.fixture
def server(new_server: Callable[..., Server], add_database: Callable[..., str]) -> Server:
    """A MariaDB that drops idle connections after three seconds."""
    server = new_server("mariadb", wait_timeout=3)
    add_database(server.django())
    return server


@pytest.fixture
def shell(server: Server) -> Iterator[Shell]:
    shell = Shell(server)
    yield shell
    shell.close()


def test_shell_goes_on(server: Server, shell: Shell) -> None:
    """Query, a pause past wait_timeout, then a query or atomic() first: ten times in a row."""
    shell.type("from django.db import transaction")
    shell.type("from tests.app.models import Row")
    for number in range(ROUNDS):
        assert shell.type("Row.objects.count()") == f"{number}\n"
        shell.wait_until_dropped()
        if number % 2:
            assert shell.type("Row.objects.count()") == f"{number}\n"
        shown = shell.type(
            "with transaction.atomic():",
            f"    transaction.on_commit(lambda: print('committed', {number}))",
            f"    row = Row.objects.create(name='{number}')",
            "",
        )
        assert shown == f"committed {number}\n"
    rows = server.execute("SELECT name FROM app_row ORDER BY id", (), "test")
    assert [name for (name,) in rows] == [str(number) for number in range(ROUNDS)]


def test_without_the_guard_the_shell_fails(server: Server) -> None:
    """What the test before shows is the guard's doing."""
    shell = Shell(server, GUARD="false")
    try:
        shell.type("from tests.app.models import Row")
        assert shell.type("Row.objects.count()") == "0\n"
        shell.wait_until_dropped()
        assert "(2006, 'Server has gone away')" in shell.type("Row.objects.count()")
    finally:
        shell.close()


def test_state_that_was_lost_is_named(shell: Shell) -> None:
    """A temporary table is gone: the traceback says so, and the next query works."""
    shell.type("from django.db import connection")
    shell.type("cursor = connection.cursor()")
    shell.type("cursor.execute('CREATE TEMPORARY TABLE shelf (id int)')")
    shell.wait_until_dropped()
    shown: Any = shell.type("cursor.execute('SELECT * FROM shelf')")
    assert "OperationalError: (2006, 'Server has gone away')" in shown
    assert "Not healed: lost with its session: temporary table shelf" in shown
    assert shell.type("cursor.execute('SELECT 1')") == "1\n"
