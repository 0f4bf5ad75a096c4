"""classify(): what an exception means, whatever it was wrapped, hidden or sent through."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import django.db
import MySQLdb
import psycopg
import psycopg2
import pymysql
import pytest
from django.db import Error, connections, transaction
from django.test import override_settings
from django.utils.connection import ConnectionDoesNotExist

from django_dbhealth import Kind, Outcome, classify
from django_dbhealth.faults import Circumstances
from django_dbhealth.vendors import VENDORS
from tests.app.models import Row
from tests.servers import Proxy
from tests.servers.base import wait_for

if TYPE_CHECKING:
    from tests.conftest import Database

GONE = MySQLdb.OperationalError(2006, "Server has gone away")
LOST = MySQLdb.OperationalError(2013, "Lost connection to server during query")
REFUSED = MySQLdb.OperationalError(2002, "Can't connect to server on '127.0.0.1' (115)")
DEADLOCK = MySQLdb.OperationalError(1213, "Deadlock found when trying to get lock")


IN_USE = Circumstances(alias="default", connecting=False, in_transaction=False)


def code(exc: BaseException, using: str | None = None) -> Any:
    fault = classify(exc, using)
    return fault and fault.code


def raised(error: BaseException, *, handling: BaseException) -> BaseException:
    """Return an error that was raised while another was handled."""
    try:
        try:
            raise handling
        except type(handling):
            raise error  # noqa: B904
    except type(error):
        return error


def caused(error: BaseException, *, by: BaseException | None) -> BaseException:
    error.__cause__ = by
    return error


# What is no database error, and bad input


class Similar(Exception):
    """Somebody else's, with a number that looks like one of ours."""


@pytest.mark.parametrize(
    "exc",
    [
        ValueError(2006),
        Similar(2006, "Server has gone away"),
        KeyboardInterrupt(),
        ConnectionResetError(104, "Connection reset by peer"),
        ExceptionGroup("several", [GONE]),
        Exception(),
    ],
    ids=repr,
)
def test_no_database_error(exc: BaseException) -> None:
    assert classify(exc) is None


@pytest.mark.parametrize("exc", ["2006", 2006, None, MySQLdb.OperationalError], ids=repr)
def test_no_exception(exc: Any) -> None:
    """A number is a question for the command; a class says nothing of what has happened."""
    with pytest.raises(TypeError, match="takes an exception.* for a number use dbhealth explain"):
        classify(exc)


@pytest.mark.parametrize(
    "kind", [MySQLdb.OperationalError, pymysql.OperationalError, psycopg.Error, psycopg2.Error]
)
@pytest.mark.parametrize(
    "args", [(), ("nothing known",), (None,), (424242, "?"), ("2006", ""), ({},)]
)
def test_unknown_error(kind: type[Exception], args: tuple[Any, ...]) -> None:
    """An error of a driver's that the tables do not have, without a number for instance."""
    assert classify(kind(*args)) is None
    assert classify(caused(django.db.OperationalError(*args), by=kind(*args))) is None


def test_integrity_error() -> None:
    """A database error that says nothing of the connection is no fault."""
    assert classify(MySQLdb.IntegrityError(1062, "Duplicate entry")) is None


def test_cause_that_refers_to_itself() -> None:
    own = Similar()
    own.__cause__ = own
    assert classify(own) is None
    first, second = Similar(), Similar()
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is None
    gone = MySQLdb.OperationalError(2006, "")
    gone.__context__ = caused(Similar(), by=gone)
    assert code(gone) == 2006


# Causes and contexts


def test_cause() -> None:
    """What an error was raised from, however far down."""
    assert code(caused(Similar(), by=caused(ValueError(), by=GONE))) == 2006


def test_error_in_a_handler() -> None:
    """A mistake in the code that handles an error is not the database's."""
    assert classify(raised(Similar(), handling=GONE)) is None


def test_sqlalchemy() -> None:
    """Its errors are raised from the driver's, and keep it as orig where the cause is lost."""

    class DBAPIError(Exception):  # no SQLAlchemy here: it wraps so since version 0.5
        orig: Any = None

    assert code(caused(DBAPIError(), by=LOST)) == 2013
    error = DBAPIError()
    error.orig = LOST
    assert code(error) == 2013
    error.orig = "a text"
    assert classify(error) is None


