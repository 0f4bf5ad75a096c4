"""What scripts/docs writes once everything is set up; run that instead of this file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from django_dbhealth.explanations import explanations  # noqa: E402
from django_dbhealth.faults import Outcome  # noqa: E402
from tests.servers import MariaDBServer, PostgreSQLServer  # noqa: E402
from tests.servers.base import USER  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_dbhealth import Fault
    from tests.servers import Server

WRITTEN = "<!-- Written by scripts/docs. -->"

# The faults


FAULTS = f"""\
# Faults

{WRITTEN}

What the errors of MySQL, MariaDB, PostgreSQL and their drivers mean, whether the statement ran, and
what to do. A [note](errors.md#the-note) on an error names its place here; a program asks
[`classify()`](retrying.md#classify-exc-using-none). The same in a terminal, without any database:

```console
$ python manage.py dbhealth explain 2006
$ python manage.py dbhealth explain Lost connection
$ python -m django_dbhealth explain 57P05  # without a project
```

They are told by their codes. Where a server gives none, or one code means two things, the text
tells: PostgreSQL's refusals are known in all languages that PostgreSQL 15 speaks, wrong credentials
in English only. What stands under [the last heading](#from-the-manual) was not produced by a test.

A fault's statement is one outside of a transaction. On a connection that is not usable any more, a
transaction is rolled back. A connection that is lost while Django still opens it, the statements of
its set-up included, was unreachable, whatever the error: what was to come next has not been sent.
"""
OUTCOMES = {
    Outcome.NOT_EXECUTED: "not executed",
    Outcome.ROLLED_BACK: "rolled back with its transaction",
    Outcome.UNKNOWN: "**unknown**, it may have run",
}
FROM_THE_MANUAL = """\
## From the manual

Not produced by a test here: from the manual, or measured elsewhere or by hand, as each says.

"""


def faults_page() -> str:
    parts, database = [FAULTS], ""
    for each in explanations():
        if each.database != database:
            database = each.database
            parts.append(f"## {database}\n")
        parts.append(fault_section(each.fault))
    others = [each.fault for each in explanations() if not is_produced(each.fault)]
    lines = [f"- [{fault.title}](#{target(fault)}): {fault.source}\n" for fault in others]
    return "\n".join([*parts, FROM_THE_MANUAL + "".join(lines)])


def is_produced(fault: Fault) -> bool:
    return fault.source.startswith("measured: ")


def target(fault: Fault) -> str:
    return fault.anchor.partition("#")[2]


def fault_section(fault: Fault) -> str:
    reads = "".join(f'- reads: "{message}"\n' for message in fault.messages)
    return (
        f"({target(fault)})=\n"
        f"### {fault.title}\n\n"
        f"{fault.meaning}\n\n"
        f"What to do: {fault.advice}\n\n"
        f"{reads}"
        f"- statement: {OUTCOMES[fault.outcome]}\n"
        f"- connection: {'usable' if fault.connection_usable else 'not usable'}\n"
        f"- safe to retry: {'yes' if fault.safe_to_retry else 'no'}\n"
        f"- kind: {fault.kind.value}\n"
        f"- source: {fault.source}\n"
    )


# The tracebacks


TRACEBACKS = f"""\
# Tracebacks

{WRITTEN}

Five errors as a program shows them with the app installed. Only the lines of the program are shown,
not those of Django and the driver.
"""


class Story(NamedTuple):
    """A program that ends in an error, and the server that it meets."""

    title: str
    server: str
    about: str
    program: str
    options: str = ""  # for DATABASE_URL
    session: dict[str, Any] = {}  # what the server says  # noqa: RUF012


STORIES = [
    Story(
        "2006 in a transaction",
        "mariadb",
        "The server drops connections that are idle for two seconds, and the program waits inside"
        " its transaction.",
        """\
import time

from django.db import transaction
from example_project.models import Product

with transaction.atomic():
    Product.objects.create(sku="USD", price="0.92", updated="2026-11-25")
    time.sleep(4)  # stands for a download
    Product.objects.create(sku="JPY", price="0.006", updated="2026-11-25")
""",
        session={"wait_timeout": 2},
    ),
    Story(
        "2013 while a statement runs",
        "mariadb",
        "The program waits two seconds for each answer (`read_timeout`), and the server takes six.",
        """\
from django.db import connection

SLOW = "INSERT INTO example_project_product SELECT NULL, 'USD', SLEEP(6), '2026-11-25'"

with connection.cursor() as cursor:
    cursor.execute(SLOW)
""",
        options="read_timeout=2",
    ),
    Story(
        "1226: no free slot",
        "mariadb",
        "The account may have two connections open at once, and the program's threads hold two.",
        """\
import threading

from example_project.models import Product


def count(opened, finished):
    Product.objects.count()
    opened.wait()
    finished.wait()


opened, finished = threading.Barrier(3), threading.Event()
for name in ("importer", "mailer"):
    threading.Thread(target=count, name=name, args=(opened, finished), daemon=True).start()
opened.wait()
Product.objects.count()
""",
    ),
    Story(
        "25P03: idle in a transaction",
        "postgresql",
        "The server rolls transactions back in which nothing happens for two seconds.",
        """\
import time

from django.db import transaction
from example_project.models import Product

with transaction.atomic():
    Product.objects.create(sku="USD", price="0.92", updated="2026-11-25")
    time.sleep(4)  # stands for a download
    Product.objects.create(sku="JPY", price="0.006", updated="2026-11-25")
""",
        session={"idle_in_transaction_session_timeout": "2s"},
    ),
    Story(
        "1290: a server that became read-only",
        "mariadb",
        "A failover has made the server a replica.",
        """\
from example_project.models import Product

Product.objects.create(sku="USD", price="0.92", updated="2026-11-25")
""",
        session={"read_only": 1},
    ),
]
FRAME = re.compile(r'^  File "(.+?)", line \d+, in .+\n(?:    .*\n)*', re.MULTILINE)


def prepare(server: Server) -> None:
    """Make the example project's tables."""
    run([sys.executable, "manage.py", "migrate", "-v", "0"], ROOT, server.url())
    server.wait_for_sessions(0)
    server.grant_limit(USER, 2)


def run(command: list[str], folder: Path, url: str) -> str:
    """Run a program in a folder; return what it says of its error."""
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
        "PYTHONPATH": str(ROOT),
        "PYTHON_COLORS": "0",
    }
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return result.stderr


def traceback_of(story: Story, server: Server) -> str:
    """Return how the program ends: its own frames, the error and its note."""
    before = {name: variable(server, name) for name in story.session}
    server.set(**story.session)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder).resolve() / "prices.py"
        file.write_text(story.program)
        start = "import django, runpy; django.setup(); runpy.run_path('prices.py')"
        url = server.url(transport="tcp")
        url += ("&" if "?" in url else "?") + story.options if story.options else ""
        told = run([sys.executable, "-c", start], file.parent, url)
    server.set(**before)
    server.wait_for_sessions(0)
    return own_lines(told.rpartition("Traceback (most recent call last):\n")[2])


def variable(server: Server, name: str) -> Any:
    sql = "SELECT @@GLOBAL.{}" if server.vendor == "mysql" else "SHOW {}"
    return server.execute(sql.format(name))[0][0]


def own_lines(told: str) -> str:
    frames = [match for match in FRAME.finditer(told) if match[1].endswith("prices.py")]
    end = list(FRAME.finditer(told))[-1].end()
    lines = "".join(without_marks(frame[0]) for frame in frames)
    lines = re.sub(r'File ".*?prices\.py"', 'File "/srv/shop/prices.py"', lines)
    rest = re.sub(r"\S*prices\.py", "/srv/shop/prices.py", told[end:])
    return f"Traceback (most recent call last):\n{lines}{rest}".rstrip()


def without_marks(frame: str) -> str:
    return "".join(line for line in frame.splitlines(keepends=True) if line.strip(" ~^\n"))


def tracebacks(servers: dict[str, Server]) -> Iterator[str]:
    """Yield the section of each story."""
    for story in STORIES:
        traceback = traceback_of(story, servers[story.server])
        yield (
            f"## {story.title}\n\n{story.about}\n\n"
            f"```python\n{story.program}```\n\n```text\n{traceback}\n```\n"
        )


def tracebacks_page() -> str:
    with ExitStack() as stack:
        servers: dict[str, Server] = {
            "mariadb": stack.enter_context(MariaDBServer()),
            "postgresql": stack.enter_context(PostgreSQLServer()),
        }
        for server in servers.values():
            prepare(server)
        return "\n".join([TRACEBACKS, *tracebacks(servers)])


if __name__ == "__main__":
    (ROOT / "docs/faults.md").write_text(faults_page())
    (ROOT / "docs/tracebacks.md").write_text(tracebacks_page())
