"""The note on an error: what happened, whether the statement ran, and what to do."""

from __future__ import annotations

import re
import threading
import time
import unittest
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.db import Error, IntegrityError, OperationalError, connections, transaction
from django.test import TestCase

from django_dbhealth import Kind, OpenConnection, Outcome, classify
from django_dbhealth.faults import circumstances_of
from django_dbhealth.notes import lines_of_held
from django_dbhealth.watch import watch_of
from tests.app.models import Row
from tests.servers import Proxy
from tests.servers.base import PASSWORD, USER
from tests.test_registry import in_a_thread, next_line

if TYPE_CHECKING:
    from tests.conftest import Database

PARAMETER = "parameter of a statement"


def create(name: str = PARAMETER) -> None:
    Row.objects.using("database").create(name=name)


def count() -> int:
    return Row.objects.using("database").count()


def run(sql: str, params: Any = None) -> None:
    with connections["database"].cursor() as cursor:
        cursor.execute(sql, params)


def note_of(error: BaseException) -> list[str]:
    """Return the lines of an error's only note."""
    [note] = error.__notes__
    for secret in (PASSWORD, PARAMETER, USER):
        assert secret not in note
    lines: list[str] = note.splitlines()
    assert len([line for line in lines if not line.startswith(("- ", "and "))]) <= 5
    return lines


def lose(database: Database) -> None:
    """Have the server end the connection's session."""
    handle: Any = connections["database"].connection
    is_mysql = database.server.vendor == "mysql"
    session = handle.thread_id() if is_mysql else handle.info.backend_pid
    database.server.kill_connection(session)
    database.server.wait_until_gone(session)


def as_if_idle_for(seconds: str, text: str) -> str:
    """Return a note with the idleness that a test made, to which the machine may have added."""
    [found] = re.findall(r"(?<=Idle for )[\d.,]+", text)
    assert float(seconds) <= float(found) < float(seconds) + 60
    return text.replace(f"Idle for {found} s", f"Idle for {seconds} s")


def be_idle_for(seconds: float) -> None:
    watch = watch_of(connections["database"])
    assert watch is not None
    watch.last_used = time.monotonic() - seconds


# Lost


def test_lost_in_a_transaction(database: Database) -> None:
    """All that a reader asks: what, how long idle, did it run, why not healed, what now."""
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create()
        lose(database)
        be_idle_for(412)
        create()
    what, ran, why, advice = note_of(caught.value)
    fault = classify(caught.value)
    assert fault is not None
    limit = " (SERVER_IDLE_TIMEOUT: 300 s)" if database.server.vendor == "mysql" else ""
    assert as_if_idle_for("412", what) == (
        f"The connection 'database': {fault.title}. {fault.meaning} Idle for 412 s{limit}."
    )
    assert ran == (
        "Its transaction is rolled back: nothing of it stays."
        if fault.outcome is Outcome.ROLLED_BACK
        else "Whether the statement ran is unknown."
    )
    assert why == "Not healed: it was in a transaction."
    what_to_do = (
        "Do the whole transaction again, with the slow work (a download, a sleep) before or after"
        " atomic(), not inside."
        if fault.outcome is Outcome.ROLLED_BACK
        else f"{fault.advice} Slow work belongs before or after atomic(), not inside."
    )
    assert advice == f"What to do: {what_to_do} (see {fault.anchor})"


def test_lost_in_a_transaction_without_a_pause(database: Database) -> None:
    """Nothing waited, so it is not said that something should not."""
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create()
        lose(database)
        be_idle_for(-60)  # however long the loss took
        create()
    fault = classify(caught.value)
    assert fault is not None
    assert note_of(caught.value)[-1] == f"What to do: {fault.advice} (see {fault.anchor})"


def test_lost_after_a_pause_without_a_transaction(database: Database) -> None:
    """The fault's own advice is about that."""
    run("CREATE TEMPORARY TABLE shelf (id int)")
    lose(database)
    be_idle_for(412)
    with pytest.raises(OperationalError) as caught:
        create()
    fault = classify(caught.value)
    assert fault is not None
    assert note_of(caught.value)[-1] == f"What to do: {fault.advice} (see {fault.anchor})"