def test_transaction_management_error() -> None:
    """Django's "You can't execute queries until the end of the block" says from what."""
    error = transaction.TransactionManagementError("An error occurred …")
    by: Any = caused(django.db.OperationalError(2006, "gone"), by=GONE)
    by.dbhealth_circumstances = replace(IN_USE, in_transaction=True)
    fault = classify(caused(error, by=by))
    assert fault
    assert (fault.code, fault.outcome) == (2006, Outcome.ROLLED_BACK)


@pytest.mark.parametrize("hidden", [LOST, GONE], ids=["2013", "2006"])
def test_failed_connect_hides_the_first_error(hidden: Exception) -> None:
    refused = MySQLdb.OperationalError(2002, "Can't connect")
    assert code(raised(refused, handling=hidden)) == hidden.args[0]


def test_outcome_unknown_counts_wherever_it_stands() -> None:
    """Work that was tried twice may have run, whichever of the tries may."""
    lost = MySQLdb.OperationalError(2013, "Lost connection")
    for chain in (
        raised(lost, handling=DEADLOCK),
        raised(MySQLdb.OperationalError(2006, ""), handling=lost),
        raised(MySQLdb.OperationalError(2002, ""), handling=raised(GONE, handling=lost)),
    ):
        fault = classify(chain)
        assert fault
        assert fault.code == 2013
        assert not fault.safe_to_retry


def test_error_on_a_living_connection_counts_by_itself() -> None:
    """It is no consequence of one that was handled before."""
    deadlock = MySQLdb.OperationalError(1213, "Deadlock")
    assert code(raised(deadlock, handling=LOST)) == 1213


def test_suppressed_context() -> None:
    error = raised(MySQLdb.OperationalError(2002, ""), handling=LOST)
    error.__suppress_context__ = True
    assert code(error) == 2002


# Circumstances


@pytest.mark.parametrize(
    ("number", "circumstances", "outcome"),
    [
        (2006, {}, Outcome.NOT_EXECUTED),
        (2006, {"several": True}, Outcome.UNKNOWN),
        (2006, {"in_transaction": True}, Outcome.ROLLED_BACK),
        (2006, {"in_transaction": True, "several": True}, Outcome.ROLLED_BACK),
        (2006, {"connecting": True, "several": True}, Outcome.NOT_EXECUTED),
        (2006, {"connecting": True, "in_transaction": True}, Outcome.NOT_EXECUTED),
        (2013, {}, Outcome.UNKNOWN),
        (2013, {"in_transaction": True}, Outcome.UNKNOWN),  # it may have been the COMMIT
        (2013, {"connecting": True}, Outcome.NOT_EXECUTED),
        (1205, {"in_transaction": True}, Outcome.NOT_EXECUTED),
        (1205, {"in_transaction": True, "several": True}, Outcome.UNKNOWN),
        (1213, {}, Outcome.ROLLED_BACK),
        (1213, {"several": True}, Outcome.UNKNOWN),
        (1213, {"in_transaction": True, "several": True}, Outcome.ROLLED_BACK),
    ],
)
def test_circumstances(number: int, circumstances: dict[str, bool], outcome: Outcome) -> None:
    """What the guard knows makes the outcome more certain, or less."""
    driver = MySQLdb.OperationalError(number, "text")
    error: Any = caused(django.db.OperationalError(number, "text"), by=driver)
    error.dbhealth_circumstances = replace(IN_USE, **circumstances)
    fault = classify(error)
    assert fault
    assert fault.outcome is outcome
    assert fault.safe_to_retry is (outcome is not Outcome.UNKNOWN)


# Real ones


