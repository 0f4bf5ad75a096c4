"""manage.py dbhealth: what the servers say, whose connections they are, and ending idle ones."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.backends.sqlite3.base import DatabaseWrapper
from django.test import override_settings

from django_dbhealth.management.commands.dbhealth import Command
from django_dbhealth.vendors.mysql import MySQL
from django_dbhealth.vendors.postgresql import PostgreSQL
from django_dbhealth.vendors.server import Session
from tests.conftest import empty, register, unregister
from tests.servers import MariaDBServer, PgBouncer, PostgreSQLServer, wait_for
from tests.servers.base import ADMIN, PASSWORD, USER
from tests.servers.haproxy import HAProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_dbhealth.vendors.base import Vendor
    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "docs/dbhealth.schema.json").read_text())
)
KINDS = ["mariadb", "postgresql"]


class Result(NamedTuple):
    """How a run ended."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        data = json.loads(self.out)
        SCHEMA.validate(data)
        return data

    @property
    def database(self) -> Any:
        (database,) = self.data["databases"]
        return database


def dbhealth(*arguments: str, out: Any = None) -> Result:
    """Run the command in this process, as manage.py would."""
    out, err = out or StringIO(), StringIO()
    status = 0
    try:
        Command(stdout=out, stderr=err).run_from_argv(["manage.py", "dbhealth", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert PASSWORD not in out.getvalue() + err.getvalue()
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return Result(status, out.getvalue(), err.getvalue())


def ask(*arguments: str, alias: str = "private") -> Result:
    return dbhealth(*arguments, "--database", alias, "--format", "json")


def start(*command: str, url: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process of its own, on the database of an URL."""
    environment = {"DJANGO_SETTINGS_MODULE": "tests.job_settings", "DATABASE_URL": url}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        **{
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        },
    )


class Holder:
    """Another process that holds connections."""

    def __init__(self, url: str, count: int) -> None:
        self.process = start("tests.holder", str(count), url=url, stderr=None)
        self.pid = self.process.pid
        self.command = f"{sys.executable} -m tests.holder {count}"
        self.ids: list[int] = []

    def query(self) -> list[int]:
        """Have it query on each connection, and return the sessions that answered."""
        self._tell("query")
        self.ids = self._read()
        return self.ids

    def keep_busy(self, number: int) -> None:
        self._tell(f"sleep {number}")

    def close(self) -> None:
        self._tell("close")
        assert self.process.stdout
        assert self.process.stdout.readline() == "closed\n"

    def _tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _read(self) -> list[int]:
        assert self.process.stdout
        return [int(word) for word in self.process.stdout.readline().split()]


@contextmanager
def holding(url: str, *counts: int) -> Iterator[list[Holder]]:
    holders = [Holder(url, count) for count in counts]
    try:
        for holder in holders:
            holder.ids = holder._read()
        yield holders
    finally:
        for holder in holders:
            holder.process.kill()
            holder.process.communicate()


@pytest.fixture(scope="module")
def _running() -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    yield servers
    for server in servers.values():
        server.remove()


@pytest.fixture
def a_server(_running: dict[str, Server]) -> Iterator[Callable[[str], Server]]:
    """Give a server that the tests of this module share, with nobody connected to it."""

    def give(kind: str) -> Server:
        if kind not in _running:
            _running[kind] = SHARED[kind]()
            _running[kind].start()
        empty(_running[kind])
        return _running[kind]

    yield give
    for server in _running.values():
        server.grant_limit(USER, 0)


SHARED: dict[str, Callable[[], Server]] = {
    "mariadb": lambda: MariaDBServer(max_connections=500),
    "postgresql": PostgreSQLServer,
}


@pytest.fixture
def new_alias() -> Iterator[Callable[..., str]]:
    """Add an alias without opening a connection."""
    aliases: list[str] = []

    def add(settings: dict[str, Any], alias: str = "private") -> str:
        register(alias, settings)
        aliases.append(alias)
        return alias

    yield add
    for alias in aliases:
        unregister(alias)


def reserved(server: Server, **settings: Any) -> dict[str, Any]:
    """Return settings for an account that no limit concerns."""
    account = {"USER": ADMIN, "PASSWORD": PASSWORD}
    return server.django(transport="tcp", **account, **settings)


def ids_on(server: Server) -> list[int]:
    """Return the account's sessions; a closed one is there until the server has noticed."""
    return [each.id for each in server.sessions(USER)]


def row_of(holder: Holder, *, sockets: int) -> str:
    """Return what the row of a process in the list of sockets looks like."""
    return rf"^ *{holder.pid} +\S+ +{sockets} +{re.escape(holder.command)}$"


def processes(session: Any) -> list[tuple[int, str]]:
    return [(each["pid"], each["command"]) for each in session["processes"]]


# connections


@pytest.mark.parametrize(
    ("kind", "transport"),
    [("mariadb", "tcp"), ("postgresql", "tcp"), ("postgresql", "socket")],
)
def test_whose_connection_it_is(kind: str, transport: Any, a_server: Any, new_alias: Any) -> None:
    """Of five connections of three processes each one's process is named."""
    server = a_server(kind)
    new_alias(server.django(transport=transport))
    with holding(server.url(transport=transport), 2, 2, 1) as holders:
        result = ask("connections")
        assert (result.status, result.err) == (0, "")
        found = result.database["sessions"]
        sessions = {each["id"]: each for each in found if each["user"] == USER}
        own = [each for each in sessions.values() if each["is_own"]]
        assert [each["processes"][0]["pid"] for each in own] == [os.getpid()]
        for holder in holders:
            for session_id in holder.ids:
                expected = [(holder.pid, holder.command)]
                assert processes(sessions.pop(session_id)) == expected
        assert len(sessions) == 1
        text = dbhealth("connections", "--database", "private").out
        for holder in holders:
            assert text.count(f"{holder.pid} {holder.command}") == len(holder.ids)


@pytest.mark.parametrize("transport", ["tcp", "socket"])
def test_asked_over_another_transport(transport: Any, a_server: Any, new_alias: Any) -> None:
    """Whoever asks over a unix socket sees whose TCP sessions are, and on PostgreSQL both."""
    other = {"tcp": "socket", "socket": "tcp"}[transport]
    for kind in KINDS:
        server = a_server(kind)
        alias = new_alias(server.django(transport=other), f"the {kind}")
        with holding(server.url(transport=transport), 1) as [holder]:
            sessions = {
                each["id"]: each for each in ask("connections", alias=alias).database["sessions"]
            }
            found = processes(sessions[holder.ids[0]])
            assert found == (
                []  # MariaDB does not tell who is behind a unix socket
                if (kind, transport) == ("mariadb", "socket")
                else [(holder.pid, holder.command)]
            )


def test_mariadb_over_a_unix_socket(a_server: Any, new_alias: Any) -> None:
    """It is unknown which session is whose, but not which processes have sockets to the server."""
    server = a_server("mariadb")
    new_alias(server.django())
    with holding(server.url(), 2) as [holder]:
        result = ask("connections")
        theirs = [each for each in result.database["sessions"] if not each["is_own"]]
        assert [each["processes"] for each in theirs] == [[], []]
        [sockets] = result.database["sockets"]
        assert (sockets["process"]["pid"], sockets["sockets"]) == (holder.pid, 2)
        text = dbhealth("connections", "--database", "private").out
        assert re.search(row_of(holder, sockets=2), text, re.MULTILINE)


def test_what_the_client_said(new_server: Any, new_alias: Any) -> None:
    """Where MariaDB keeps what clients say of themselves, it counts for a unix socket."""
    server = new_server("mariadb", performance_schema="ON")
    server.execute(f"GRANT SELECT ON performance_schema.* TO {USER}@'%'")
    new_alias(server.django())
    with holding(server.url(), 1) as [holder]:
        sessions = ask("connections").database["sessions"]
        assert [(holder.pid, holder.command)] in [processes(each) for each in sessions]


@pytest.mark.parametrize("kind", KINDS)
def test_through_haproxy(kind: str, a_server: Any, new_alias: Any) -> None:
    """What the server sees is the proxy, so that is what holds the sessions."""
    server = a_server(kind)
    with HAProxy(server) as proxy:
        settings = {"HOST": proxy.host, "PORT": str(proxy.port)}
        new_alias(server.django(transport="tcp", **settings))
        url = server.url(transport="tcp").replace(f":{server.port}/", f":{proxy.port}/")
        with holding(url, 2) as [holder]:
            result = ask("connections")
            theirs = [each for each in result.database["sessions"] if each["id"] in holder.ids]
            assert len(theirs) == 2
            for session in theirs:
                pid, command = processes(session)[0]
                assert "haproxy" in command
                assert pid != holder.pid
            assert "proxy" in result.database["server"]["proxy"]
            report = ask("report").database
            assert report["error"] is None
            [sockets] = [e for e in report["processes"] if e["process"]["pid"] == holder.pid]
            assert sockets["sockets"] == 2


def test_filter_and_groups(a_server: Any, new_alias: Any) -> None:
    """--idle-over leaves out who was busy, --by counts."""
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    with holding(server.url(transport="tcp"), 3) as [holder]:
        assert ask("connections", "--idle-over", "3600").database["sessions"] == []
        wait_for(lambda: min(each.idle_seconds for each in server.sessions()) > 0.2)
        server.wait_for_sessions(3, USER)
        idle = ask("connections", "--idle-over", "0.2").database["sessions"]
        assert {each["id"] for each in idle} == set(holder.ids)
        for by, value in (("host", "127.0.0.1"), ("user", USER), ("state", "Sleep")):
            server.wait_for_sessions(3, USER)
            database = ask("connections", "--by", by).database
            groups = {each["value"]: each for each in database["groups"]}
            assert groups[value]["sessions"] == (3 if by == "state" else 4)
            assert groups[value]["longest_idle_seconds"] > 0.2
            text = dbhealth("connections", "--by", by, "--database", "private").out
            assert f"{by.upper()} " in text


def test_account_without_rights(a_server: Any, new_alias: Any) -> None:
    """It sees its own sessions, and is told that there may be others."""
    for kind, right in (("mariadb", "PROCESS"), ("postgresql", "pg_read_all_stats")):
        server = a_server(kind)
        alias = new_alias(server.django(transport="tcp"), f"the {kind}")
        result = ask("connections", alias=alias)
        assert result.status == 0
        assert any(right in each for each in result.database["unseen"])
        assert right in dbhealth("connections", "--database", alias).out


class Watched(StringIO):
    """Standard output that counts the sessions which are kept in memory."""

    kept = 0
    writes = 0
    written = 0

    def write(self, text: str) -> int:
        if found := text.count('"idle_seconds"'):
            self.writes += 1
            self.written += found
            # Not isinstance(): it wakes lazy objects of Django, which then want settings.
            kept = sum(type(each) is Session for each in gc.get_objects())
            self.kept = max(self.kept, kept)
        return super().write(text)


def test_hundreds_of_sessions(a_server: Any, new_alias: Any) -> None:
    """All of them are listed, rightly, and none is kept once it is written."""
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    with holding(server.url(transport="tcp"), 300) as [holder]:
        out = Watched()
        sessions = Result(*dbhealth(*LIST, out=out)).database["sessions"]
        assert len(sessions) == 301
        pids = {each["id"]: each["processes"][0]["pid"] for each in sessions}
        assert {pids[session] for session in holder.ids} == {holder.pid}
        assert out.written == 301
        assert out.writes > 3
        assert out.kept <= 3


LIST = ["connections", "--database", "private", "--format", "json"]


def test_untrusted_words_are_harmless(a_server: Any, new_alias: Any) -> None:
    """What another program runs cannot write to the terminal."""
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    sql = "SELECT SLEEP(60) /* \x1b[31m\u202eevil\n[bold] */"
    connection = connections["private"]
    thread = threading.Thread(target=_execute, args=[server, sql])
    thread.start()
    try:
        server.wait_until_running("evil")
        out = dbhealth("connections", "--database", "private").out
        assert "evil [bold]" in out
        assert "\x1b" not in out
        assert "\u202e" not in out
    finally:
        for session in server.sessions(USER):
            with suppress(server.operational_error):
                server.kill_connection(session.id)
        thread.join()
    connection.close()


def _execute(server: Server, sql: str) -> None:
    import MySQLdb

    with pytest.raises(MySQLdb.OperationalError):
        MySQLdb.connect(
            host=server.host, port=server.port, user=USER, password=PASSWORD, charset="utf8mb4"
        ).cursor().execute(sql)


# Without a free slot


@pytest.fixture
def full(a_server: Any, new_alias: Any) -> Iterator[tuple[Server, Holder]]:
    """A MariaDB on which another process holds all that the account may have."""
    server = a_server("mariadb")
    server.grant_limit(USER, 3)
    new_alias(server.django(transport="tcp"))
    new_alias(reserved(server), "reserved")
    with holding(server.url(transport="tcp"), 3) as [holder]:
        yield server, holder


def test_through_a_reserved_account(full: tuple[Server, Holder]) -> None:
    """--using-alias asks as another account, which has a slot."""
    _, holder = full
    result = ask("connections", "--using-alias", "reserved")
    assert (result.status, result.err) == (0, "")
    assert result.database["through"] == "reserved"
    sessions = {each["id"]: each for each in result.database["sessions"]}
    for session in holder.ids:
        assert processes(sessions[session]) == [(holder.pid, holder.command)]
    report = ask("report", "--using-alias", "reserved").database
    assert report["processes"][0]["process"]["pid"] == holder.pid


def test_waits_for_a_slot(full: tuple[Server, Holder]) -> None:
    """It says that it waits, and lists who is left once one is free."""
    server, holder = full
    with holding(reserved_url(server), 1) as [other]:
        command = ["django", "dbhealth", "connections", "--format", "json", "--wait", "30"]
        process = start(*command, url=server.url(transport="tcp"))
        assert process.stderr
        assert "No slot is free for 'default' (1226 " in process.stderr.readline()
        holder.close()
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        ids = {each["id"] for each in Result(0, out, "").database["sessions"]}
        assert not set(holder.ids) <= ids
        assert ids - set(holder.ids)  # its own, at least
        assert other.ids[0] not in ids  # another account's


def reserved_url(server: Server) -> str:
    return server.url(transport="tcp").replace(f"{USER}:", f"{ADMIN}:", 1)


@pytest.mark.parametrize("subcommand", ["connections", "report", "terminate"])
def test_what_can_be_seen_without_a_connection(
    full: tuple[Server, Holder], subcommand: str
) -> None:
    """This machine's sockets to the server and their processes, and the exit status 1."""
    _, holder = full
    more = ["--idle-over", "1", "--noinput"] if subcommand == "terminate" else []
    text = dbhealth(subcommand, *more, "--database", "private", "--wait", "0")
    assert text.status == 1
    assert re.search(row_of(holder, sockets=3), text.out, re.MULTILINE)
    assert "1226 ER_USER_LIMIT_REACHED" in text.err
    result = ask(subcommand, *more, "--wait", "0")
    assert result.status == 1
    assert result.database["error"]["kind"] == "no free slot"
    if subcommand != "terminate":
        [sockets] = result.database["sockets" if subcommand == "connections" else "processes"]
        assert sockets["process"]["pid"] == holder.pid
        assert sockets["sockets"] == 3


@pytest.mark.parametrize(
    ("kind", "transport"), [("mariadb", "socket"), ("postgresql", "tcp"), ("postgresql", "socket")]
)
def test_sockets_of_every_kind(kind: str, transport: Any, a_server: Any, new_alias: Any) -> None:
    """The same over unix sockets, and for PostgreSQL's refusals, which have no code."""
    server = a_server(kind)
    server.grant_limit(USER, 2)
    new_alias(server.django(transport=transport))
    with holding(server.url(transport=transport), 2) as [holder]:
        result = ask("connections", "--wait", "0")
        assert result.status == 1
        assert result.database["error"]["kind"] == "no free slot"
        [sockets] = result.database["sockets"]
        assert sockets["process"]["pid"] == holder.pid
        assert sockets["sockets"] == 2


@pytest.mark.parametrize(
    ("kind", "settings", "slots", "words"),
    [
        ("mariadb", {"max_connections": 10}, 10, "1040 ER_CON_COUNT_ERROR"),
        ("mariadb", {"max_user_connections": 3}, 3, "1203 ER_TOO_MANY_USER_CONNECTIONS"),
        ("postgresql", {"max_connections": 8}, 5, "reserved"),  # three are the superuser's
    ],
)
def test_full_servers(
    kind: str, settings: Any, slots: int, words: str, new_server: Any, new_alias: Any
) -> None:
    """Whatever limit is used up: an administrator's account still gets in."""
    server = new_server(kind, **settings)
    new_alias(server.django(transport="tcp"))
    new_alias(reserved(server), "reserved")
    with holding(server.url(transport="tcp"), slots) as [holder]:
        refused = dbhealth("connections", "--database", "private", "--wait", "0")
        assert refused.status == 1
        assert words in refused.err
        assert re.search(row_of(holder, sockets=slots), refused.out, re.MULTILINE)
        found = ask("connections", "--using-alias", "reserved").database["sessions"]
        assert set(holder.ids) <= {each["id"] for each in found}


# terminate


@pytest.mark.parametrize("kind", KINDS)
def test_terminate_ends_the_idle_ones(kind: str, a_server: Any, new_alias: Any) -> None:
    """Exactly those; their processes heal at the next query, and the busy ones are left alone."""
    server = a_server(kind)
    new_alias(server.django(transport="tcp"))
    with holding(server.url(transport="tcp"), 2, 2, 1) as (busy, idle, other):
        busy.keep_busy(0)
        before = {holder: list(holder.ids) for holder in (busy, idle, other)}
        expected = {busy.ids[1], *idle.ids, *other.ids}
        wait_for(
            lambda: {each.id for each in server.sessions(USER) if each.idle_seconds > 2} == expected
        )
        dry = ask("terminate", "--idle-over", "2", "--dry-run")
        assert {each["result"] for each in dry.database["sessions"]} == {"dry run"}
        server.wait_for_sessions(5, USER)

        result = ask("terminate", "--idle-over", "2", "--noinput")
        assert result.status == 0
        found = result.database["sessions"]
        assert {each["id"] for each in found} == expected
        assert {each["result"] for each in found} == {"terminated"}
        for session in expected:
            server.wait_until_gone(session)
        wait_for(lambda: ids_on(server) == [before[busy][0]])
        for holder in (idle, other):
            assert not set(holder.query()) & set(before[holder])  # healed
        again = dbhealth("terminate", "--idle-over", "3600", "--noinput", "--database", "private")
        assert again.status == 0
        assert "no session to terminate" in again.out


def test_limit_takes_the_longest_idle(a_server: Any, new_alias: Any) -> None:
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    with holding(server.url(transport="tcp"), 1) as [first]:
        wait_for(lambda: server.sessions(USER)[0].idle_seconds > 0.5)
        with holding(server.url(transport="tcp"), 1) as [second]:
            wait_for(lambda: min(each.idle_seconds for each in server.sessions(USER)) > 0.1)
            arguments = ["terminate", "--idle-over", "0.1", "--limit", "1", "--noinput"]
            [session] = ask(*arguments).database["sessions"]
            assert session["id"] == first.ids[0]
            server.wait_until_gone(first.ids[0])
            wait_for(lambda: ids_on(server) == second.ids)


def test_terminate_asks_first(a_server: Any, new_alias: Any, monkeypatch: Any) -> None:
    """Whatever is not yes is no; where nobody can answer nothing happens."""
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    arguments = ["terminate", "--idle-over", "0.1", "--database", "private"]
    with holding(server.url(transport="tcp"), 1) as [holder]:
        wait_for(lambda: server.sessions(USER)[0].idle_seconds > 0.1)
        for answer, status in (("n\n", 0), ("\n", 0), ("", 2)):
            monkeypatch.setattr(sys, "stdin", StringIO(answer))
            result = dbhealth(*arguments)
            assert result.status == status
            assert "Terminate 1 session? [y/N]" in result.err
            wait_for(lambda: ids_on(server) == holder.ids)
        monkeypatch.setattr(sys, "stdin", StringIO("y\n"))
        assert "Terminated 1 session." in dbhealth(*arguments).out
        server.wait_until_gone(holder.ids[0])
    assert dbhealth(*arguments, "--format", "json").status == 2


def test_other_accounts_are_left_alone(a_server: Any, new_alias: Any) -> None:
    """Unless --all-users; and with --using-alias the account is that of --database."""
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    new_alias(reserved(server), "reserved")
    server.execute(f"CREATE USER other@'%' IDENTIFIED BY '{PASSWORD}'")
    server.execute("GRANT ALL ON *.* TO other@'%'")
    url = server.url(transport="tcp")
    with holding(url, 1) as [ours], holding(url.replace(USER, "other", 1), 1) as [theirs]:
        wait_for(lambda: min(each.idle_seconds for each in server.sessions()) > 0.1)
        through = ["terminate", "--idle-over", "0.1", "--using-alias", "reserved"]
        [session] = ask(*through, "--dry-run").database["sessions"]
        assert session["id"] == ours.ids[0]
        found = ask(*through, "--noinput", "--all-users").database["sessions"]
        assert {each["id"] for each in found} == {*ours.ids, *theirs.ids}
        server.wait_for_sessions(0)


@contextmanager
def replicated(server: Server, replica: Server | None) -> Iterator[None]:
    """Have the account replicate from a server: a MariaDB, or a session of PostgreSQL's."""
    if replica is None:
        server.execute(f"ALTER ROLE {USER} REPLICATION")
        address = f"host={server.host} port={server.port} user={USER} password={PASSWORD}"
        with psycopg.connect(f"{address} dbname=test replication=database", autocommit=True):
            yield
        return
    replica.execute(
        f"CHANGE MASTER TO MASTER_HOST = '{server.host}', MASTER_PORT = {server.port}, "
        f"MASTER_USER = '{USER}', MASTER_PASSWORD = '{PASSWORD}'"
    )
    replica.execute("START SLAVE")
    yield


@pytest.mark.parametrize("kind", KINDS)
def test_replication_is_left_alone(kind: str, new_server: Any, new_alias: Any) -> None:
    """However long it waits for something to do, and though it is the account's."""
    replica = None
    if kind == "mariadb":
        server = new_server(kind, log_bin="binlog", server_id=1)
        server.execute(f"GRANT REPLICATION SLAVE ON *.* TO {USER}@'%'")
        replica = new_server(kind, server_id=2)
    else:
        server = new_server(kind, wal_level="replica", max_wal_senders=1)
    new_alias(server.django(transport="tcp"))

    def listed() -> list[Any]:
        sessions: list[Any] = ask("connections").database["sessions"]
        return sessions

    with (
        replicated(server, replica),
        holding(server.url(transport="tcp"), 1) as [holder],
    ):
        three = wait_for(lambda: len(found := listed()) == 3 and found)
        [stays] = {each["id"] for each in three if not each["is_own"]} - {*holder.ids}
        wait_for(lambda: max(each.idle_seconds for each in server.sessions(USER)) > 0.5)
        [ended] = ask("terminate", "--idle-over", "0.1", "--noinput").database["sessions"]
        assert ended["id"] == holder.ids[0]
        server.wait_until_gone(holder.ids[0])
        assert stays in {each["id"] for each in listed()}
    if replica is not None:  # its own threads are nobody's sessions
        new_alias(replica.django(transport="tcp"), "replica")
        [own] = ask("connections", alias="replica").database["sessions"]
        assert own["is_own"]


def test_pooler_is_refused(a_server: Any, new_alias: Any) -> None:
    """By the setting, and where the server's words show that there is one."""
    server = a_server("postgresql")
    with PgBouncer(server, pool_mode="session") as pooler:
        address = {"HOST": pooler.host, "PORT": str(pooler.port)}
        new_alias(server.django(transport="tcp", **address))
        direct = new_alias(server.django(transport="tcp"), "direct")
        with holding(server.url(transport="tcp"), 1) as [holder]:
            arguments = ["terminate", "--idle-over", "0", "--noinput"]
            result = dbhealth(*arguments, "--database", "private")
            assert result.status == 2
            assert "pooler" in result.err
            other = new_alias(server.django(transport="tcp"), "other")
            with override_settings(DBHEALTH={"DATABASES": {direct: {"POOLER": "transaction"}}}):
                both = ["--database", other, "--database", direct]
                assert dbhealth(*arguments, *both).status == 2
            assert holder.ids[0] in ids_on(server)
        report = ask("report").database
        assert (report["error"], report["server"]["is_pooled"]) == (None, True)
        assert ask("connections").status == 0


# report


@pytest.mark.parametrize("kind", KINDS)
def test_report(kind: str, new_server: Any, new_alias: Any) -> None:
    """Its figures are the server's own."""
    limit = {"mariadb": {"max_connections": 77}, "postgresql": {"max_connections": 27}}[kind]
    server = new_server(kind, **limit)
    server.grant_limit(USER, 19)
    new_alias(server.django(transport="tcp"))
    with holding(server.url(transport="tcp"), 2) as [holder]:
        result = ask("report")
        database = result.database
        assert result.status == 0
        assert result.data["healthy"] is True
        assert database["status"] in ("pass", "warn")
        assert database["error"] is None
        told = database["server"]
        version = server.execute({"mariadb": "SELECT VERSION()"}.get(kind, "SHOW server_version"))
        assert told["version"] == version[0][0]
        by_scope = {each["scope"]: each for each in told["limits"]}
        assert by_scope["account"]["maximum"] == 19
        assert by_scope["account"]["used"] == 3
        assert by_scope["server"]["maximum"] in (77, 24)  # PostgreSQL reserves three
        if kind == "mariadb":
            for name in ("wait_timeout", "net_read_timeout", "net_write_timeout"):
                [(value,)] = server.execute(f"SELECT @@GLOBAL.{name}")
                assert told["timeouts"][name] == value
        assert database["in_use"][0]["sessions"] == 3
        assert database["in_use"][0]["user"] == USER
        assert database["round_trip_ms"] > 0
        [mine] = database["processes"]
        assert (mine["process"]["pid"], mine["sockets"]) == (holder.pid, 2)
        text = dbhealth("--database", "private")  # report is the default
        assert text.status == 0
        assert told["version"] in text.out
        assert text.out.splitlines()[-1].startswith("Healthy")


def test_report_finds_what_does_not_fit(new_server: Any, new_alias: Any) -> None:
    """The server's real timeout against the settings; what cannot work is unhealthy."""
    server = new_server("mariadb", wait_timeout=7)
    new_alias(server.django(CONN_MAX_AGE=60))
    result = ask("report")
    assert (result.status, result.database["status"]) == (0, "warn")
    assert "django_dbhealth.W102" in [each["id"] for each in result.database["findings"]]
    assert "W102" in dbhealth("report", "--database", "private").out.splitlines()[-1]
    new_alias(server.django(CONN_MAX_AGE="60"), "text")
    result = ask("report", alias="text")
    assert (result.status, result.database["status"]) == (1, "fail")
    assert "'text'" in result.err


def test_sqlite() -> None:
    """There is nothing to ask, which is healthy."""
    for subcommand in (["report"], ["connections"], ["terminate", "--idle-over", "1", "--noinput"]):
        result = ask(*subcommand, alias="sqlite")
        assert (result.status, result.err) == (0, "")
        assert result.database["error"] is None
        text = dbhealth(*subcommand, "--database", "sqlite")
        assert text.status == 0
        assert "nothing to ask" in text.out
    assert ask("wait", alias="sqlite").database["answers"] is True


@pytest.mark.parametrize("subcommand", ["report", "connections", "wait"])
def test_sqlite_in_memory_is_not_left_open(subcommand: str, monkeypatch: Any) -> None:
    """Its backend's close(), which is called first, leaves it open."""
    opened, closed = [], []
    close = DatabaseWrapper.close

    def note_close(connection: DatabaseWrapper) -> None:
        closed.append(connection)
        close(connection)

    monkeypatch.setattr(DatabaseWrapper, "close", note_close)

    def note(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        opened.append(connection)

    register("memory", {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"})
    connection_created.connect(note)
    try:
        assert dbhealth(subcommand, "--database", "memory").status == 0
    finally:
        connection_created.disconnect(note)
        unregister("memory")
    assert opened
    assert set(opened) <= set(closed)
    assert all(each.connection is None for each in opened)


def test_all_aliases_and_several(mariadb: Server, postgresql: Server) -> None:
    """Without --database all are asked; one that fails does not keep the others from answering."""
    data = dbhealth("--format", "json").data
    assert {"default", "postgresql", "sqlite"} <= {each["alias"] for each in data["databases"]}
    result = dbhealth(
        "--database", "sqlite", "connections", "--database", "default", "--format=json"
    )
    assert [each["alias"] for each in result.data["databases"]] == ["sqlite", "default"]
    register("nowhere", mariadb.django(transport="tcp", PORT="9"))
    result = dbhealth("report", "--database=nowhere", "--database=sqlite", "--format=json")
    assert result.status == 1
    assert [each["status"] for each in result.data["databases"]] == ["fail", "pass"]
    unregister("nowhere")


# wait


def test_wait(new_server: Any) -> None:
    """It returns within a second of the start of a server that was down for ten seconds.

    All but that second are for the process to end. Two more tries, should the machine be busy.
    """
    servers = [new_server(kind) for kind in KINDS]
    assert any(max(seconds_to_notice(servers)) < 5 for _ in range(3))


def seconds_to_notice(servers: list[Server]) -> list[float]:
    """Return how long after its start each server is found to answer."""
    waiting, seconds = [], []
    for server in servers:
        server.stop()
        url = server.url(transport="tcp")
        waiting.append(start("django", "dbhealth", "wait", "--timeout", "60", url=url))
    for process in waiting:
        assert "Waiting for 'default'" in process.stderr.readline()
    time.sleep(10)
    for server, process in zip(servers, waiting, strict=True):
        assert process.poll() is None
        server.start()
        began = time.monotonic()
        out, _ = process.communicate(timeout=30)
        seconds.append(time.monotonic() - began)
        assert process.returncode == 0
        assert re.search(r"default: answers, after [1-9]\d", out)
    return seconds


def test_wait_in_vain(new_server: Any, new_alias: Any) -> None:
    """It ends at its timeout; wrong credentials and unknown databases end it at once."""
    server = new_server("mariadb")
    settings = server.django(transport="tcp")
    new_alias({**settings, "PASSWORD": "wrong"}, "wrong")
    new_alias({**settings, "NAME": "nowhere"}, "nowhere")
    new_alias(settings)
    for alias, code in (("wrong", 1045), ("nowhere", 1049)):
        began = time.monotonic()
        result = ask("wait", "--timeout", "60", alias=alias)
        assert result.status == 1
        assert result.database["error"]["code"] == code
        assert time.monotonic() - began < 30
    server.stop()
    result = ask("wait", "--timeout", "0.5")
    assert result.status == 1
    assert result.database["waited_seconds"] >= 0.5
    assert result.database["error"]["kind"] == "unreachable"


def test_wait_for_a_server_that_hangs(new_server: Any, new_alias: Any) -> None:
    """A server that accepts and says nothing does not answer."""
    for kind in KINDS:
        server = new_server(kind)
        alias = new_alias(server.django(transport="tcp"), f"the {kind}")
        server.freeze()
        result = ask("wait", "--timeout", "1.5", alias=alias)
        server.thaw()
        assert result.status == 1
        assert result.database["answers"] is False
        assert ask("wait", alias=alias).database["answers"] is True


# On a terminal

ESCAPE = "\x1b"


class Terminal(StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 160])
def test_terminal(columns: int, a_server: Any, new_alias: Any, monkeypatch: Any) -> None:
    """No line is wider than it, and --no-color writes text alone."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    server = a_server("mariadb")
    new_alias(server.django(transport="tcp"))
    private = ["--database", "private"]
    with holding(server.url(transport="tcp"), 2):
        wait_for(lambda: min(each.idle_seconds for each in server.sessions(USER)) > 0.1)
        for arguments in (
            ["report", *private],
            ["connections", *private],
            ["connections", "--by", "host", *private],
            ["terminate", "--idle-over", "0.1", "--dry-run", *private],
            ["wait", *private],
            ["explain", "2006"],
        ):
            text = dbhealth(*arguments, "--no-color", out=Terminal()).out
            assert ESCAPE not in text
            assert max(map(len, text.splitlines())) < columns, arguments
            assert ("\N{BOX DRAWINGS LIGHT HORIZONTAL}" in text) is (
                arguments[0] not in ("wait", "explain")
            )
            coloured = dbhealth(*arguments, "--force-color", out=Terminal()).out
            assert (ESCAPE in coloured) is (arguments[0] not in ("wait", "explain"))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "--database", "defualt"], "Did you mean 'default'?"),
        (["report", "--using-alias", "nowhere"], "'nowhere'"),
        (["connections", "--database", "default", "--using-alias", "sqlite"], "different kinds"),
        (["terminate", "--idle-over", "-5"], "0 or more"),
        (["terminate", "--idle-over", "soon"], "0 or more"),
        (["terminate", "--idle-over", "nan"], "0 or more"),
        (["terminate", "--idle-over", "1", "--limit", "0"], "1 or more"),
        (["terminate"], "--idle-over"),
        (["connections", "--by", "moon"], "invalid choice"),
        (["connections", "--watch", "0"], "above 0"),
        (["nonsense"], "invalid choice"),
        (["report", "--format", "xml"], "invalid choice"),
    ],
)
def test_wrong_usage(arguments: Sequence[str], words: str, capsys: Any) -> None:
    result = dbhealth(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert words in result.err + capsys.readouterr().err


def test_settings_that_do_not_work(
    new_alias: Any, mariadb: Server, request: pytest.FixtureRequest
) -> None:
    """A driver that is not there, an option that it does not take: a sentence and 1."""
    connections.settings["engine"] = {**connections.settings["default"], "ENGINE": "no.such"}
    request.addfinalizer(lambda: connections.settings.pop("engine"))
    new_alias(mariadb.django(OPTIONS={"nonsense": 1}), "option")
    for alias, words in (("engine", "no.such"), ("option", "nonsense")):
        for subcommand in ("report", "connections", "wait"):
            result = dbhealth(subcommand, "--database", alias)
            assert result.status == 1
            assert words in result.err


@pytest.mark.parametrize("subcommand", ["report", "connections"])
def test_server_that_cannot_be_asked(subcommand: str, new_server: Any, new_alias: Any) -> None:
    """Down, hung, in the middle of its shutdown, or with the wrong password: a sentence and 1."""
    server = new_server("postgresql")
    settings = server.django(transport="tcp")
    new_alias(settings)
    new_alias({**settings, "PASSWORD": "wrong-password"}, "wrong")
    wrong = dbhealth(subcommand, "--database", "wrong")
    assert wrong.status == 1
    assert "password authentication failed" in wrong.err
    assert "wrong-password" not in wrong.err + wrong.out
    with override_settings(DBHEALTH={"PING_TIMEOUT": 1}):
        server.freeze()
        # Whoever comes late finds what the driver itself says after two seconds.
        wait_for(lambda: "within 1 s" in dbhealth(subcommand, "--database", "private").err)
        server.thaw()
    with holding(server.url(transport="tcp"), 1):  # whom a smart shutdown waits for
        os.kill(server.pid, 15)
        wait_for(lambda: "shutting down" in dbhealth(subcommand, "--database", "private").err)
    wait_for(lambda: not server.running)
    down = ask(subcommand)
    assert down.status == 1
    assert down.database["error"]["kind"] == "unreachable"
    assert down.err.startswith("CommandError: The database 'private' cannot be asked: ")


@contextmanager
def after_first_answer(vendor: type[Vendor], then: Callable[[], None]) -> Iterator[None]:
    """Let something happen to the server when it has answered once: real, and at that moment."""
    original = vendor.server_state

    def answer_and_then(self: Any, connection: Any) -> Any:
        state = original(self, connection)
        then()
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendor, "server_state", answer_and_then)
        yield


def test_server_that_goes_away_meanwhile(new_server: Any, new_alias: Any) -> None:
    """The JSON is whole, whatever happens after its beginning."""
    server = new_server("mariadb")
    new_alias(server.django(transport="tcp"))
    with after_first_answer(MySQL, server.kill):
        result = ask("connections")
    assert result.status == 1
    assert result.database["sessions"] == []
    assert result.database["server"]["product"] == "MariaDB"
    assert result.database["error"]["kind"] == "lost"


def test_server_that_hangs_meanwhile(new_server: Any, new_alias: Any) -> None:
    """No question takes longer than PING_TIMEOUT, although psycopg has no bound for one."""
    server = new_server("postgresql")
    new_alias(server.django(transport="tcp"))
    with (
        override_settings(DBHEALTH={"PING_TIMEOUT": 1}),
        after_first_answer(PostgreSQL, server.freeze),
    ):
        result = ask("connections")
    server.thaw()
    assert result.status == 1
    assert result.database["error"]["message"]


@pytest.mark.parametrize("subcommand", ["report", "connections --watch 0.1", "connections"])
def test_nobody_reads(subcommand: str, mariadb: Server) -> None:
    """A pipe that is closed ends it quietly, --watch too."""
    read, write = os.pipe()
    os.close(read)
    process = start("django", "dbhealth", *subcommand.split(), url=mariadb.url(), stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_interrupt(mariadb: Server) -> None:
    """Ctrl-C ends --watch without a traceback."""
    process = start("django", "dbhealth", "connections", "--watch", url=mariadb.url())
    assert process.stdout
    while not process.stdout.readline().startswith("default: "):
        pass
    process.send_signal(2)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""


# How it is called


def test_global_options_before_and_after(mariadb: Server) -> None:
    before = dbhealth("--format", "json", "--database", "default", "--no-color", "connections")
    after = dbhealth(
        "connections", "--no-color", "-v", "1", "--database", "default", "--format=json"
    )
    for result in (before, after):
        assert result.status == 0
        assert result.database["alias"] == "default"
    both = dbhealth("--format", "json", "report", "--format", "text", "--database", "default")
    assert both.out.startswith("default: MariaDB")
    for traceback in (["--traceback", "report"], ["report", "--traceback"]):
        with pytest.raises(CommandError):
            dbhealth(*traceback, "--database", "nowhere")


def test_call_command(mariadb: Server) -> None:
    """Options by name, as other programs call it."""
    out = StringIO()
    call_command("dbhealth", "connections", database=["default"], format="json", stdout=out)
    assert Result(0, out.getvalue(), "").database["alias"] == "default"


@pytest.fixture
def plain() -> dict[str, str]:
    return {key: each for key, each in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}


def run_module(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "django_dbhealth", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_a_project(mariadb: Server, plain: dict[str, str]) -> None:
    """From DATABASE_URL alone, or from settings that do not have the app."""
    env = {**plain, "DATABASE_URL": mariadb.url()}
    result = run_module("--format", "json", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert Result(0, result.stdout, "").database["status"] in ("pass", "warn")
    settings = {**env, "PLAIN_DJANGO": "1", "DJANGO_SETTINGS_MODULE": "example_project.settings"}
    assert run_module("wait", env=settings).returncode == 0


def test_settings_that_cannot_be_imported(plain: dict[str, str]) -> None:
    result = run_module(env={**plain, "DJANGO_SETTINGS_MODULE": "no.such.module"})
    assert result.returncode == 2
    assert result.stderr.startswith("The settings cannot be used. ")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (None, "No database is named."),
        ("nonsense", "DATABASE_URL is no URL"),
        ("mysql://u:sec/secret@h/x", "DATABASE_URL is no URL"),
        ("nonsense://u:secret@h/x", "isn't an available database backend"),
        ("mysql://u:secret@127.0.0.1:9/x", "2002 CR_CONNECTION_ERROR"),
    ],
)
def test_without_a_database(url: str | None, words: str, plain: dict[str, str]) -> None:
    result = run_module(env={**plain, **({"DATABASE_URL": url} if url else {})})
    assert result.returncode == (1 if url and "u:secret@" in url and "://" in url else 2)
    assert words in result.stderr
    assert "secret" not in result.stderr
    assert "Traceback" not in result.stderr


def test_without_environ(plain: dict[str, str], tmp_path: Path) -> None:
    """It says what to install."""
    (tmp_path / "environ.py").write_text("raise ImportError\n")
    env = {**plain, "DATABASE_URL": "mysql://u:secret@h/x", "PYTHONPATH": str(tmp_path)}
    result = run_module(env=env)
    assert result.returncode == 2
    assert result.stderr == "DATABASE_URL is read with django-environ: pip install django-environ\n"