def test_idle_limit_of_the_settings(database: Database, settings: Any) -> None:
    settings.DBHEALTH = {"DATABASES": {"database": {"SERVER_IDLE_TIMEOUT": 7.5}}}
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create()
        lose(database)
        be_idle_for(8)
        create()
    what = as_if_idle_for("8.0", note_of(caught.value)[0])
    assert "Idle for 8.0 s (SERVER_IDLE_TIMEOUT: 7.5 s)." in what


def test_session_state(database: Database) -> None:
    """What was lost with the session is named, and only once."""
    run("CREATE TEMPORARY TABLE shelf (id int)")
    lose(database)
    with pytest.raises(OperationalError) as caught:
        create()
    assert note_of(caught.value)[2] == (
        "Not healed: lost with its session: temporary table shelf (the next use has a new session"
        " without)."
    )
    create()


def test_session_state_in_a_transaction(database: Database) -> None:
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        run("CREATE TEMPORARY TABLE shelf (id int)")
        lose(database)
        create()
    why = note_of(caught.value)[2]
    assert why.startswith("Not healed: it was in a transaction; lost with its session: temporary")


def test_autocommit_off(database: Database) -> None:
    connection = connections["database"]
    connection.set_autocommit(False)
    create()
    lose(database)
    with pytest.raises(OperationalError) as caught:
        create()
    assert "Not healed: autocommit is off, and what was not committed" in note_of(caught.value)[2]
    connection.close()


def test_shared_between_threads(database: Database) -> None:
    connection = connections["database"]
    count()
    connection.inc_thread_sharing()
    lose(database)
    with pytest.raises(OperationalError) as caught:
        create()
    connection.dec_thread_sharing()
    assert note_of(caught.value)[2] == "Not healed: it is shared between threads."


def test_transaction_of_a_test_case(database: Database) -> None:
    notes: list[list[str]] = []

    class InATestCase(TestCase):
        databases = {"database"}

        def test_loss(self) -> None:
            count()
            lose(database)
            with pytest.raises(OperationalError) as caught:
                create()
            notes.append(note_of(caught.value))

    unittest.TestSuite([InATestCase("test_loss")]).run(unittest.TestResult())
    assert notes[0][2] == "Not healed: it is in the transaction of a TestCase."


def test_lost_while_it_ran(database: Database) -> None:
    """The guard had looked. How long the statement took is told; whether it ran nobody knows."""
    began = time.monotonic()
    count()
    sleep = {"mysql": "SELECT SLEEP(30)", "postgresql": "SELECT pg_sleep(30)"}
    handle: Any = connections["database"].connection
    is_mysql = database.server.vendor == "mysql"
    session = handle.thread_id() if is_mysql else handle.info.backend_pid

    def kill() -> None:
        database.server.wait_until_running(sleep[database.server.vendor])
        time.sleep(time.monotonic() - began + 0.2)  # so that it runs for longer than it was idle
        database.server.kill_connection(session)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(OperationalError) as caught:
        run(sleep[database.server.vendor])
    killer.join()
    what, ran, why, _ = note_of(caught.value)
    times = re.search(r"Idle for ([\d.]+) s.* The statement failed after ([\d.]+) s\.$", what)
    assert times
    assert float(times[1]) < float(times[2])  # the statement's time is not idleness
    assert ran.startswith("Whether the statement ran")
    assert why == "Not healed: the guard had looked before, and no statement is sent twice."


def test_lost_at_commit(database: Database) -> None:
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create()
        lose(database)
        be_idle_for(50)
    what, ran, why, _ = note_of(caught.value)
    assert "Idle for 50 s" in as_if_idle_for("50", what)
    assert "transaction" in ran
    assert why == "Not healed: it was in a transaction."