def test_pickled(database: Database) -> None:
    """One that was sent through a queue has lost its cause; its alias tells whose it is."""
    settings = connections.settings[database.alias]
    settings["NAME"] = "nowhere"
    with pytest.raises(Error) as caught:
        connections[database.alias].ensure_connection()
    sent = pickle.loads(pickle.dumps(caught.value))
    assert sent.__cause__ is None
    fault = classify(caught.value)
    assert fault
    assert fault.kind is Kind.CREDENTIALS
    assert classify(sent) == classify(sent, database.alias) == fault
    other = "postgresql" if database.server.vendor == "mysql" else "default"
    assert classify(sent, other) is None
    assert classify(sent, "sqlite") is None
    with pytest.raises(ConnectionDoesNotExist):
        classify(sent, "no such alias")


BARE = """
import sys

{0}
from django_dbhealth import Outcome, classify

assert not any(name.partition(".")[0] == "django" for name in sys.modules)
try:
    {1}
except Exception as error:
    fault = classify(error)
assert fault.kind.value == "unreachable", fault
assert fault.outcome is Outcome.NOT_EXECUTED
assert not any(name.partition(".")[0] == "django" for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("imports", "connect"),
    [
        ("import MySQLdb", "MySQLdb.connect(host='127.0.0.1', port={0})"),
        ("import pymysql", "pymysql.connect(host='127.0.0.1', port={0})"),
        ("import psycopg", "psycopg.connect('host=127.0.0.1 port={0}')"),
        ("import psycopg2", "psycopg2.connect('host=127.0.0.1 port={0}')"),
    ],
)
def test_without_django(imports: str, connect: str, closed_port: int) -> None:
    """Neither its settings nor the package itself are needed."""
    run_python(BARE.format(imports, connect.format(closed_port)))


def test_without_settings() -> None:
    """With Django there but not configured."""
    run_python(
        "import django.db\n"
        "from django_dbhealth import classify\n"
        "assert classify(django.db.OperationalError(2006, 'gone')).code == 2006\n"
        "assert classify(django.db.OperationalError('the connection is closed')).code is None\n"
    )


@pytest.fixture
def closed_port() -> int:
    with Proxy("127.0.0.1", 9) as proxy:
        return proxy.port


def run_python(program: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# A server that hangs at COMMIT, and then refuses connects


def hang_at_commit(alias: str, database: Any, proxy: Proxy, stack: ExitStack) -> Exception:
    """Let COMMIT meet a frozen server; return the error that the program sees."""
    server = database.server
    connection: Any = connections[alias]
    connection.ensure_connection()
    try:
        with transaction.atomic(alias):
            Row.objects.using(alias).create(name="committed")
            server.freeze()
            stack.callback(server.thaw)
            proxy.refuse()
            if connection.vendor == "postgresql":  # the driver would wait for ever
                cut = threading.Thread(target=cut_after_more, args=[proxy, proxy.carried])
                cut.start()
                stack.callback(cut.join)
    except Error as error:
        return error
    raise AssertionError("COMMIT was answered.")


def cut_after_more(proxy: Proxy, carried: int) -> None:
    """Cut the connection once the COMMIT is on the server's side."""
    wait_for(lambda: proxy.carried > carried)
    proxy.cut()


@pytest.mark.parametrize("guard", [True, False])
def test_hung_server_at_commit(guard: bool, database: Database) -> None:
    """Unknown it is: later the rows are there. Without the guard the reconnect's error is seen."""
    server = database.server
    settings = connections.settings[database.alias]
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.host, server.port))
        settings |= {"HOST": proxy.host, "PORT": str(proxy.port)}
        if server.vendor == "mysql":
            settings["OPTIONS"] |= {"read_timeout": 4}
        with override_settings(DBHEALTH={"GUARD": guard}):
            error = hang_at_commit(database.alias, database, proxy, stack)
        fault = classify(error)
        assert fault
        assert fault.outcome is Outcome.UNKNOWN
        assert fault.kind is Kind.LOST
        assert not fault.safe_to_retry
        bare = error.__cause__
        assert bare
        visible = VENDORS[server.vendor].fault(bare, connecting=None)
        assert visible
        assert visible.kind is (Kind.LOST if guard else Kind.UNREACHABLE)
    count = "SELECT COUNT(*) FROM app_row WHERE name = 'committed'"
    wait_for(lambda: server.execute(count, database="rows") == [(1,)])
