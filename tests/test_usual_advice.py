"""docs/usual-advice.md: what happens to whoever follows it, without the guard."""

from __future__ import annotations

import re
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import MySQLdb
import MySQLdb.cursors
import pymysql
import pytest
from django.db import Error, OperationalError, connections, transaction
from django.test import override_settings

from django_dbhealth import classify
from tests.app.models import Row
from tests.servers.base import PASSWORD, USER
from tests.test_docs import lose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database
    from tests.servers import Server

PAGE = Path(__file__).resolve().parent.parent / "docs" / "usual-advice.md"


@pytest.fixture
def plain() -> Iterator[None]:
    with override_settings(DBHEALTH={"GUARD": False}):
        yield


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("health_checks", [False, True])
@pytest.mark.parametrize("age", [0, 60, None])
def test_django_closes_old_connections(
    age: int | None, health_checks: bool, database: Database
) -> None:
    connection: Any = connections[database.alias]
    connection.settings_dict["CONN_MAX_AGE"] = age
    connection.settings_dict["CONN_HEALTH_CHECKS"] = health_checks
    lose(connection, database)
    for _ in range(3):
        with pytest.raises(Error):
            Row.objects.using(database.alias).count()
    with suppress(Error):
        connection.close()
    assert Row.objects.using(database.alias).count() == 0


@pytest.mark.usefixtures("plain")
def test_set_conn_max_age_0(database: Database) -> None:
    connection: Any = connections[database.alias]
    connection.settings_dict["CONN_MAX_AGE"] = 0
    handles = set()
    for _ in range(10):
        Row.objects.using(database.alias).count()
        handles.add(id(connection.connection))
    assert len(handles) == 1
    assert len(database.server.sessions()) == 1


def connect(server: Server, **options: Any) -> Any:
    account = {"user": USER, "password": PASSWORD, "database": "test", "autocommit": True}
    return MySQLdb.connect(host=server.host, port=server.port, **account | options)


def ask(handle: Any, sql: str) -> Any:
    with closing(handle.cursor()) as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


@pytest.fixture
def server(new_server: Any) -> Server:
    server: Server = new_server("mariadb", max_allowed_packet=16384)
    server.execute("CREATE TABLE test.written (id INT)")
    return server


def test_raise_wait_timeout(server: Server) -> None:
    with closing(connect(server)) as before:
        server.set(wait_timeout=4242)
        with closing(connect(server)) as after:
            assert ask(before, "SELECT @@wait_timeout") != ((4242,),)
            assert ask(after, "SELECT @@wait_timeout") == ((4242,),)


def test_catch_the_error_and_run_the_query_again(server: Server) -> None:
    for _ in range(2):
        with closing(connect(server, read_timeout=1)) as handle:
            with pytest.raises(OperationalErrors, match="2013") as caught:
                ask(handle, "INSERT INTO written SELECT SLEEP(5)")
            fault = classify(caught.value)
            assert fault
            assert not fault.safe_to_retry
    server.wait_for_sessions(0)
    assert server.execute("SELECT COUNT(*) FROM test.written") == [(2,)]


OperationalErrors = (MySQLdb.OperationalError, OperationalError)


@pytest.mark.usefixtures("plain")
def test_ping_before_each_query(server: Server, add_database: Any) -> None:
    connection: Any = connections[add_database(server.django())]
    connection.ensure_connection()
    connection.inc_thread_sharing()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(connection.is_usable()))
    server.freeze()
    try:
        thread.start()
        thread.join(1)
        assert answers == []
    finally:
        server.thaw()
        thread.join()
    assert answers == [True]
    connection.dec_thread_sharing()


def test_ping_that_connects_anew(server: Server) -> None:
    account = {"user": USER, "password": PASSWORD, "database": "test"}
    handle = pymysql.connect(host=server.host, port=server.port, **account)
    with closing(handle):
        ask(handle, "INSERT INTO written VALUES (1)")
        server.kill_connection(handle.thread_id())
        server.wait_for_sessions(0)
        with pytest.warns(DeprecationWarning, match="reconnect"):
            handle.ping(reconnect=True)
        ask(handle, "INSERT INTO written VALUES (2)")
        handle.commit()
    assert server.execute("SELECT * FROM test.written") == [(2,)]


@pytest.mark.usefixtures("plain")
def test_close_the_connection_before_each_query(database: Database) -> None:
    called: list[str] = []
    connection = connections[database.alias]
    with transaction.atomic(using=database.alias):
        Row.objects.using(database.alias).create(name="lost")
        connection.on_commit(lambda: called.append("callback"))
        connection.close()
    assert not Row.objects.using(database.alias).exists()
    assert called == []


def test_raise_net_read_timeout(server: Server) -> None:
    """The one with net_read_timeout has waited for longer when the other one is cut."""
    large = "SELECT REPEAT('x', 1000) FROM seq_1_to_100000"

    def begin(variable: str) -> tuple[Any, Any]:
        handle = connect(server, cursorclass=MySQLdb.cursors.SSCursor)
        cursor = handle.cursor()
        cursor.execute(f"SET {variable} = 1")
        cursor.execute(large)
        return handle, cursor

    reading, of_reading = begin("net_read_timeout")
    writing, of_writing = begin("net_write_timeout")
    server.wait_until_gone(writing.thread_id())
    with pytest.raises(MySQLdb.OperationalError, match="2013"):
        list(of_writing)
    assert len(list(of_reading)) == 100_000
    reading.close()


def test_raise_max_allowed_packet(server: Server) -> None:
    for _ in range(5):
        with closing(connect(server)) as handle, pytest.raises(MySQLdb.OperationalError) as caught:
            ask(handle, f"INSERT INTO written VALUES ('{'1' * 20_000}')")
        assert caught.value.args[0] in (2006, 1153, 2013)


def test_it_says_1226() -> None:
    """Three faults, of which one is worth waiting; tests/test_faults.py produces them all."""
    texts = ("max_user_connections", "max_connections_per_hour", "max_queries_per_hour")
    faults = [classify(MySQLdb.OperationalError(1226, f"the '{text}' resource")) for text in texts]
    assert [fault and fault.safe_to_retry for fault in faults] == [True, False, False]
    assert [fault and fault.connection_usable for fault in faults] == [False, False, True]


def test_every_paragraph_is_a_test() -> None:
    """A heading "Set CONN_MAX_AGE = 0" has its test_set_conn_max_age_0."""
    headings = re.findall(r'^## "(.+)"$', PAGE.read_text(), re.MULTILINE)
    assert len(headings) >= 9
    for heading in headings:
        words = "_".join(re.findall(r"\w+", heading.lower()))
        assert any(f"test_{words}".startswith(name) for name in globals() if "test_" in name), words
