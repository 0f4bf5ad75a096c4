"""A refused connection is tried again for a while, and only where waiting can help."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import call_command
from django.db import Error, OperationalError, connections, transaction
from django.db.backends.signals import connection_created
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from django_dbhealth import Kind, LongRunningCommand, Outcome, classify
from django_dbhealth.backoff import FIRST_DELAY, LONGEST_DELAY, Backoff
from django_dbhealth.connecting import patient
from django_dbhealth.signals import connection_refused
from django_dbhealth.vendors import driver_of
from django_dbhealth.vendors.base import readable
from tests.conftest import register, unregister
from tests.faults import DRIVERS
from tests.outcomes import session_id, socket_ended
from tests.servers import Proxy
from tests.servers.base import USER, wait_for
from tests.test_commands import running, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["mariadb", "postgresql"]


# When


@given(st.floats(0, 1e6), st.floats(0.001, 1e5))
def test_delays(now: float, timeout: float) -> None:
    """Delays begin small, at most double, never pass the limit; the last try is at its end."""
    backoff = Backoff(now=now, timeout=timeout)
    end, longest = now + timeout, FIRST_DELAY
    for _ in range(50):
        delay = backoff.next_delay(now)
        assert delay is not None
        assert longest / 2 <= delay <= longest or now + delay == pytest.approx(end)
        assert delay <= LONGEST_DELAY
        longest = min(2 * longest, LONGEST_DELAY)
        now += delay
        if now >= end:
            break
    assert backoff.next_delay(end) is None


def test_no_time_no_second_try() -> None:
    """With a limit of 0 the first refusal is the last."""
    assert Backoff(now=5, timeout=0).next_delay(5) is None


def test_clients_do_not_come_back_together() -> None:
    """Of a hundred that are refused at one moment, hardly two come back at one moment."""
    delays = {Backoff(now=0, timeout=60).next_delay(0) for _ in range(100)}
    assert len(delays) > 90
    assert max(delays) - min(delays) > FIRST_DELAY / 4  # type: ignore[operator, type-var]


# What


@contextmanager
def refusals() -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    def receiver(sender: Any, signal: Any, **arguments: Any) -> None:
        seen.append(arguments)

    connection_refused.connect(receiver)
    yield seen
    connection_refused.disconnect(receiver)


@contextmanager
def at_refusal(number: int, action: Callable[[], Any]) -> Iterator[None]:
    """Do something when a connect is refused for the first time, or a later one."""
    refused = 0

    def receiver(**arguments: Any) -> None:
        nonlocal refused
        refused += 1
        if refused == number:
            action()

    connection_refused.connect(receiver)
    try:
        yield
    finally:
        connection_refused.disconnect(receiver)


def holding(server: Server, count: int) -> ExitStack:
    """Occupy so many slots of the tests' account."""
    stack = ExitStack()
    for number in range(count):
        name = f"holder{number}"
        register(name, server.django())
        stack.callback(unregister, name)
        wait_for(partial(is_open, connections[name]), interval=0.05)
    return stack


def is_open(connection: Any) -> bool:
    """Connect. A session that was closed a moment ago may still have its slot."""
    with suppress(OperationalError):
        connection.ensure_connection()
    return connection.connection is not None


@pytest.mark.parametrize("kind", KINDS)
def test_server_that_starts_is_waited_for(
    kind: str, new_server: Any, add_database: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is down at first is reached once it is up; each refusal is told."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.stop()
    caplog.set_level(logging.INFO, "django_dbhealth")
    with (
        override_settings(DBHEALTH={"CONNECT_RETRY_TIMEOUT": 20}),
        refusals() as seen,
        at_refusal(2, server.start),
        connections[alias].cursor() as cursor,
    ):
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)
    assert {arguments["reason"] for arguments in seen} == {"unreachable"}
    assert {arguments["alias"] for arguments in seen} == {alias}
    durations = [arguments["duration"] for arguments in seen]
    assert durations == sorted(durations)
    assert len(seen) >= 2
    records = [r for r in caplog.records if "was refused" in r.message]
    assert len(records) == len(seen)
    assert all(r.levelname == "WARNING" and r.alias == alias for r in records)  # type: ignore[attr-defined]
    assert "The next try is in 0." in records[0].message