def test_second_error(database: Database) -> None:
    """What fails because of the first one has a note of its own, about the first one."""
    with pytest.raises(Error), transaction.atomic("database"):
        create()
        lose(database)
        with pytest.raises(OperationalError) as first:
            create()
        with pytest.raises(Error) as second:
            create()
    assert note_of(first.value)[2] == note_of(second.value)[2]


# Several statements


@pytest.fixture
def lost(database: Database) -> Database:
    """A database whose connection is lost, and must not be healed."""
    run("CREATE TEMPORARY TABLE shelf (id int)")
    lose(database)
    return database


SEVERAL = "It was several statements: any of them may have run."


@pytest.mark.parametrize(
    ("sql", "several"),
    [
        ("INSERT INTO app_row (name, number) VALUES ('a', 1); DELETE FROM app_row", True),
        ("INSERT INTO app_row (name, number) VALUES ('a;b', 1); -- nothing", False),
        ("SELECT 1", False),
    ],
)
def test_several_statements_in_one_text(lost: Database, sql: str, several: bool) -> None:
    with pytest.raises(OperationalError) as caught:
        run(sql)
    circumstances = circumstances_of(caught.value)
    assert circumstances is not None
    assert circumstances.several is several
    assert (note_of(caught.value)[1] == SEVERAL) is several
    fault = classify(caught.value)
    assert fault is not None
    assert not several or fault.outcome is Outcome.UNKNOWN


def test_executemany(lost: Database) -> None:
    with pytest.raises(OperationalError) as caught, connections["database"].cursor() as cursor:
        cursor.executemany(
            "INSERT INTO app_row (name, number) VALUES (%s, 0)", [[PARAMETER], ["b"]]
        )
    assert note_of(caught.value)[1] == SEVERAL


def test_callproc(lost: Database) -> None:
    with pytest.raises(OperationalError) as caught, connections["database"].cursor() as cursor:
        cursor.callproc("restock")
    assert note_of(caught.value)[1] == SEVERAL


# Other errors


def test_errors_of_the_program_have_no_note(database: Database) -> None:
    """They say themselves what is wrong, and are no matter of connections."""
    for sql, kind in (
        ("INSERT INTO app_row (id, name, number) VALUES (1, 'a', 0), (1, 'b', 0)", IntegrityError),
        ("SELECT nonsense", Error),
        ("nonsense", Error),
    ):
        with pytest.raises(kind) as caught:
            run(sql)
        assert not hasattr(caught.value, "__notes__")


def test_deadline_of_a_statement(database: Database) -> None:
    """The connection is fine: the note says what happened, and nothing of healing."""
    sql = {
        "mysql": "SET STATEMENT max_statement_time = 0.2 FOR SELECT SLEEP(30)",
        "postgresql": "SET statement_timeout = 200; SELECT pg_sleep(30)",
    }
    with pytest.raises(OperationalError) as caught:
        run(sql[database.server.vendor])
    what, _, advice = note_of(caught.value)
    assert re.search(r"The statement failed after [\d.]+ s\.$", what)
    assert advice.startswith("What to do: ")


def test_program_that_adds_notes(database: Database) -> None:
    """A wrapper's own note stays, before or after ours."""

    def wrapper(execute: Any, *arguments: Any) -> Any:
        try:
            return execute(*arguments)
        except Error as error:
            error.add_note("the program's")
            raise

    connection = connections["database"]
    run("CREATE TEMPORARY TABLE shelf (id int)")
    lose(database)
    with pytest.raises(OperationalError) as caught, connection.execute_wrapper(wrapper):
        create()
    assert len(caught.value.__notes__) == 2
    assert "the program's" in caught.value.__notes__


# At connect


