"""Every fault that can be produced here is: the real error, the whole fault, and is it true?"""

from __future__ import annotations

import functools
import gettext
import importlib
import os
import re
import signal
import socket
import sys
import threading
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from django.db import connections
from psycopg_pool import ConnectionPool

from django_dbhealth import Kind, Outcome, classify
from django_dbhealth.vendors import VENDORS
from tests.conftest import register, unregister
from tests.faults import DRIVERS, FIRST, SECOND, SLOWLY, Bench, Case, combinations, happens
from tests.servers import PostgreSQLServer
from tests.servers.base import PASSWORD, USER, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django_dbhealth import Fault
    from tests.faults import Driver, Happening
    from tests.servers import Server

NOT_EXECUTED, ROLLED_BACK, UNKNOWN = Outcome.NOT_EXECUTED, Outcome.ROLLED_BACK, Outcome.UNKNOWN

ROWS = {
    known.fault.anchor.partition("#fault-")[2]: known.fault
    for vendor in VENDORS.values()
    for known in vendor.faults
}
PRODUCIBLE = {name for name, fault in ROWS.items() if fault.source.startswith("measured: ")}


class Meaning(NamedTuple):
    """What a row must say, written down a second time."""

    kind: Kind
    code: int | str | None
    outcome: Outcome
    connection_usable: bool
    safe_to_retry: bool


LOST, FULL, QUOTA = Kind.LOST, Kind.NO_FREE_SLOT, Kind.QUOTA
UNREACHABLE, CREDENTIALS = Kind.UNREACHABLE, Kind.CREDENTIALS

MEANINGS = {
    "2006": Meaning(LOST, 2006, NOT_EXECUTED, False, True),
    "2013": Meaning(LOST, 2013, UNKNOWN, False, False),
    "2013-at-connect": Meaning(UNREACHABLE, 2013, NOT_EXECUTED, False, True),
    "interfaceerror-pymysql": Meaning(LOST, 0, NOT_EXECUTED, False, True),
    "2002": Meaning(UNREACHABLE, 2002, NOT_EXECUTED, False, True),
    "2003": Meaning(UNREACHABLE, 2003, NOT_EXECUTED, False, True),
    "1226-max-user-connections": Meaning(FULL, 1226, NOT_EXECUTED, False, True),
    "1226-max-connections-per-hour": Meaning(QUOTA, 1226, NOT_EXECUTED, False, False),
    "1226-statements-per-hour": Meaning(QUOTA, 1226, NOT_EXECUTED, True, False),
    "1203": Meaning(FULL, 1203, NOT_EXECUTED, False, True),
    "1040": Meaning(FULL, 1040, NOT_EXECUTED, False, True),
    "1044": Meaning(CREDENTIALS, 1044, NOT_EXECUTED, False, False),
    "1045": Meaning(CREDENTIALS, 1045, NOT_EXECUTED, False, False),
    "1049": Meaning(CREDENTIALS, 1049, NOT_EXECUTED, False, False),
    "1698": Meaning(CREDENTIALS, 1698, NOT_EXECUTED, False, False),
    "4151-mariadb": Meaning(CREDENTIALS, 4151, NOT_EXECUTED, False, False),
    "1820": Meaning(CREDENTIALS, 1820, NOT_EXECUTED, True, False),
    "1153": Meaning(Kind.TOO_LARGE, 1153, NOT_EXECUTED, False, False),
    "2014": Meaning(Kind.BUSY, 2014, NOT_EXECUTED, True, False),
    "already-in-use-from-another-thread-mysqlclient": Meaning(
        Kind.BUSY, None, NOT_EXECUTED, True, False
    ),
    "packet-sequence-number-wrong-pymysql": Meaning(Kind.BUSY, None, UNKNOWN, False, False),
    "1205": Meaning(Kind.CONFLICT, 1205, NOT_EXECUTED, True, True),
    "1213": Meaning(Kind.CONFLICT, 1213, ROLLED_BACK, True, True),
    "1020": Meaning(Kind.CONFLICT, 1020, ROLLED_BACK, True, True),
    "1317": Meaning(Kind.TIMED_OUT, 1317, NOT_EXECUTED, True, True),
    "1969": Meaning(Kind.TIMED_OUT, 1969, NOT_EXECUTED, True, True),
    "1290-read-only": Meaning(Kind.READ_ONLY, 1290, NOT_EXECUTED, True, False),
    "1792": Meaning(Kind.READ_ONLY, 1792, NOT_EXECUTED, True, False),
    # PostgreSQL
    "authentication-failed": Meaning(CREDENTIALS, None, NOT_EXECUTED, False, False),
    "does-not-exist": Meaning(CREDENTIALS, None, NOT_EXECUTED, False, False),
    "not-permitted-to-log-in": Meaning(CREDENTIALS, None, NOT_EXECUTED, False, False),
    "no-pg-hba-conf-entry": Meaning(CREDENTIALS, None, NOT_EXECUTED, False, False),
    "too-many-clients-already": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "remaining-connection-slots-are-reserved": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "too-many-connections-for": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "couldn-t-get-a-connection-psycopg-pool": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "the-database-system-is-not-ready": Meaning(UNREACHABLE, None, NOT_EXECUTED, False, True),
    "connection-refused": Meaning(UNREACHABLE, None, NOT_EXECUTED, False, True),
    "timeout-expired": Meaning(UNREACHABLE, None, NOT_EXECUTED, False, True),
    "server-closed-the-connection-at-connect": Meaning(
        UNREACHABLE, None, NOT_EXECUTED, False, True
    ),
    "server-closed-the-connection-psycopg2": Meaning(LOST, None, UNKNOWN, False, False),
    "consuming-input-failed-psycopg-3": Meaning(LOST, None, UNKNOWN, False, False),
    "sending-query-failed-psycopg-3": Meaning(LOST, None, UNKNOWN, False, False),
    "connection-is-closed": Meaning(LOST, None, NOT_EXECUTED, False, True),
    "another-command-is-already-in-progress": Meaning(Kind.BUSY, None, NOT_EXECUTED, True, False),
    "no-copy-in-progress-psycopg-3": Meaning(Kind.BUSY, None, NOT_EXECUTED, True, False),
    "number-of-parameters-must-be-between-psycopg-3": Meaning(
        Kind.TOO_LARGE, None, NOT_EXECUTED, True, False
    ),
    "57p01": Meaning(LOST, "57P01", UNKNOWN, False, False),
    "57p05": Meaning(LOST, "57P05", NOT_EXECUTED, False, True),
    "08p01-pgbouncer": Meaning(LOST, "08P01", UNKNOWN, False, False),
    "query-wait-timeout-pgbouncer": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "no-more-connections-allowed-pgbouncer": Meaning(FULL, None, NOT_EXECUTED, False, True),
    "25p03": Meaning(LOST, "25P03", ROLLED_BACK, False, True),
    "25p02": Meaning(Kind.BUSY, "25P02", NOT_EXECUTED, True, False),
    "57014": Meaning(Kind.TIMED_OUT, "57014", NOT_EXECUTED, True, True),
    "55p03": Meaning(Kind.CONFLICT, "55P03", NOT_EXECUTED, True, True),
    "40001": Meaning(Kind.CONFLICT, "40001", ROLLED_BACK, True, True),
    "40p01": Meaning(Kind.CONFLICT, "40P01", ROLLED_BACK, True, True),
    "25006": Meaning(Kind.READ_ONLY, "25006", NOT_EXECUTED, True, False),
}