@pytest.fixture(params=[name for name, driver in DRIVERS.items() if driver.engine])
def proxied(
    request: pytest.FixtureRequest, new_server: Any, add_database: Any
) -> Iterator[tuple[str, Server, Proxy]]:
    """A connection over each driver, its server, and the proxy between them."""
    driver = DRIVERS[request.param]
    server = new_server(driver.kind)
    with Proxy(server.host, server.port) as proxy:
        settings = server.django(
            transport="tcp", PORT=str(proxy.port), ENGINE=driver.engine, TIME_ZONE="Asia/Tokyo"
        )
        yield add_database(settings), server, proxy


@pytest.mark.parametrize("way", ["killed", "cut"])
def test_connection_lost_while_it_is_set_up(
    proxied: tuple[str, Server, Proxy], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes when it has let the client in is waited for too: a restart takes time."""
    name, server, proxy = proxied
    connection: Any = connections[name]
    losses = 3
    get_new_connection = connection.get_new_connection

    def lose_it(parameters: Any) -> Any:
        nonlocal losses
        handle = get_new_connection(parameters)
        if losses:
            losses -= 1
            if way == "killed":
                for session in server.sessions(USER):
                    server.kill_connection(session.id)
            else:
                proxy.cut()
            descriptor = driver_of(connection).descriptor(handle)  # type: ignore[union-attr]
            wait_for(lambda: readable(descriptor))  # type: ignore[arg-type]
        return handle

    monkeypatch.setattr(connection, "get_new_connection", lose_it)
    with refusals() as seen:
        with pytest.raises(OperationalError) as raised:
            connection.ensure_connection()
        fault = classify(raised.value)
        assert fault
        assert (fault.kind, fault.outcome) == (Kind.UNREACHABLE, Outcome.NOT_EXECUTED)
        assert "No statement ran." in "\n".join(raised.value.__notes__)
        assert connection.connection is None  # half set up it would be of no use
        with patient(20, time.sleep), connection.cursor() as cursor:
            cursor.execute("SELECT 2")
            assert cursor.fetchone() == (2,)
    assert [arguments["reason"] for arguments in seen] == ["unreachable"] * 3


@pytest.mark.parametrize("whose", ["own", "another's"])
def test_what_a_receiver_does_is_not_done_again(
    proxied: tuple[str, Server, Proxy], whose: str, add_database: Any
) -> None:
    """A statement of a receiver of connection_created may have run: that is no refused connect."""
    name, server, _ = proxied
    other = add_database(server.django(ENGINE=connections[name].settings_dict["ENGINE"]), "other")
    used = connections[name if whose == "own" else other]
    used.ensure_connection()
    calls = 0

    def receiver(connection: Any, **arguments: Any) -> None:
        nonlocal calls
        if connection.alias == name:
            calls += 1
            block = nullcontext() if used is connection else transaction.atomic(other)
            with block:  # or the other one would be healed
                server.kill_connection(session_id(used))
                wait_for(lambda: socket_ended(used))
                session_id(used)

    connections[name].close()
    connection_created.connect(receiver)
    try:
        with refusals() as seen, patient(20, time.sleep), pytest.raises(Error):
            connections[name].ensure_connection()
    finally:
        connection_created.disconnect(receiver)
    assert calls == 1
    assert seen == []
    assert connections[name].connection is not None  # as Django has it
    with connections[name].cursor() as cursor:
        cursor.execute("SELECT 2")
        assert cursor.fetchone() == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_limit(kind: str, new_server: Any, add_database: Any) -> None:
    """When the time is over the refusal is raised; without the setting at once."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.stop()
    for timeout, least in ((0, 0.0), (3, 3.0)):
        with (
            override_settings(DBHEALTH={"DATABASES": {alias: {"CONNECT_RETRY_TIMEOUT": timeout}}}),
            refusals() as seen,
        ):
            began = time.monotonic()
            with pytest.raises(OperationalError):
                connections[alias].ensure_connection()
            assert time.monotonic() - began >= least
            assert len(seen) >= (2 if timeout else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_free_slot_is_waited_for(kind: str, new_server: Any, add_database: Any) -> None:
    """A slot that another session gives back is taken (1226; "too many connections for role")."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.grant_limit(USER, 1)
    with holding(server, 1):
        with pytest.raises(OperationalError):
            connections[alias].ensure_connection()
        [session] = server.sessions(USER)
        with (
            refusals() as seen,
            patient(20, time.sleep),
            at_refusal(1, lambda: server.kill_connection(session.id)),
        ):
            # The holder is another thread's in real life; here it must not be given back.
            connections["holder0"].inc_thread_sharing()
            connections[alias].ensure_connection()
            connections["holder0"].dec_thread_sharing()
        assert {arguments["reason"] for arguments in seen} == {"no free slot"}


def test_full_server_is_waited_for(new_server: Any, add_database: Any) -> None:
    """1040 of MariaDB, likewise."""
    server = new_server("mariadb", max_connections=10)
    alias = add_database(server.django())
    with holding(server, 10), refusals() as seen:
        with pytest.raises(OperationalError, match="1040"):
            connections[alias].ensure_connection()
        assert seen[0]["reason"] == "no free slot"


@pytest.mark.parametrize("kind", KINDS)
def test_own_idle_connections_are_given_back(kind: str, new_server: Any, add_database: Any) -> None:
    """Two aliases of one thread and one slot: the idle one is closed for the other."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.grant_limit(USER, 1)
    with holding(server, 1):
        with patient(20, time.sleep):
            connections[alias].ensure_connection()
        assert connections["holder0"].connection is None


@pytest.mark.parametrize("kind", KINDS)
def test_connection_in_use_is_not_given_back(kind: str, new_server: Any, add_database: Any) -> None:
    """In a transaction the other alias keeps its connection, and the refusal is raised."""
    server = new_server(kind)
    alias = add_database(server.django())
    server.grant_limit(USER, 1)
    with holding(server, 1):
        with (
            transaction.atomic("holder0"),
            patient(0.3, time.sleep),
            pytest.raises(OperationalError),
        ):
            connections[alias].ensure_connection()
        assert connections["holder0"].connection is not None


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_credentials_are_never_tried_again(
    kind: str, new_server: Any, add_database: Any
) -> None:
    """A second try might lock the account: 1045, 28P01; nor a database that is not there."""
    server = new_server(kind)
    alias = add_database(server.django())
    settings = connections[alias].settings_dict
    for key, value in (("PASSWORD", "wrong"), ("NAME", "nowhere"), ("USER", "nobody")):
        right, settings[key] = settings[key], value
        with refusals() as seen, patient(20, time.sleep):
            began = time.monotonic()
            with pytest.raises(OperationalError):
                connections[alias].ensure_connection()
            assert time.monotonic() - began < 5
        assert seen == []
        settings[key] = right


def test_hourly_quota_is_never_waited_for(new_server: Any, add_database: Any) -> None:
    """1226 again, but it would last for up to an hour."""
    server = new_server("mariadb")
    alias = add_database(server.django())
    server.execute(f"ALTER USER {USER}@'%' WITH MAX_CONNECTIONS_PER_HOUR 1")
    connections[alias].ensure_connection()
    connections[alias].close()
    with refusals() as seen, patient(20, time.sleep):
        began = time.monotonic()
        with pytest.raises(OperationalError, match="1226.*max_connections_per_hour"):
            connections[alias].ensure_connection()
        assert time.monotonic() - began < 5
    assert seen == []


def test_exhausted_pool_is_a_refusal(new_server: Any, add_database: Any) -> None:
    """Django's pool has no free slot: its timeout is tried again, as long as there is time."""
    server = new_server("postgresql")
    pool = {"min_size": 1, "max_size": 1, "timeout": 0.1}
    alias = add_database(server.django(OPTIONS={"pool": pool}), CONN_MAX_AGE=0)
    handle = connections[alias].pool
    handle.open()
    taken = handle.getconn(timeout=20)
    with (
        refusals() as seen,
        patient(20, time.sleep),
        at_refusal(1, lambda: handle.putconn(taken)),
        connections[alias].cursor() as cursor,
    ):
        cursor.execute("SELECT 1")
    assert {arguments["reason"] for arguments in seen} == {"no free slot"}


# Commands


@pytest.fixture
def server(new_server: Any, add_database: Any) -> Server:
    server: Server = new_server("mariadb")
    add_database(server.django())
    return server


def test_command_waits_for_its_server(server: Server) -> None:
    """Without any setting a command waits for a minute, and says so on standard error."""
    server.stop()
    with running(server, "job", "one_row") as job:
        line = b""
        while b"was refused" not in line:
            line = job.process.stderr.readline()  # type: ignore[union-attr]
        server.start()
        assert job.finish()[0] == 0
    assert stored(server) == ["row"]


def test_stop_request_ends_the_wait(server: Server) -> None:
    """SIGTERM ends a command that waits for its server, before it tries again."""
    server.stop()
    with running(server, "job", "one_row_late") as job:  # half a minute at least
        line = b""
        while b"The next try" not in line:
            line = job.process.stderr.readline()  # type: ignore[union-attr]
        job.process.terminate()
        status, _, error = job.finish()
    assert status == -signal.SIGTERM
    assert "was refused" not in error


class Impatient(LongRunningCommand):
    connect_retry_timeout = 3.0

    def handle(self, *args: Any, **options: Any) -> None:
        connections["private"].ensure_connection()


def test_commands_own_limit(server: Server) -> None:
    """connect_retry_timeout holds for the command, and no longer than it runs."""
    server.stop()
    with refusals() as seen:
        began = time.monotonic()
        with pytest.raises(OperationalError):
            call_command(Impatient())
        assert 3 <= time.monotonic() - began < 30  # a command's own would be a minute
        assert len(seen) > 1
        seen.clear()
        with pytest.raises(OperationalError):
            connections["private"].ensure_connection()
        assert len(seen) == 1


COPIES = 20
DAYS = 15
SLOTS = 5

WITHOUT_RETRY = """
import sys
from django.core.management import execute_from_command_line
import django
django.setup()
from example_project.management.commands.refresh_prices import Command
Command.connect_retry_timeout = 0
execute_from_command_line(sys.argv)
"""


def copies(server: Server, *program: str) -> list[tuple[int, str]]:
    """Run the example's command many times at once; return each one's status and errors.

    All slots are taken until every copy has been refused.
    """
    environment = {
        **os.environ,
        "DATABASE_URL": server.url(),
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
    }
    arguments = ["refresh_prices", "--days", str(DAYS), "--pause", "0.5"]
    slots = holding(server, SLOTS)
    before = server.status("Aborted_connects")
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(COPIES)
    ]
    try:
        with slots:
            wait_for(lambda: server.status("Aborted_connects") >= before + COPIES, timeout=50)
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.fixture
def shop(server: Server) -> Server:
    """The example project's tables, and five connections for its account."""
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v", "0"],
        cwd=ROOT,
        env={
            **os.environ,
            "DATABASE_URL": server.url(),
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
        },
        check=True,
        timeout=60,
    )
    server.wait_for_sessions(0, USER)
    server.grant_limit(USER, SLOTS)
    return server


def test_many_commands_share_few_slots(shop: Server) -> None:
    """Twenty copies at once under a limit of five connections: all finish, none fails."""
    results = copies(shop, "manage.py")
    assert not [error for status, error in results if status]
    refused = sum("no free slot" in error for _, error in results)
    assert refused > 0, "the limit was never met"
    [(days,)] = shop.execute("SELECT COUNT(DISTINCT date) FROM example_project_price", (), "test")
    assert days == DAYS


def test_without_the_retry_the_same_commands_fail(shop: Server) -> None:
    """What the test before shows is the retry's doing."""
    results = copies(shop, "-c", WITHOUT_RETRY)
    failed = [error for status, error in results if status]
    assert failed
    assert not [error for error in failed if not re.search(r"\(1226, .*max_user_con", error)]
