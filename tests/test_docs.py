"""The README and the docs say what is true: their examples run, their links and names exist."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import difflib
import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from django.core.management import load_command_class
from django.core.management.base import BaseCommand
from django.db import Error, OperationalError, close_old_connections, connections
from django.db.transaction import atomic
from django.test import override_settings

import django_dbhealth
from django_dbhealth import LongRunningCommand
from django_dbhealth.conf import KINDS, Config
from django_dbhealth.management.commands.dbhealth import Command as DbHealth
from django_dbhealth.session_state import SessionState
from django_dbhealth.vendors import VENDORS
from tests.app.models import Row
from tests.test_commands import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [
    *(ROOT / "django_dbhealth").rglob("*.py"),
    *(ROOT / "example_project").rglob("*.py"),
]

FENCE = re.compile(
    r"^(?:<!-- run(?:: (?P<holds>[^\n]+))? -->(?P<runs>)\n)?"
    r"```(?P<language>\S+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block. One after `<!-- run: EXPRESSION -->` is run; then the expression is true."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool
    holds: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def name_of(page: Path) -> str:
    return page.name


def blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text()
        for match in FENCE.finditer(content):
            yield Block(
                page=page,
                line=content.count("\n", 0, match.start()) + 1,
                language=match["language"],
                text=match["text"],
                runs=match["runs"] is not None,
                holds=match["holds"] or "True",
            )


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Return what stands in backticks in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


PYTHON = [block for block in blocks() if block.language == "python"]
RUNNABLE = [block for block in PYTHON if block.runs]
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_block = pytest.mark.parametrize("block", PYTHON, ids=str)


# Examples


def test_every_marker_belongs_to_a_block() -> None:
    """A mistyped or misplaced marker would leave a block unrun without anybody noticing."""
    markers = sum(page.read_text().count("<!-- run") for page in PAGES)
    assert markers == len(RUNNABLE) >= 10


@every_block
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@every_block
def test_imports_exist(block: Block) -> None:
    """What an example imports from us is there."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("django_dbhealth"):
            module = importlib.import_module(node.module or "")
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []


