"""What scripts/pictures draws once everything is set up; run that instead of this file."""

from __future__ import annotations

import getpass
import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.servers import MariaDBServer, wait_for  # noqa: E402
from tests.servers.base import USER  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

WIDTH = 110  # columns
FIRST_PID = 4101
IMAGES = ROOT / "docs/images"

# Programs of a shop, as their command lines read, and how many connections each holds.
PROGRAMS = (
    (["python", "manage.py", "sync_forever", "--interval", "60"], 1),
    (["python", "bot.py"], 3),
    (["python", "manage.py", "refresh_prices"], 2),
)
HOLD = "import sys; from tests import holder; import django; django.setup(); holder.main({})"


def environment(server: Server) -> dict[str, str]:
    return {
        **os.environ,
        "DATABASE_URL": server.url("shop", transport="tcp"),
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
        "PYTHONPATH": os.pathsep.join(sys.path),  # the name "python" leads to no environment
        "COLORTERM": "truecolor",
        "TERM": "xterm-256color",
    }


@contextmanager
def program(words: list[str], count: int, server: Server) -> Iterator[int]:
    """Run a process that holds connections under the command line of a program."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, words[1]).write_text(HOLD.format(count))
        process = subprocess.Popen(
            words,
            executable=sys.executable,
            cwd=folder,
            env=environment(server),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout
        assert process.stdout.readline().split(), "The program holds no connections."
        try:
            yield process.pid
        finally:
            process.kill()
            process.communicate()


def shown(server: Server, *arguments: str) -> str:
    """Return what the command writes on a terminal."""
    output, status = pexpect.run(
        f"{sys.executable} manage.py dbhealth {' '.join(arguments)}",
        env=environment(server),
        cwd=str(ROOT),
        withexitstatus=True,
        dimensions=(60, WIDTH),
    )
    if status:
        sys.exit(f"dbhealth ended with {status}:\n{output.decode()}")
    return output.decode().replace("\r\n", "\n")


def made_up(text: str, pids: list[int], account: str) -> str:
    """Return the text with other numbers of processes, and no name of this machine's."""
    for number, pid in enumerate(pids):
        name = str(FIRST_PID + 7 * number).ljust(len(str(pid)), "0")[: len(str(pid))]
        text = re.sub(rf"\b{pid}\b", name, text)
    return re.sub(rf"\b{account}\b", "shop".ljust(len(account)), text)


def draw(text: str, name: str, title: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text), soft_wrap=True)
    svg = console.export_svg(title=title, unique_id=f"dbhealth-{name}")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # from another site
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / f"{name}.svg").write_text(svg.replace("Fira Code, ", ""))


def main() -> None:
    with MariaDBServer(wait_timeout=300) as server, ExitStack() as stack:
        server.create_database("shop")
        server.grant_limit(USER, 8)
        pids = [stack.enter_context(program(*each, server)) for each in PROGRAMS]
        wait_for(lambda: min(each.idle_seconds for each in server.sessions(USER)) > 2)
        account = getpass.getuser()
        for name in ("report", "connections"):
            text = shown(server, name)
            draw(made_up(text, pids, account), name, f"python manage.py dbhealth {name}")


if __name__ == "__main__":
    main()