def test_refused(new_server: Any, add_database: Any, settings: Any) -> None:
    """A server that is down: for how long it was tried, and that nothing ran."""
    settings.DBHEALTH = {"CONNECT_RETRY_TIMEOUT": 0.5}
    server = new_server("mariadb")
    add_database(server.django(), alias="database")
    server.stop()
    with pytest.raises(OperationalError) as caught:
        count()
    what, ran, advice = note_of(caught.value)
    assert "CR_CONNECTION_ERROR" in what
    assert re.search(r"Tried for [\d.]+ s\.$", what)
    assert ran == "No statement ran."
    assert advice.startswith("What to do: ")


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_wrong_password(kind: str, request: pytest.FixtureRequest, add_database: Any) -> None:
    server = request.getfixturevalue(kind)
    server.create_database("test")
    add_database(server.django(), alias="database")
    connections["database"].settings_dict["PASSWORD"] = "another one"
    with pytest.raises(OperationalError) as caught:
        count()
    note = "\n".join(note_of(caught.value))
    assert "No statement ran." in note
    assert "another one" not in note


def test_failed_reconnect_tells_of_the_first_error(new_server: Any, add_database: Any) -> None:
    """A connect that fails while an error is handled covers it up: the note is about that one."""
    server = new_server("mariadb")
    add_database(server.django(), alias="database")
    with Proxy(server.host, server.port) as proxy:
        settings = connections["database"].settings_dict
        settings["OPTIONS"].pop("unix_socket", None)
        settings.update(HOST=proxy.host, PORT=str(proxy.port))
        create()
        connections["database"].close()
        count()

        def hang_up() -> None:
            server.wait_until_running("SLEEP(30)")
            proxy.refuse()
            proxy.cut()

        other = threading.Thread(target=hang_up)
        with pytest.raises(OperationalError) as caught:
            try:
                other.start()
                run("INSERT INTO app_row (name, number) SELECT SLEEP(30), 1")
            except OperationalError as error:
                first = note_of(error)
                connections["database"].close()
                try:
                    count()  # the program's attempt to go on
                except OperationalError:
                    count()
        other.join()
    lines = note_of(caught.value)
    assert lines[0] == (
        "The connection 'database' could not be opened again (2002 CR_CONNECTION_ERROR)."
        " What counts is the error before:"
    )
    assert lines[1:] == first
    assert first[1].startswith("Whether the statement ran")
    fault = classify(caught.value)
    assert fault is not None
    assert (fault.code, fault.outcome) == (2013, Outcome.UNKNOWN)


# No free slot


def test_no_free_slot_names_the_connections(new_server: Any, add_database: Any) -> None:
    """Three threads hold them, each named with the program's own file and line."""
    server = new_server("mariadb")
    add_database(server.django(), alias="database")
    server.grant_limit(USER, 3)
    places: list[str] = []

    def first() -> None:
        places.append(next_line())
        Row.objects.using("database").count()

    def second() -> None:
        places.append(next_line())
        list(Row.objects.using("database").all())

    def third() -> None:
        transaction.set_autocommit(False, using="database")
        places.append(next_line())
        Row.objects.using("database").first()

    try:
        with (
            in_a_thread(first, "importer"),
            in_a_thread(second, "mailer"),
            in_a_thread(third, "cleaner"),
            pytest.raises(OperationalError, match="1226") as caught,
        ):
            count()
    finally:
        server.grant_limit(USER, 0)
    what, ran, advice, held, *connections_held = note_of(caught.value)
    assert "1226 ER_USER_LIMIT_REACHED" in what
    assert ran == "No statement ran."
    assert "dbhealth connections" in advice
    assert held == "This process holds 3 there:"
    assert len(connections_held) == 3
    text = "\n".join(connections_held)
    for name, place in zip(("importer", "mailer"), places, strict=False):
        assert re.search(
            rf"^- 'database', thread '{name}', [\d.]+ s old, idle for [\d.]+ s, "
            rf"opened at {re.escape(place)}$",
            text,
            re.MULTILINE,
        )
    assert re.search(rf"thread 'cleaner', .*, in a transaction, opened at {__file__}:", text)