# What goes wrong on MariaDB: lost while idle. In Django in a transaction, or it would be healed.


@happens(mysqlclient="2006", PyMySQL="2006", outcome=ROLLED_BACK)
def wait_timeout(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        client.lose(lambda: client.execute("SET wait_timeout = 1"))
        client.insert(SECOND)


@happens(mysqlclient="2006", PyMySQL="2006", outcome=ROLLED_BACK)
def killed_on_a_socket(case: Case) -> None:
    client = case.connect("socket")
    with client.transaction():
        client.insert(FIRST)
        client.lose()
        client.insert(SECOND)


@happens(mysqlclient="2013", PyMySQL="2013")
def killed_over_tcp(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        client.lose()
        client.insert(SECOND)


@happens(mysqlclient="2006", PyMySQL="interfaceerror-pymysql", outcome=ROLLED_BACK)
def used_again_after_the_loss(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        client.lose()
        with suppress(Exception):
            client.insert(SECOND)
        client.insert(SECOND)


@happens(mysqlclient="2006", PyMySQL="interfaceerror-pymysql", guarded="")
def closed_by_the_program(case: Case) -> None:
    client = case.connect()
    client.close()
    client.insert(SECOND)


# While a statement runs


@happens(mysqlclient="2013", PyMySQL="2013")
def killed_while_running(case: Case) -> None:
    client = case.connect()
    session = client.session_id()
    with case.while_running(lambda: case.bench.server.kill_connection(session)):
        client.execute(SLOWLY["mariadb"])


@happens(mysqlclient="2013", PyMySQL="2013")
def restarted_while_running(case: Case) -> None:
    client = case.connect()
    with case.while_running(case.bench.server.restart):
        client.execute(SLOWLY["mariadb"])


@happens(mysqlclient="2013", PyMySQL="2013")
def crashed_while_running(case: Case) -> None:
    client = case.connect()
    with case.while_running(case.bench.server.kill):
        client.execute(SLOWLY["mariadb"])


@happens(mysqlclient="2013", PyMySQL="2013")
def cut_while_running(case: Case) -> None:
    client = case.connect("proxy")
    with case.while_running(case.bench.proxy.cut):
        client.execute(SLOWLY["mariadb"])


@happens(mysqlclient="2013", PyMySQL="2013")
def read_timeout(case: Case) -> None:
    client = case.connect(read_timeout=1)
    client.execute("INSERT INTO happened (name) SELECT CONCAT('second', SLEEP(60))")


@happens(mysqlclient="2013", PyMySQL="2013")
def result_read_too_slowly(case: Case) -> None:
    client = case.connect()
    client.execute("SET net_write_timeout = 1")
    session = client.session_id()
    cursor = unbuffered(client)
    cursor.execute("SELECT REPEAT('x', 1000) FROM seq_1_to_1000000")
    case.bench.server.wait_until_gone(session)
    try:
        with wrapped(client):
            while cursor.fetchone():
                pass
    finally:
        if case.driver.name == "PyMySQL":  # which would read on when it is forgotten
            cursor._result.unbuffered_active = False


@happens(mysqlclient="1317", PyMySQL="1317")
def query_killed(case: Case) -> None:
    client = case.connect()
    session = client.session_id()
    with case.while_running(lambda: case.bench.execute(f"KILL QUERY {session}")):
        client.execute(SLOWLY["mariadb"])


@happens(mysqlclient="1969", PyMySQL="1969")
def max_statement_time(case: Case) -> None:
    client = case.connect()
    client.execute("SET max_statement_time = 0.2")
    client.execute(SLOWLY["mariadb"])


# At connect


@happens(mysqlclient="2002", PyMySQL="2003")
def server_down(case: Case) -> None:
    case.bench.server.stop()
    case.connect()


@happens(mysqlclient="2002")
def server_down_on_a_socket(case: Case) -> None:
    case.bench.server.stop()
    case.connect("socket")


# PyMySQL's text does not tell: alone it may be any 2013.
@happens(mysqlclient="2013-at-connect", PyMySQL="2013", guarded={"PyMySQL": "2013-at-connect"})
def hung_up_at_connect(case: Case) -> None:
    case.bench.server.stop()
    case.connect("proxy")


@happens(mysqlclient="2013-at-connect", PyMySQL="2013", guarded={"PyMySQL": "2013-at-connect"})
def silent_at_connect(case: Case) -> None:
    case.bench.server.freeze()
    try:
        case.connect(connect_timeout=1, read_timeout=1)
    finally:
        case.bench.server.thaw()


@happens(mysqlclient="1045", PyMySQL="1045")
def wrong_password(case: Case) -> None:
    case.connect(password="wrong")


@happens(mysqlclient="1049", PyMySQL="1049")
def no_such_database(case: Case) -> None:
    case.connect(database="nowhere")


@happens(mysqlclient="1044", PyMySQL="1044")
def no_rights(case: Case) -> None:
    case.bench.execute("CREATE DATABASE IF NOT EXISTS others")
    case.connect(user="clerk", password="x", database="others")


@happens(mysqlclient="1698", PyMySQL="1698")
def no_password_account(case: Case) -> None:
    case.bench.execute("CREATE USER IF NOT EXISTS system_user@'%' IDENTIFIED VIA unix_socket")
    case.connect(user="system_user", password="x")


@happens(mysqlclient="4151-mariadb", PyMySQL="4151-mariadb")
def account_locked(case: Case) -> None:
    case.bench.execute("ALTER USER clerk@'%' ACCOUNT LOCK")
    case.stack.callback(case.bench.execute, "ALTER USER clerk@'%' ACCOUNT UNLOCK")
    case.connect(user="clerk", password="x")


@happens(mysqlclient="1820", PyMySQL="1820")
def password_expired(case: Case) -> None:
    case.bench.execute("ALTER USER clerk@'%' PASSWORD EXPIRE")
    case.stack.callback(case.bench.execute, "ALTER USER clerk@'%' IDENTIFIED BY 'x'")
    case.connect(user="clerk", password="x").insert(SECOND)


# Limits


def limit(case: Case, what: str) -> None:
    """Limit the account clerk, and let the counting begin anew."""
    no_limit = "WITH MAX_QUERIES_PER_HOUR 0 MAX_UPDATES_PER_HOUR 0 MAX_CONNECTIONS_PER_HOUR 0"
    case.stack.callback(
        case.bench.execute, f"ALTER USER clerk@'%' {no_limit} MAX_USER_CONNECTIONS 0"
    )
    case.bench.execute(f"ALTER USER clerk@'%' WITH {what}")
    case.bench.execute("FLUSH USER_RESOURCES")


@happens(mysqlclient="1226-max-user-connections", PyMySQL="1226-max-user-connections")
def account_limit(case: Case) -> None:
    limit(case, "MAX_USER_CONNECTIONS 1")
    for _ in range(2):
        case.connect(user="clerk", password="x")


@happens(mysqlclient="1226-max-connections-per-hour", PyMySQL="1226-max-connections-per-hour")
def hourly_connections(case: Case) -> None:
    limit(case, "MAX_CONNECTIONS_PER_HOUR 1")
    for _ in range(2):
        case.connect(user="clerk", password="x").close()


@happens(mysqlclient="1226-statements-per-hour", PyMySQL="1226-statements-per-hour")
def hourly_queries(case: Case) -> None:
    limit(case, "MAX_QUERIES_PER_HOUR 9")
    client = case.connect(user="clerk", password="x")
    for _ in range(9):
        client.execute("SELECT 1")
    client.insert(SECOND)


@happens(mysqlclient="1226-statements-per-hour", PyMySQL="1226-statements-per-hour")
def hourly_updates(case: Case) -> None:
    limit(case, "MAX_UPDATES_PER_HOUR 1")
    client = case.connect(user="clerk", password="x")
    client.insert(FIRST)
    client.insert(SECOND)


@happens(mysqlclient="1203", PyMySQL="1203")
def limit_of_any_account(case: Case) -> None:
    case.bench.server.set(max_user_connections=1)
    case.stack.callback(case.bench.server.set, max_user_connections=50)
    for _ in range(2):
        case.connect()


@happens(mysqlclient="1040", PyMySQL="1040")
def full_server(case: Case) -> None:
    case.bench.server.set(max_connections=10)  # the least that MariaDB allows
    case.stack.callback(wait_for, lambda: lets_more_in(case.bench.server))
    for _ in range(11):
        case.connect()


def lets_more_in(server: Server) -> bool:
    """Raise the limit, if the server has noticed that its clients have left: its slots are few."""
    with suppress(server.operational_error):
        server.set(max_connections=50)
        return True
    return False


# Too slow


@happens(mysqlclient="2013")  # PyMySQL's LOAD DATA ends in an AttributeError of its own
def sent_too_slowly(case: Case) -> None:
    """net_read_timeout: the server waits for a file, which comes from a pipe that says nothing."""
    client = case.connect(local_infile=1)
    client.execute("SET net_read_timeout = 1, net_retry_count = 1")
    session = client.session_id()
    pipe = case.bench.server.directory / f"pipe{session}"
    os.mkfifo(pipe)

    def write_too_late() -> None:
        with pipe.open("w") as opened:
            case.bench.server.wait_until_gone(session)
            opened.write(SECOND + "\n")

    writer = threading.Thread(target=write_too_late)
    writer.start()
    try:
        client.execute(f"LOAD DATA LOCAL INFILE '{pipe}' INTO TABLE happened (name)")
    finally:
        writer.join()


# Too large, and busy


@happens(mysqlclient="1153", PyMySQL="1153", outcome=ROLLED_BACK)
def oversize_packet(case: Case) -> None:
    """It is a race whether the client reads the answer, 1153, before it notices the hang-up."""
    for _ in range(50):
        client = case.connect("proxy")
        error = error_of(lambda client=client: insert_too_much(client))
        if error.args[0] == 1153:
            raise error
        fault = classify(error)
        assert fault
        assert fault.code in (2006, 2013)


def insert_too_much(client: Any) -> None:
    with client.transaction():
        client.insert(FIRST)
        client.insert(SECOND + "x" * 17_000)


@happens(mysqlclient="2014")
def unbuffered_result_unfinished(case: Case) -> None:
    client = case.connect()
    with closing(unbuffered(client)) as cursor:
        cursor.execute("SELECT 1 FROM seq_1_to_10000")
        client.insert(SECOND)


@happens(
    mysqlclient="already-in-use-from-another-thread-mysqlclient",
    PyMySQL="packet-sequence-number-wrong-pymysql",
    guarded="",  # Django lets no second thread in
)
def two_threads(case: Case) -> None:
    client = case.connect()
    session = client.session_id()
    seconds = 6 if case.driver.name == "PyMySQL" else 60  # PyMySQL reads the sleep's answer first

    def sleep() -> None:
        with suppress(Exception):  # PyMySQL's; it is the other thread's that counts
            client.execute(f"SELECT SLEEP({seconds})")

    other = threading.Thread(target=sleep)
    other.start()
    try:
        case.bench.server.wait_until_running(f"SLEEP({seconds})")
        if case.driver.name == "PyMySQL":  # whoever reads first takes what comes first
            wait_for(lambda: sys._current_frames()[other.ident].f_code.co_name == "readinto")
        client.insert(SECOND)
    finally:
        with suppress(case.bench.server.operational_error):  # PyMySQL has left it
            case.bench.server.kill_connection(session)
        other.join()


# Conflicts


@happens(mysqlclient="1205", PyMySQL="1205")
def lock_wait(case: Case) -> None:
    case.bench.execute("INSERT INTO happened (name) VALUES ('locked')")
    holder, client = case.connect(), case.connect()
    client.execute("SET innodb_lock_wait_timeout = 0")
    with rolled_back(holder):
        holder.execute("SELECT * FROM happened FOR UPDATE")
        client.execute("UPDATE happened SET name = 'second'")


@happens(mysqlclient="1213", PyMySQL="1213")
def deadlock(case: Case) -> None:
    deadlock_of(case)


def deadlock_of(case: Case) -> None:
    """Lock two rows in two orders; the server chooses whose error it is."""
    case.bench.execute("DROP TABLE IF EXISTS locked")
    case.bench.execute("CREATE TABLE locked (id int PRIMARY KEY)")
    case.bench.execute(f"GRANT ALL ON locked TO {USER}")
    case.bench.execute("INSERT INTO locked VALUES (1), (2)")
    errors: list[BaseException] = []

    def lock(first: int, second: int, barrier: threading.Barrier) -> None:
        client = case.connect()
        try:
            with client.transaction():
                client.execute(f"SELECT * FROM locked WHERE id = {first} FOR UPDATE")
                barrier.wait(10)
                client.insert(SECOND)
                client.execute(f"SELECT * FROM locked WHERE id = {second} FOR UPDATE")
                raise UndoneError
        except UndoneError:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            client.close()  # Django's belong to their threads

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=lock, args=(*pair, barrier)) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [error] = errors
    raise error


class UndoneError(Exception):
    pass


@happens(mysqlclient="1020", PyMySQL="1020")
def changed_since_it_was_read(case: Case) -> None:
    case.bench.execute("INSERT INTO happened (name) VALUES ('old')")
    client = case.connect()
    client.execute("SET innodb_snapshot_isolation = ON, tx_isolation = 'REPEATABLE-READ'")
    with client.transaction():
        client.execute("SELECT * FROM happened")
        case.bench.execute("UPDATE happened SET name = 'new'")
        client.insert(FIRST)
        client.execute("UPDATE happened SET name = 'second' WHERE name IN ('old', 'new')")


# Read-only


@happens(mysqlclient="1290-read-only", PyMySQL="1290-read-only")
def read_only_server(case: Case) -> None:
    client = case.connect()
    case.bench.server.set(read_only=1)
    case.stack.callback(case.bench.server.set, read_only=0)
    client.insert(SECOND)


@happens(mysqlclient="1792", PyMySQL="1792")
def read_only_transaction(case: Case) -> None:
    client = case.connect()
    client.execute("SET TRANSACTION READ ONLY")
    with client.transaction():
        client.insert(SECOND)


# PostgreSQL: lost


@happens(
    psycopg="57p05",
    psycopg2="server-closed-the-connection-psycopg2",
    guarded="",  # healed; in a transaction it is another timeout
)
def idle_session_timeout(case: Case) -> None:
    client = case.connect(options="-c idle_session_timeout=300")
    client.lose(lambda: None)
    client.insert(SECOND)


@happens(psycopg="25p03", psycopg2="server-closed-the-connection-psycopg2")
def idle_in_transaction(case: Case) -> None:
    client = case.connect(options="-c idle_in_transaction_session_timeout=300")
    with client.transaction():
        client.insert(FIRST)
        client.lose(lambda: None)
        client.insert(SECOND)


@happens(psycopg="57p01", psycopg2="server-closed-the-connection-psycopg2")
def terminated(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        client.lose()
        client.insert(SECOND)


@happens(psycopg="connection-is-closed", psycopg2="connection-is-closed", outcome=ROLLED_BACK)
def used_again_after_termination(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        client.lose()
        with suppress(Exception):
            client.insert(SECOND)
        client.insert(SECOND)


@happens(psycopg="57p01", psycopg2="server-closed-the-connection-psycopg2")
def terminated_while_running(case: Case) -> None:
    client = case.connect()
    session = client.session_id()
    with case.while_running(lambda: case.bench.server.kill_connection(session)):
        client.execute(SLOWLY["postgresql"])


@happens(
    psycopg="consuming-input-failed-psycopg-3", psycopg2="server-closed-the-connection-psycopg2"
)
def server_crashed_while_running(case: Case) -> None:
    client = case.connect()
    with case.while_running(case.bench.server.kill):
        client.execute(SLOWLY["postgresql"])


@happens(
    psycopg="consuming-input-failed-psycopg-3", psycopg2="server-closed-the-connection-psycopg2"
)
def reset_while_running(case: Case) -> None:
    client = case.connect("proxy")
    with case.while_running(case.bench.proxy.reset):
        client.execute(SLOWLY["postgresql"])


@happens(psycopg="sending-query-failed-psycopg-3", psycopg2="server-closed-the-connection-psycopg2")
def lost_while_copying(case: Case) -> None:
    client = case.connect()
    session, server = client.session_id(), case.bench.server

    def rows() -> Iterator[str]:
        yield f"{SECOND}\n" * 1000
        server.kill_connection(session)
        server.wait_until_gone(session)
        while True:
            yield f"{SECOND}\n" * 1000

    with wrapped(client):
        if case.driver.name == "psycopg2":
            client.cursor().copy_expert(COPY, Reader(rows()))
        with client.cursor().copy(COPY) as copy:
            for each in rows():
                copy.write(each)


@happens(
    psycopg="consuming-input-failed-psycopg-3", psycopg2="server-closed-the-connection-psycopg2"
)
def cut_while_copying_out(case: Case) -> None:
    client = case.connect("proxy")
    sql = "COPY (SELECT repeat('x', 999) FROM generate_series(1, 1000000)) TO STDOUT"
    with wrapped(client):
        if case.driver.name == "psycopg2":
            client.cursor().copy_expert(sql, Writer(case.bench.proxy.cut))
        with client.cursor().copy(sql) as copy:
            for _ in copy:
                case.bench.proxy.cut()


@happens(psycopg="no-copy-in-progress-psycopg-3")
def written_after_a_copy(case: Case) -> None:
    client = case.connect()
    with wrapped(client):
        with client.cursor().copy(COPY) as copy:
            copy.write(f"{FIRST}\n")
        copy.write(f"{SECOND}\n")


@happens(psycopg="number-of-parameters-must-be-between-psycopg-3")
def too_many_parameters(case: Case) -> None:
    client = case.connect(**({"server_side_binding": True} if case.guarded else {}))
    places = ", ".join(["%s"] * 65_536)
    client.execute(f"INSERT INTO happened VALUES ({places})", [SECOND] * 65_536)


COPY = "COPY happened FROM STDIN"


class Reader:
    """What psycopg2 takes for a file, to read from."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def read(self, size: int) -> str:
        return next(self._pieces)


class Writer:
    """And to write into."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action

    def write(self, piece: bytes) -> None:
        self._action()


# PostgreSQL: refused


@happens(psycopg="connection-refused", psycopg2="connection-refused")
def postgresql_down(case: Case) -> None:
    case.bench.server.stop()
    case.connect()


@happens(psycopg="connection-refused", psycopg2="connection-refused")
def postgresql_down_on_a_socket(case: Case) -> None:
    case.bench.server.stop()
    case.connect("socket")


@happens(
    psycopg="server-closed-the-connection-at-connect",
    psycopg2="server-closed-the-connection-at-connect",
)
def postgresql_behind_a_proxy_down(case: Case) -> None:
    case.bench.server.stop()
    case.connect("proxy")


@happens(psycopg="authentication-failed", guarded="")  # libpq itself tries no other host then
def refused_by_the_second_of_two_hosts(case: Case) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = f"{first.getsockname()[1]},{case.bench.server.port}"
        thread = threading.Thread(target=hang_up_on_one, args=[first])
        thread.start()
        try:
            case.connect(host="127.0.0.1,127.0.0.1", port=port, password="wrong")
        finally:
            thread.join()


def hang_up_on_one(server: socket.socket) -> None:
    """Read what a client has to say, and leave."""
    server.settimeout(20)
    client, _ = server.accept()
    with client:
        client.recv(1000)


@happens(psycopg="timeout-expired", psycopg2="timeout-expired")
def postgresql_silent_at_connect(case: Case) -> None:
    case.bench.proxy.accept_silently()
    case.connect("proxy", connect_timeout=2)  # the least that libpq takes


@happens(psycopg="the-database-system-is-not-ready", psycopg2="the-database-system-is-not-ready")
def shutting_down(case: Case) -> None:
    """A smart shutdown waits for clients, and takes no new ones."""
    server = case.bench.server
    case.stack.callback(wait_for, lambda: not server.running)  # once the client has left
    case.connect()
    server._alive().send_signal(signal.SIGTERM)
    wait_for(lambda: "smart shutdown" in server.log_tail())
    case.connect()


@happens(psycopg="authentication-failed", psycopg2="authentication-failed")
def wrong_password_on_postgresql(case: Case) -> None:
    case.connect(password="wrong")


@happens(psycopg="does-not-exist", psycopg2="does-not-exist")
def no_such_database_on_postgresql(case: Case) -> None:
    case.connect(dbname="nowhere")


@happens(psycopg="not-permitted-to-log-in", psycopg2="not-permitted-to-log-in")
def no_login(case: Case) -> None:
    case.connect(user="clerk", password="x")


@happens(psycopg="not-permitted-to-log-in", psycopg2="not-permitted-to-log-in")
def no_right_to_connect(case: Case) -> None:
    case.bench.server.create_database("others")
    case.bench.execute("REVOKE CONNECT ON DATABASE others FROM PUBLIC")
    case.bench.execute("ALTER DATABASE others OWNER TO admin")
    case.bench.execute(f"REVOKE ALL ON DATABASE others FROM {USER}")
    case.connect(dbname="others")


@happens(psycopg="no-pg-hba-conf-entry", psycopg2="no-pg-hba-conf-entry")
def no_entry_for_the_client(case: Case) -> None:
    server = case.bench.server
    file = server.directory / "data" / "pg_hba.conf"
    entries = file.read_text()
    case.stack.callback(server.set)  # which loads the file
    case.stack.callback(file.write_text, entries)
    file.write_text(entries.replace("host all", "host others"))
    server.set()
    case.connect()


@happens(psycopg="too-many-connections-for", psycopg2="too-many-connections-for")
def role_limit(case: Case) -> None:
    case.bench.server.grant_limit(USER, 1)
    case.stack.callback(case.bench.server.grant_limit, USER, 0)
    for _ in range(2):
        case.connect()


@happens(psycopg="too-many-connections-for", psycopg2="too-many-connections-for")
def database_limit(case: Case) -> None:
    case.bench.server.execute("ALTER DATABASE test CONNECTION LIMIT 1")
    no_limit = "ALTER DATABASE test CONNECTION LIMIT -1"
    case.stack.callback(case.bench.server.execute, no_limit)
    for _ in range(2):
        case.connect()


@happens(
    psycopg="remaining-connection-slots-are-reserved",
    psycopg2="remaining-connection-slots-are-reserved",
)
def only_reserved_slots(case: Case) -> None:
    for _ in range(11):
        case.connect()


@happens(psycopg="too-many-clients-already", psycopg2="too-many-clients-already")
def full_postgresql(case: Case) -> None:
    case.bench.server.execute(f"ALTER ROLE {USER} SUPERUSER")
    case.stack.callback(case.bench.server.execute, f"ALTER ROLE {USER} NOSUPERUSER")
    case.stack.callback(wait_for, case.bench.server._answers)  # once the slots are given back
    for _ in range(11):
        case.connect()


@happens(psycopg="couldn-t-get-a-connection-psycopg-pool")
def pool_exhausted(case: Case) -> None:
    if case.guarded:
        pool = {"min_size": 1, "max_size": 1, "timeout": 0.1}
        register("pooled", case.bench.server.django(OPTIONS={"pool": pool}))
        case.stack.callback(unregister, "pooled")
        connection: Any = connections["pooled"]
        connection.pool.open()
        taken = connection.pool.getconn()
        case.stack.callback(connection.pool.putconn, taken)
        connection.ensure_connection()
        return
    address = {"host": case.bench.server.host, "port": case.bench.server.port, "dbname": "test"}
    account = {"user": USER, "password": PASSWORD}
    pool = ConnectionPool(kwargs=address | account, min_size=1, max_size=1, open=True)
    with pool, pool.connection(), pool.connection(timeout=0.1):
        pass


@happens(psycopg="08p01-pgbouncer", psycopg2="server-closed-the-connection-psycopg2")
def no_server_for_pgbouncers_client(case: Case) -> None:
    case.start_pgbouncer(pool_mode="transaction", default_pool_size=1, admin_users=USER)
    holder, client = case.connect("pgbouncer"), case.connect("pgbouncer")
    with holder.transaction():
        holder.execute("SELECT 1")  # it keeps the one that there is
        wait_briefly(case)
        client.insert(SECOND)


def wait_briefly(case: Case) -> None:
    """Have PgBouncer's clients wait a second for a server; a connect would have to, too."""
    assert case.pgbouncer
    address = {"host": case.pgbouncer.host, "port": case.pgbouncer.port, "dbname": "pgbouncer"}
    with psycopg.connect(user=USER, password=PASSWORD, autocommit=True, **address) as console:
        console.execute("SET query_wait_timeout = 1")


@happens(psycopg="08p01-pgbouncer", psycopg2="server-closed-the-connection-psycopg2")
def pgbouncers_server_down(case: Case) -> None:
    case.start_pgbouncer(pool_mode="transaction", admin_users=USER)
    clients = [case.connect("pgbouncer") for _ in range(2)]
    wait_briefly(case)
    case.bench.server.stop()
    error_of(lambda: clients[0].insert(SECOND))  # PgBouncer learns it, and goes on waiting
    clients[1].insert(SECOND)


@happens(psycopg="query-wait-timeout-pgbouncer", psycopg2="query-wait-timeout-pgbouncer")
def pgbouncers_server_never_up(case: Case) -> None:
    case.start_pgbouncer(query_wait_timeout=1)
    case.bench.server.stop()
    case.connect("pgbouncer")


@happens(psycopg="08p01-pgbouncer", psycopg2="server-closed-the-connection-psycopg2")
def pgbouncers_server_crashed(case: Case) -> None:
    case.start_pgbouncer()
    client = case.connect("pgbouncer")
    with case.while_running(case.bench.server.kill):
        client.execute(SLOWLY["postgresql"])


@happens(
    psycopg="no-more-connections-allowed-pgbouncer",
    psycopg2="no-more-connections-allowed-pgbouncer",
)
def pgbouncer_full(case: Case) -> None:
    case.start_pgbouncer(max_client_conn=1)
    for _ in range(2):
        case.connect("pgbouncer")


# PostgreSQL: the connection is fine


@happens(psycopg="57014", psycopg2="57014")
def statement_timeout(case: Case) -> None:
    client = case.connect(options="-c statement_timeout=200")
    client.execute(SLOWLY["postgresql"])


@happens(psycopg="57014", psycopg2="57014")
def cancelled(case: Case) -> None:
    client = case.connect()
    session = client.session_id()
    with case.while_running(lambda: case.bench.execute(f"SELECT pg_cancel_backend({session})")):
        client.execute(SLOWLY["postgresql"])


@happens(psycopg="55p03", psycopg2="55p03")
def lock_timeout(case: Case) -> None:
    case.bench.execute("INSERT INTO happened (name) VALUES ('locked')")
    holder, client = case.connect(), case.connect(options="-c lock_timeout=200")
    with rolled_back(holder):
        holder.execute("SELECT * FROM happened FOR UPDATE")
        client.execute("UPDATE happened SET name = 'second'")


@happens(psycopg="40p01", psycopg2="40p01")
def deadlock_on_postgresql(case: Case) -> None:
    deadlock_of(case)


@happens(psycopg="40001", psycopg2="40001")
def serialization_failure(case: Case) -> None:
    case.bench.execute("INSERT INTO happened (name) VALUES ('old')")
    client = case.connect()
    with client.transaction():
        client.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        client.execute("SELECT * FROM happened")
        case.bench.execute("UPDATE happened SET name = 'new'")
        client.insert(FIRST)
        client.execute("UPDATE happened SET name = 'second'")


@happens(psycopg="25006", psycopg2="25006")
def read_only_on_postgresql(case: Case) -> None:
    client = case.connect(options="-c default_transaction_read_only=on")
    client.insert(SECOND)


@happens(psycopg="25p02", psycopg2="25p02")
def failed_transaction(case: Case) -> None:
    client = case.connect()
    with client.transaction():
        client.insert(FIRST)
        with suppress(Exception):
            client.execute("SELECT 1 / 0")
        if case.guarded:  # Django refuses to send it, in words of its own
            client.connection.needs_rollback = False
        client.insert(SECOND)


@happens(psycopg="another-command-is-already-in-progress", guarded="")
def interrupted_in_a_statement(case: Case) -> None:
    client = case.connect()
    client.handle.pgconn.send_query(b"SELECT pg_sleep(60)")  # as an exception would leave it
    client.insert(SECOND)


# Helpers


def unbuffered(client: Any) -> Any:
    """Return a cursor that reads its rows one by one."""
    module = importlib.import_module(client.case.driver.module + ".cursors")
    return client.handle.cursor(module.SSCursor)


def error_of(action: Callable[[], Any]) -> Exception:
    """Return the error in which something ends."""
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("Nothing went wrong.")


def wrapped(client: Any) -> Any:
    """Let a raw cursor's errors pass Django, where there is one."""
    return client.connection.wrap_database_errors if client.case.guarded else nullcontext()


@contextmanager
def rolled_back(client: Any) -> Iterator[None]:
    """Give a transaction that is undone at the end."""
    with suppress(UndoneError), client.transaction():
        yield
        raise UndoneError


# The tests


MARIADB = {"max_user_connections": 50, "max_connections": 50, "max_allowed_packet": 16384}


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[str, Bench]]:
    benches = {
        "mariadb": Bench("mariadb", **MARIADB),
        "postgresql": Bench("postgresql", max_connections=10, deadlock_timeout="50ms"),
    }
    yield benches
    for bench in benches.values():
        bench.remove()


COMBINATIONS = list(combinations())


def name_of(combination: tuple[Happening, Driver, bool]) -> str:
    happening, driver, guarded = combination
    return f"{happening.name}-{driver.name}" + ("-guarded" if guarded else "")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_real_error(combination: tuple[Happening, Driver, bool], benches: dict[str, Bench]) -> None:
    """The error that happens is the fault that the table says, and what it says is true."""
    happening, driver, guarded = combination
    bench = benches[driver.kind]
    bench.reset()
    case = Case(bench, driver, guarded)
    with case.stack:
        error = error_of(lambda: happening.run(case))
        name = (happening.guarded if guarded else happening.faults)[driver.name]
        row = ROWS[name]
        outcome = (guarded and happening.outcome) or row.outcome
        fault = classify(error)
        assert fault == replace(row, outcome=outcome), repr(error)
        assert MEANINGS[name] == Meaning(
            row.kind, row.code, row.outcome, row.connection_usable, row.safe_to_retry
        )
    bench.server.start()
    rows = bench.rows()
    if fault.outcome is not UNKNOWN:
        assert not [row for row in rows if row.startswith(SECOND)]
    if fault.outcome is ROLLED_BACK:
        assert FIRST not in rows


@pytest.mark.parametrize("name", ["mysqlclient", "PyMySQL"])
def test_some_of_several(name: str, benches: dict[str, Bench]) -> None:
    """One of executemany()'s statements ran before the quota was spent: the outcome is unknown."""
    bench = benches["mariadb"]
    bench.reset()
    case = Case(bench, DRIVERS[name], guarded=True)
    with case.stack:
        limit(case, "MAX_UPDATES_PER_HOUR 1")
        client = case.connect(user="clerk", password="x")
        sql = "INSERT happened SET name = %s"  # "VALUES" would make one statement of both
        error = error_of(lambda: client.cursor().executemany(sql, [[FIRST], [SECOND]]))
        fault = classify(error)
    assert fault == replace(ROWS["1226-statements-per-hour"], outcome=UNKNOWN)
    assert bench.rows() == [FIRST]


def test_every_row_is_produced_or_not_claimed() -> None:
    """What the tables call measured is measured here; the docs list the others."""
    produced = {
        (happening.guarded if guarded else happening.faults)[driver.name]
        for happening, driver, guarded in COMBINATIONS
    }
    assert produced == PRODUCIBLE == set(MEANINGS)


# The tables


def test_anchors_are_unique() -> None:
    """Each fault has a place of its own in the docs."""
    faults = {known.fault for vendor in VENDORS.values() for known in vendor.faults}
    assert len({fault.anchor for fault in faults}) == len(faults) == len(ROWS)


@pytest.mark.parametrize("fault", ROWS.values(), ids=ROWS)
def test_wording(fault: Fault) -> None:
    """One sentence says what it means, one or two say what to do, and what proves it is named."""
    for text, most in ((fault.meaning, 2), (fault.advice, 3)):
        assert text == text.strip()
        assert text[0].isupper()
        assert text[-1] in ".)"
        assert 1 <= len(re.findall(r"[.?)](?: |$)", text)) <= most, text
    proof = r"(measured|measured elsewhere|measured by hand|manual|source code): \S"
    assert re.match(proof, fault.source)
    assert repr(fault).isascii()  # whatever a terminal can show


# What later PgBouncers say, by their source code


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("connect failed", Kind.UNREACHABLE),
        ('password authentication failed for user "shop"', Kind.CREDENTIALS),
        ('database "shop" does not exist', Kind.CREDENTIALS),
    ],
)
def test_reason_behind_pgbouncer(reason: str, kind: Kind) -> None:
    """Wrong credentials are told from a server that is away, with the code and without."""
    text = f"server login has been failing, cached error: {reason} (server_login_retry)"
    with_code, without = psycopg.errors.ProtocolViolation, psycopg.OperationalError
    for error in (with_code(text), without(f"FATAL:  {text}")):
        fault = VENDORS["postgresql"].fault(error, connecting=True)
        assert (fault and fault.kind) is kind


# PostgreSQL's languages


TRANSLATIONS = sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/postgres-15.mo"))
SENTENCES = {
    "sorry, too many clients already": Kind.NO_FREE_SLOT,
    "remaining connection slots are reserved for non-replication superuser connections": (
        Kind.NO_FREE_SLOT
    ),
    'too many connections for role "%s"': Kind.NO_FREE_SLOT,
    'too many connections for database "%s"': Kind.NO_FREE_SLOT,
    "the database system is starting up": Kind.UNREACHABLE,
    "the database system is shutting down": Kind.UNREACHABLE,
    "the database system is in recovery mode": Kind.UNREACHABLE,
    "the database system is not yet accepting connections": Kind.UNREACHABLE,
    "the database system is not accepting connections": Kind.UNREACHABLE,
    'role "%s" does not exist': None,
    'database "%s" does not exist': None,
    'password authentication failed for user "%s"': None,
    "terminating connection due to administrator command": Kind.LOST,
    "terminating connection because of crash of another server process": Kind.LOST,
    "terminating connection due to unexpected postmaster exit": Kind.LOST,
}
LATIN = ("de", "es", "fr", "it", "sv")


@pytest.mark.skipif(not TRANSLATIONS, reason="PostgreSQL's translations are not installed.")
def test_languages() -> None:
    """A refusal is told in every language of the server's; nothing else is taken for one."""
    for file in TRANSLATIONS:
        with file.open("rb") as opened:
            translate = gettext.GNUTranslations(opened).gettext
        for sentence, kind in SENTENCES.items():
            told = translate(sentence)
            texts = [told]
            if file.parts[-3] in LATIN:  # as a server with LC_CTYPE=C says it
                texts.append(told.encode("ascii", "replace").decode())
            for text in texts if told != sentence else ():
                fault = classify(psycopg.OperationalError(f"connection failed: FATAL:  {text}"))
                assert (fault and fault.kind) is kind, text


@pytest.mark.parametrize("ctype", ["C", "C.UTF-8"])
def test_german_server(ctype: str) -> None:
    """The real thing, with its letters and without."""

    class GermanServer(PostgreSQLServer):
        def _command(self) -> list[str]:
            return ["env", f"LC_CTYPE={ctype}", "LANGUAGE=de", *super()._command()]

    with GermanServer(lc_messages="C.UTF-8", max_connections=5) as server, ExitStack() as stack:
        account = {"user": USER, "password": PASSWORD, "dbname": "test"}
        connect = functools.partial(psycopg.connect, host=server.host, port=server.port, **account)

        def refusal() -> Exception:
            return error_of(lambda: [stack.enter_context(connect()) for _ in range(6)])

        error = refusal()
        if "remaining" in str(error):
            pytest.skip("This system's C.UTF-8 has no translations.")
        assert "verbleibenden Verbindungen" in str(error)
        assert classify(error) == ROWS["remaining-connection-slots-are-reserved"]
        stack.close()
        server.grant_limit(USER, 1)
        server.wait_for_sessions(0)
        error = refusal()
        assert "zu viele Verbindungen" in str(error)
        assert classify(error) == ROWS["too-many-connections-for"]