@every_block
def test_settings_are_accepted(block: Block) -> None:
    """A DBHEALTH in an example has only keys and values that mean something."""
    for node in ast.parse(block.text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DBHEALTH":
            assert Config.from_dict(ast.literal_eval(node.value)).problems == ()


# Each example in a process of its own, in the example project. Its database has one day's prices.
RUNNER = """
import os
import sys

import django

django.setup()

from django.core.management import call_command
from django.db import connection

from example_project.models import Price, Product, save_day
from example_project import supplier

call_command("migrate", verbosity=0)
Product.objects.all().delete()
save_day(supplier.download(days=1, pause=0)[0])
connection.close()

def lose_connection():
    "End the session from the server's side, and wait until it is gone."
    vendor, handle = connection.vendor, connection.connection
    with connection.copy().cursor() as cursor:
        if vendor == "mysql":
            cursor.execute("KILL %s", [handle.thread_id()])
            left = "SELECT COUNT(*) FROM information_schema.processlist WHERE id = %s"
            number = handle.thread_id()
        else:
            number = handle.info.backend_pid
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [number])
            left = "SELECT COUNT(*) FROM pg_stat_activity WHERE pid = %s"
        while cursor.execute(left, [number]) is None or cursor.fetchone() != (0,):
            pass
        cursor.db.close()


def deadlock():
    "Let the server say that another transaction is in the way."
    sql = {
        "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213",
        "postgresql": "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$",
    }
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor])


namespace = {
    "__name__": "example", "lose_connection": lose_connection, "deadlock": deadlock
}
exec(compile(os.environ["EXAMPLE"], "example", "exec"), namespace)
if "Command" in namespace:
    Price.objects.all().delete()
    sys.argv = ["manage.py", "example"]
    namespace["Command"]().run_from_argv(sys.argv)
names = {"connection": connection, "Price": Price, "Product": Product, **namespace}
if not eval(os.environ["HOLDS"], names):
    sys.exit("not true: " + os.environ["HOLDS"])
"""


@pytest.fixture(scope="module", params=["mariadb", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The address of a database for the example project."""
    server = request.getfixturevalue(request.param)
    server.create_database("docs")
    return server.url("docs")


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_example_runs(block: Block, url: str) -> None:
    """It ends without an error, and what its marker says of the result is true."""
    run = in_the_example_project(
        [sys.executable, "-W", "error", "-c", RUNNER],
        DATABASE_URL=url,
        EXAMPLE=block.text,
        HOLDS=block.holds,
    )
    assert run.returncode == 0, run.stderr


def in_the_example_project(
    command: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    settings = {"DJANGO_SETTINGS_MODULE": "example_project.settings"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Links


def slug(heading: str) -> str:
    """Return the anchor that docutils makes of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", heading.replace("`", "").lower()).strip("-")


EXPLICIT_TARGET = re.compile(r"^\((\S+)\)=$", re.MULTILINE)


def anchors(page: Path) -> list[str]:
    return [slug(each) for each in re.findall(r"^#{1,3} (.+)$", prose(page), re.MULTILINE)]


@every_page
def test_links_resolve(page: Path) -> None:
    """Every relative link names a file that is there, and an anchor that the file has.

    Without a file it may also name one of MyST's explicit targets, on any page.
    """
    targets = {each for other in PAGES for each in EXPLICIT_TARGET.findall(prose(other))}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.is_file(), target
        found = {*anchors(file), *([] if path else targets)}
        assert not anchor or anchor in found, target


@every_page
def test_anchors_are_unique(page: Path) -> None:
    found = anchors(page)
    assert sorted(found) == sorted(set(found))


def test_every_page_is_in_the_index() -> None:
    pages = {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}
    toctree = next(each.text for each in blocks() if each.language == "{toctree}")
    assert {line for line in toctree.splitlines() if line and line[0] != ":"} == pages


# Names


OWN = {name for name in vars(LongRunningCommand) if not name.startswith("_")}
COMMAND_NAMES = sorted(name for name in OWN if not hasattr(BaseCommand, name))


DESCRIBING = ("boundaries.md", "chunks.md", "commands.md", "errors.md", "retrying.md")


@pytest.mark.parametrize("name", [*django_dbhealth.__all__, *COMMAND_NAMES])
def test_public_name_is_documented(name: str) -> None:
    """Under a heading of its own."""
    text = "".join(prose(ROOT / "docs" / page) for page in DESCRIBING)
    assert re.search(rf"^#+ `{name}\b", text, re.MULTILINE)


@every_page
def test_dotted_names_exist(page: Path) -> None:
    """django_dbhealth.x is a module, a name in it, a logger, or the id of a check."""
    sources = "".join(path.read_text() for path in SOURCES)
    for dotted in set(re.findall(r"\bdjango_dbhealth(?:\.\w+)+", page.read_text())):
        last = dotted.rpartition(".")[2]
        is_logger = f'getLogger("{dotted}")' in sources
        is_check = re.fullmatch(r"[EW]\d{3}", last) and f'"{last}"' in sources
        assert is_logger or is_check or resolves(dotted), dotted


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module or something in one."""
    try:
        importlib.import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        return hasattr(importlib.import_module(module), name)
    return True


@every_block
def test_commands_use_what_there_is(block: Block) -> None:
    """self.x in an example's command is LongRunningCommand's, or the example's own."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ClassDef) and "LongRunningCommand" in map(ast.unparse, node.bases):
            used = set(re.findall(r"\bself\.(\w+)", ast.unparse(node)))
            known = {*dir(LongRunningCommand()), *(getattr(n, "name", "") for n in node.body)}
            assert used <= known


OUR_NAMES = [
    *django_dbhealth.__all__,
    *(field.name for field in dataclasses.fields(django_dbhealth.Fault)),
    *COMMAND_NAMES,
    *KINDS,
    "DBHEALTH",
    "check_database_settings",
    "django_dbhealth",
]


@every_page
def test_no_name_is_mistyped(page: Path) -> None:
    """A name in backticks that is nearly one of ours is one of ours."""
    for span in spans(page):
        for word in set(re.findall(r"[A-Za-z_]{5,}", span)) - set(OUR_NAMES):
            assert difflib.get_close_matches(word, OUR_NAMES, n=1, cutoff=0.85) == [], word


@every_page
def test_settings_in_capitals_exist(page: Path) -> None:
    """An item of DBHEALTH that is named is one."""
    for key in re.findall(r"""DBHEALTH\[["'](\w+)["']\]""", page.read_text()):
        assert key in {*KINDS, "DATABASES"}


# Commands


def shown_commands() -> Iterator[tuple[str, str]]:
    """Return the page and the text of everything that a reader may type."""
    for page in PAGES:
        for span in spans(page):
            yield page.name, span
    for block in blocks():
        if block.language == "console":
            for line in block.text.splitlines():
                yield block.page.name, line.removeprefix("$ ").partition("  #")[0]


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
SHOWN = [each for each in shown_commands() if OPTION.search(each[1])]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_options_exist(page: str, command: str) -> None:
    """Each --option that is named belongs to the command that it is named with."""
    if "pip install" in command:
        return
    assert set(OPTION.findall(command)) <= options_of(command)


def options_of(command: str) -> set[str]:
    """Return the options of the command in a text; without one, those that all of ours have."""
    if script := re.search(r"scripts/\w+", command):
        return set(OPTION.findall((ROOT / script[0]).read_text()))
    name = re.match(r"(?:[A-Z_]+=\S+ )*(?:python manage\.py )?(\w+) ", command)
    own = sources_of_example_commands()
    if name is None:
        options = set(re.findall(r'"(--[a-z-]+)"', own))
        return parser_options(LongRunningCommand()) | options_of_dbhealth() | options
    if (ROOT / f"example_project/management/commands/{name[1]}.py").exists():
        return parser_options(LongRunningCommand()) | set(re.findall(r'"(--[a-z-]+)"', own))
    if name[1] == "dbhealth":
        return options_of_dbhealth(*command.split())
    return parser_options(load_command_class("django.core", name[1]))


def options_of_dbhealth(*words: str) -> set[str]:
    """Return the options of the subcommand that is named; without one, of all."""
    parser = DbHealth().create_parser("manage.py", "dbhealth")
    [subparsers] = [each.choices for each in parser._actions if each.dest == "subcommand"]
    assert isinstance(subparsers, dict)
    named = [subparsers[word] for word in words if word in subparsers]
    return {
        option
        for each in named or [parser, *subparsers.values()]
        for option in each._option_string_actions
    }


def sources_of_example_commands() -> str:
    """Return the text that defines their options: the app is not installed here."""
    folder = ROOT / "example_project"
    return "".join(path.read_text() for path in folder.rglob("*.py"))


def parser_options(command: BaseCommand) -> set[str]:
    return set(command.create_parser("manage.py", "command")._option_string_actions)


def test_scripts_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"(?<![\w/])scripts/[\w-]+", page.read_text()):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


# What the README shows


def rows(page: Path, heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading, without the table's head."""
    section = page.read_text().split(f"# {heading}\n", 1)[1]
    table = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_compatibility_table() -> None:
    """It has the pairs that scripts/test --all runs; the classifiers name no others."""
    pairs = rows(ROOT / "README.md", "Compatibility")
    tested = re.search(r'^PAIRS="(.+)"$', (ROOT / "scripts/setup").read_text(), re.MULTILINE)
    assert tested
    assert [f"{python}-{django}" for python, django in pairs] == tested[1].split()
    classifiers = PYPROJECT["project"]["classifiers"]
    for number, name in enumerate(("Programming Language :: Python", "Framework :: Django")):
        versions = [pair[number] for pair in pairs]
        prefix = f"{name} :: "
        named = [each.removeprefix(prefix) for each in classifiers if each.startswith(prefix)]
        assert [each for each in named if "." in each] == versions


def test_drivers_in_the_table() -> None:
    """Every driver that the README names is known to the package, and the other way round."""
    modules = {"mysqlclient": "MySQLdb", "PyMySQL": "pymysql", "psycopg 3": "psycopg"}
    text = (ROOT / "README.md").read_text().split("| database |", 1)[1]
    cells = re.findall(r"^\| (?:MariaDB|PostgreSQL|MySQL)[ \d.]*\| ([^|]+?) \|", text, re.MULTILINE)
    named = {modules.get(each, each) for cell in cells for each in cell.split(", ")}
    assert named == {driver for vendor in VENDORS.values() for driver in vendor.drivers}


@every_page
def test_extras_exist(page: Path) -> None:
    extras = re.findall(r"django-dbhealth\[([\w,]+)\]", page.read_text())
    for extra in ",".join(extras).split(","):
        assert not extra or extra in PYPROJECT["project"]["optional-dependencies"]


NUMBERS = re.compile(
    r"(?<=127\.0\.0\.1:)\d+|^[\d.]+-MariaDB\S*|\d+:\d\d:\d\d|(?<=done in )[\d.]+|"
    r"(?<=As told, in )\d+"
)


def lines_of_demo(text: str) -> list[str]:
    """Return what a terminal is left with, without what differs from one run to the next."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).expandtabs(4)
    lines = [line.rstrip().rpartition("\r")[2] for line in plain.split("\n")]
    return [NUMBERS.sub("N", line) for line in lines if line]


def on_a_terminal(command: list[str]) -> str:
    """Run a command with a terminal for its output, and return that."""
    told = b""
    with (
        terminal() as (ours, end),
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=end,
            stderr=end,
        ),
    ):
        end.close()
        with suppress(OSError):  # Linux: the other end was closed
            while part := os.read(ours, 65536):
                told += part
    os.close(ours)
    return told.decode()


def test_demo_shows_what_the_readme_says() -> None:
    """All of it, but for times, a port and MariaDB's version."""
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- demo -->\n```text\n", 1)[1].split("```\n<!-- /demo -->", 1)[0]
    told = on_a_terminal([sys.executable, "scripts/demo.py"])
    assert lines_of_demo(told) == lines_of_demo(block)


def test_tracebacks_show_lines_that_are_there() -> None:
    """A frame in the README names a line of the example project, as it is."""
    frame = re.compile(r'File "(.+?)", line (\d+), in (\w+)\n\s+(.+)$', re.MULTILINE)
    frames = frame.findall((ROOT / "README.md").read_text())
    assert len(frames) >= 2
    for file, line, function, source in frames:
        text = (ROOT / file).read_text()
        assert text.splitlines()[int(line) - 1].strip() == source
        assert f"def {function}(" in text


# What the pages say of session state


STATE = [
    (vendor, *row)
    for vendor, heading in (("mysql", "MySQL and MariaDB"), ("postgresql", "PostgreSQL"))
    for row in rows(ROOT / "docs/boundaries.md", heading)
]


@pytest.mark.parametrize(("vendor", "holds", "gives_back"), STATE)
def test_session_state_table(vendor: str, holds: str, gives_back: str) -> None:
    """The left column holds something, the right one gives it back, if anything does."""
    state = SessionState(VENDORS[vendor].session_rules)
    state.observe(holds.strip("`"))
    assert state
    if gives_back == "never":
        return
    state.observe(gives_back.strip("`"))
    assert not state


@pytest.mark.parametrize(("vendor", "number"), [("mysql", 0), ("postgresql", 1)])
def test_what_holds_nothing(vendor: str, number: int) -> None:
    text = (ROOT / "docs/boundaries.md").read_text()
    paragraph = re.findall(r"Nothing is held by: (.+?)\n\n", text, re.DOTALL)[number]
    statements = re.findall(r"`(.+?)`", paragraph)
    assert len(statements) >= 3
    for statement in statements:
        state = SessionState(VENDORS[vendor].session_rules)
        state.observe(statement)
        assert not state, statement


def test_discard_all() -> None:
    """It gives back all in the table but the last two."""
    held = [row[1].strip("`") for row in STATE if row[0] == "postgresql"]
    for statement in held:
        state = SessionState(VENDORS["postgresql"].session_rules)
        state.observe(statement)
        state.observe("COMMIT")  # DISCARD ALL cannot run inside a transaction
        state.observe("DISCARD ALL")
        assert bool(state) is (statement in held[-2:]), statement


# What the pages say of Django's own close_old_connections()


def test_djangos_leaves_a_lost_connection(database: Database) -> None:
    """With CONN_MAX_AGE=None and no error seen, it stays and the next query fails."""
    with override_settings(DBHEALTH={"GUARD": False}):
        connection: Any = connections[database.alias]
        connection.settings_dict["CONN_MAX_AGE"] = None
        lose(connection, database)
        close_old_connections()
        with pytest.raises(OperationalError):
            Row.objects.using(database.alias).count()
    del connections[database.alias]


def test_djangos_ends_a_transaction_silently(database: Database) -> None:
    """Inside atomic() it closes a young connection: no exception, no row, no callback."""
    called: list[str] = []
    connection = connections[database.alias]
    connection.settings_dict["CONN_MAX_AGE"] = 600
    with atomic(using=database.alias):
        Row.objects.using(database.alias).create(name="lost")
        connection.on_commit(lambda: called.append("callback"))
        close_old_connections()
    assert not Row.objects.using(database.alias).exists()
    assert called == []


def test_djangos_cuts_an_iterator(database: Database) -> None:
    """Past its age a connection is closed under the loop that reads from it."""
    rows_of = Row.objects.using(database.alias)
    rows_of.bulk_create([Row(name=str(number)) for number in range(500)])
    connection = connections[database.alias]
    connection.settings_dict["CONN_MAX_AGE"] = 0
    connection.close()
    rows = rows_of.iterator(chunk_size=10)
    next(rows)
    close_old_connections()
    if connection.vendor == "mysql":  # the rows were all in the client; only the end fails
        driver_error = connection.Database.Error
        with pytest.raises((Error, driver_error)):
            list(rows)
        return
    with pytest.raises(Error):
        list(rows)


def test_djangos_does_nothing_on_an_event_loop(database: Database) -> None:
    """It acts on other connection objects, and says nothing."""

    async def main() -> bool:
        close_old_connections()
        return connections[database.alias].connection is None

    connection = connections[database.alias]
    connection.settings_dict["CONN_MAX_AGE"] = 0
    connection.ensure_connection()
    handle = connection.connection
    assert asyncio.run(main())
    assert connection.connection is handle


def lose(connection: Any, database: Database) -> None:
    sql = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
    with connection.cursor() as cursor:
        cursor.execute(sql[connection.vendor])
        ((session,),) = cursor.fetchall()
    database.server.kill_connection(session)
    database.server.wait_until_gone(session)


# What commands.md says of queries inside a driver


SLOW_QUERY = """
import os

import django

django.setup()

from django.db import connection

from django_dbhealth import LongRunningCommand


class Command(LongRunningCommand):
    requires_system_checks = ()
    stop_grace = 0.2

    def handle(self, *args, **options):
        sleep = {"mysql": "SELECT SLEEP(%s)", "postgresql": "SELECT pg_sleep(%s)"}
        with self.step("Query"), connection.cursor() as cursor:
            os.write(1, b"ready\\n")
            cursor.execute(sleep[connection.vendor], [int(os.environ["SECONDS"])])
            os.write(1, b"ended\\n")


Command().run_from_argv(["manage.py", "slow"])
"""
AS_PYMYSQL = "import pymysql\npymysql.install_as_MySQLdb()\n"
AS_PSYCOPG2 = "import sys\nsys.modules['psycopg'] = None\n"  # Django then takes psycopg2


@pytest.mark.parametrize(
    ("kind", "prelude", "is_interrupted"),
    [
        pytest.param("mariadb", "", False, id="mysqlclient"),
        pytest.param("mariadb", AS_PYMYSQL, True, id="PyMySQL"),
        pytest.param("postgresql", "", True, id="psycopg 3"),
        pytest.param("postgresql", AS_PSYCOPG2, False, id="psycopg2"),
    ],
)
def test_query_inside_a_driver(
    kind: str, prelude: str, is_interrupted: bool, request: pytest.FixtureRequest
) -> None:
    """After stop_grace a query is interrupted, unless the driver waits for its answer in C."""
    server = request.getfixturevalue(kind)
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.job_settings",
        "DATABASE_URL": server.url(),
        "SECONDS": "60" if is_interrupted else "6",
    }
    with subprocess.Popen(
        [sys.executable, "-c", prelude + SLOW_QUERY],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        server.wait_until_running("SLEEP(" if kind == "mariadb" else "pg_sleep(")
        process.terminate()
        assert (process.stdout.read() == b"") is is_interrupted
        assert process.wait(10) == -signal.SIGTERM


# Style


@every_page
def test_no_heading_without_text(page: Path) -> None:
    """One title a page, and it comes first."""
    titles = re.findall(r"^# .+$", prose(page), re.MULTILINE)
    assert len(titles) == 1
    assert page.read_text().startswith(titles[0])


def test_decisions_are_dated() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/decisions.md").read_text(), re.MULTILINE)
    assert headings
    assert [each for each in headings if not re.match(r"\d{4}-\d\d-\d\d: ", each)] == []


def test_docs_need_no_network() -> None:
    """Nothing in the docs' settings loads from elsewhere."""
    text = (ROOT / "docs/conf.py").read_text()
    assert "intersphinx" not in text
    assert "http" not in text