def test_no_free_slot_on_postgresql(new_server: Any, add_database: Any) -> None:
    """Six of seven are too many to name all; another server's and another's are not meant."""
    server = new_server("postgresql")
    add_database(server.django(), alias="database")
    other = new_server("postgresql")
    add_database(other.django(), alias="other")
    connections["other"].ensure_connection()
    server.grant_limit(USER, 7)
    copies = [connections["database"].copy() for _ in range(7)]
    try:
        for copy in copies:
            copy.ensure_connection()
        with pytest.raises(OperationalError) as caught:
            count()
    finally:
        for copy in copies:
            copy.close()
    *_, held, one, two, three, four, five, more = note_of(caught.value)
    assert held == "This process holds 7 there:"
    for line in (one, two, three, four, five):
        assert line.startswith("- 'database', thread 'MainThread', ")
    assert more == "and 2 more: see open_connections()."


def test_no_free_slot_and_none_of_ours(new_server: Any, add_database: Any) -> None:
    server = new_server("mariadb", max_user_connections=5)
    add_database(server.django(), alias="database")
    server.grant_limit(USER, 1)
    import MySQLdb

    foreign = MySQLdb.connect(unix_socket=str(server.socket), user=USER, password=PASSWORD)
    with pytest.raises(OperationalError) as caught:
        count()
    foreign.close()
    assert note_of(caught.value)[-1] == "This process holds none there."


def test_cursor_of_a_closed_connection(database: Database) -> None:
    """After the program's own close() no connect was refused, so that is not what it reads."""
    connection = connections["database"]
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    connection.close()
    with pytest.raises(OperationalError) as caught:
        cursor.execute("SELECT 1")
    assert "Not healed: it was closed." in note_of(caught.value)
    fault = classify(caught.value)
    assert fault
    assert fault.kind is Kind.LOST


def test_closed_while_a_statement_runs(new_server: Any, add_database: Any) -> None:
    """Whether it ran is unknown, though there is no connection any more when the error comes."""
    server = new_server("postgresql")
    add_database(server.django(), alias="database")
    connection: Any = connections["database"]
    connection.inc_thread_sharing()
    slow = "SELECT pg_sleep(60)"

    def close() -> None:
        server.wait_until_running(slow)
        connection.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(OperationalError) as caught:
        run(slow)
    thread.join()
    connection.dec_thread_sharing()
    assert connection.connection is None
    fault = classify(caught.value)
    assert fault
    assert fault.outcome is Outcome.UNKNOWN
    assert "Whether the statement ran is unknown." in note_of(caught.value)


def test_pool_without_a_free_slot(postgresql: Any, add_database: Any) -> None:
    """Who holds the pool's connections is told too."""
    pool = {"min_size": 0, "max_size": 1}
    add_database(postgresql.django(), alias="database", OPTIONS={"pool": pool})
    connection: Any = connections["database"]
    with in_a_thread(count, "holder"), pytest.raises(OperationalError) as caught:
        connection.pool.timeout = 0.5  # from now on: the holder's was opened within 30
        count()
    lines = note_of(caught.value)
    assert lines[-2] == "This process holds 1 there:"
    assert "thread 'holder'" in lines[-1]


def test_healthy_statement_makes_no_note(database: Database) -> None:
    """An exception of the program's own passes as it is."""
    with suppress(LookupError), transaction.atomic("database"):
        create()
        raise LookupError
    assert count() == 0


# What the docs show


ERRORS = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
SHOWN = re.findall(r"```text\n(.*?)\n```", ERRORS, re.DOTALL)


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
def test_note_in_the_docs(database: Database) -> None:
    with pytest.raises(OperationalError) as caught, transaction.atomic("database"):
        create()
        lose(database)
        be_idle_for(412)
        create()
    note = as_if_idle_for("412", "\n".join(note_of(caught.value)))
    assert note.replace("'database'", "'default'") == SHOWN[0]


def test_list_in_the_docs() -> None:
    first = OpenConnection(
        alias="default",
        thread_name="importer",
        thread_id=1,
        age_seconds=700,
        idle_seconds=655,
        in_transaction=True,
        opened_at="/srv/shop/prices.py:31",
    )
    second = replace(
        first,
        thread_name="MainThread",
        age_seconds=12,
        idle_seconds=0.3,
        in_transaction=False,
        opened_at="/srv/shop/bot.py:88",
    )
    assert "\n".join(lines_of_held([first, second])) == SHOWN[1]
