"""contrib.sqlalchemy: engines on real servers."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.conf import settings
from django.core import checks
from django.core.checks.registry import registry
from django.test import override_settings
from sqlalchemy import URL, Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from django_dbhealth import Kind, Outcome, classify, open_connections
from django_dbhealth.contrib.sqlalchemy import check_engines, pool_options, watch_engine
from tests.conftest import KINDS
from tests.servers.base import PASSWORD, USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent

DIALECTS = {
    "mysqlclient": ("mariadb", "mysql+mysqldb"),
    "PyMySQL": ("mariadb", "mysql+pymysql"),
    "psycopg": ("postgresql", "postgresql+psycopg"),
}
SESSION_ID = {"mariadb": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
SHORT = {"mariadb": {"wait_timeout": 4}, "postgresql": {"idle_session_timeout": "4s"}}


def url_of(server: Server, dialect: str) -> URL:
    return URL.create(
        dialect,
        username=USER,
        password=PASSWORD,
        host=server.host,
        port=server.port,
        database="test",
    )


@pytest.fixture(autouse=True)
def _no_check_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the engines' check for this test only."""
    monkeypatch.setattr(registry, "registered_checks", {*registry.registered_checks})


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines that are disposed of at the end of the test."""
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.dispose()


@pytest.fixture
def make(request: pytest.FixtureRequest, engines: list[Engine]) -> Callable[..., Engine]:
    """Make an engine on a server that all tests share: `make("psycopg", pool_size=1)`."""

    def make(name: str, **options: Any) -> Engine:
        kind, dialect = DIALECTS[name]
        engine = create_engine(url_of(request.getfixturevalue(kind), dialect), **options)
        engines.append(engine)
        return engine

    return make


every_driver = pytest.mark.parametrize("name", list(DIALECTS))


def session_id(engine: Engine, name: str) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text(SESSION_ID[DIALECTS[name][0]])))


# Idle periods


def test_idle_periods(new_server: Any, engines: list[Engine]) -> None:
    """Ten quiet times that are longer than the servers' patience: ours meet none of them."""
    servers = {kind: new_server(kind, **SHORT[kind]) for kind in KINDS}
    ours: dict[str, Engine] = {}
    defaults: dict[str, Engine] = {}
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 4}):
        for name, (kind, dialect) in DIALECTS.items():
            url = url_of(servers[kind], dialect)
            ours[name] = create_engine(url, **pool_options())
            defaults[name] = create_engine(url)
    engines += [*ours.values(), *defaults.values()]
    errors = dict.fromkeys(DIALECTS, 0)
    for period in range(11):
        for server in servers.values() if period else ():  # until they have lost patience
            server.wait_for_sessions(0, USER)
        for name in DIALECTS:
            session_id(ours[name], name)
            try:
                session_id(defaults[name], name)
            except DBAPIError as error:
                fault = classify(error)
                assert fault is not None
                assert fault.kind is Kind.LOST
                errors[name] += 1
    print(f"10 idle periods: pool_options() 0 errors, SQLAlchemy's defaults {errors}")
    assert [each >= 5 for each in errors.values()] == [True] * 3


@every_driver
def test_killed_in_the_pool(name: str, make: Any, request: pytest.FixtureRequest) -> None:
    """A young connection is probed too."""
    engine, server = make(name, **pool_options()), request.getfixturevalue(DIALECTS[name][0])
    before = session_id(engine, name)
    server.kill_connection(before)
    server.wait_until_gone(before)
    assert session_id(engine, name) != before


def test_probe_of_a_hung_server(new_server: Any, engines: list[Engine]) -> None:
    """It waits for ever, unless the driver was told how long a read may take."""
    server = new_server("mariadb")
    url = url_of(server, "mysql+mysqldb")
    waiting = create_engine(url, **pool_options())
    bounded = create_engine(
        url, connect_args={"read_timeout": 4, "connect_timeout": 4}, **pool_options()
    )
    engines += [waiting, bounded]
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(session_id(waiting, "mysqlclient")))
    for engine in engines:
        session_id(engine, "mysqlclient")
    server.freeze()
    try:
        thread.start()
        with pytest.raises(OperationalError):
            session_id(bounded, "mysqlclient")
        assert answers == []
    finally:
        server.thaw()
        thread.join()
    assert len(answers) == 1


# Options


@pytest.mark.parametrize(
    ("seconds", "recycle"), [(300, 280), (28_800, 28_780), (41, 21), (40, 20), (10, 5), (2, 1)]
)
def test_pool_recycle(seconds: int, recycle: int) -> None:
    """20 seconds less, of a short one half."""
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": seconds}):
        assert pool_options() == {"pool_pre_ping": True, "pool_recycle": recycle}


def test_pool_recycle_of_an_alias() -> None:
    config = {"SERVER_IDLE_TIMEOUT": 300, "DATABASES": {"replica": {"SERVER_IDLE_TIMEOUT": 60}}}
    with override_settings(DBHEALTH=config):
        assert pool_options("replica")["pool_recycle"] == 40


def test_pool_recycle_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """280, as for MySQL; a PostgreSQL of DATABASES drops nothing."""
    for engine in ("postgresql", "dummy", "sqlite3"):
        entry = {"ENGINE": f"django.db.backends.{engine}", "NAME": "nowhere"}
        monkeypatch.setitem(settings.DATABASES, engine, entry)
    with override_settings(DBHEALTH={}):
        assert pool_options("postgresql") == {"pool_pre_ping": True}
        for alias in ("elsewhere", "dummy", "sqlite3", "default"):
            assert pool_options(alias) == {"pool_pre_ping": True, "pool_recycle": 280}


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, (1, 0)), (3, (3, 0)), (5, (5, 0)), (8, (5, 3)), (40, (5, 10))]
)
def test_connection_limit(limit: int, sizes: tuple[int, int]) -> None:
    """Together they are never more."""
    options = pool_options(connection_limit=limit)
    assert (options["pool_size"], options["max_overflow"]) == sizes


@pytest.mark.parametrize("value", [0, -1, True, "3", 2.5])
def test_bad_connection_limit(value: Any) -> None:
    with pytest.raises(ValueError, match="Give a number of connections, 1 or more, or None"):
        pool_options(connection_limit=value)


def test_fits_the_account(new_server: Any, engines: list[Engine]) -> None:
    """Three connections are enough for eight threads; with the defaults they are not."""
    server = new_server("mariadb", max_user_connections=3)
    url = url_of(server, "mysql+mysqldb")

    def refusals(engine: Engine) -> list[int]:
        engines.append(engine)
        codes: list[int] = []
        barrier = threading.Barrier(8)

        def work() -> None:
            barrier.wait()
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT SLEEP(0.2)"))
            except OperationalError as error:
                fault = classify(error)
                codes.append(fault.code if fault else 0)  # type: ignore[arg-type]

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.dispose()
        server.wait_for_sessions(0, USER)
        return codes

    assert refusals(create_engine(url, **pool_options(connection_limit=3))) == []
    assert set(refusals(create_engine(url))) in ({1203}, {1226})


# The check


def check_those(name: str) -> list[checks.CheckMessage]:
    """Return what is said of the engines of that name; earlier tests' may still be there."""
    return sorted((each for each in check_engines() if f"{name!r}" in each.msg), key=str)


def test_check(make: Any) -> None:
    """It warns of a pool_recycle of -1, and of one at or over the limit."""
    for recycle in (-1, 300, 299):
        watch_engine(make("mysqlclient", pool_recycle=recycle), name="checked")
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 300}):
        found = check_those("checked")
        assert [each for each in checks.run_checks(tags=["dbhealth"]) if each in found] == found
    hint = (
        "Write create_engine(url, **pool_options()), or a pool_recycle below 300 with "
        "pool_pre_ping=True. If the server really waits longer, write its timeout in seconds as "
        "SERVER_IDLE_TIMEOUT in DBHEALTH. (see docs/checks.md#django-dbhealth-w201)"
    )
    assert found == [
        checks.Warning(
            f"The pool_recycle of the engine 'checked' is {recycle}{never}, but a "
            "connection that was idle for 300 seconds is dropped by its server "
            "(SERVER_IDLE_TIMEOUT in DBHEALTH): the first statement after a quiet time fails.",
            hint=hint,
            id="django_dbhealth.W201",
        )
        for recycle, never in ((-1, ", which is never"), (300, ""))
    ]


def test_check_of_a_pool_that_probes(make: Any) -> None:
    watch_engine(make("mysqlclient", pool_pre_ping=True), name="probing")
    [message] = check_those("probing")
    assert message.msg.endswith(
        "(assumed as long as DBHEALTH has no SERVER_IDLE_TIMEOUT for it): pool_pre_ping has to "
        "find it out each time, and no time limit bounds its probe."
    )


def test_check_is_silent(make: Any) -> None:
    """With our options; without a pool; on a PostgreSQL that drops nothing; on SQLite."""
    watch_engine(make("PyMySQL", **pool_options()), name="quiet")
    watch_engine(make("mysqlclient", poolclass=NullPool), name="quiet")
    watch_engine(make("psycopg"), name="quiet")
    memory = create_engine("sqlite://")
    watch_engine(memory, name="quiet")
    assert check_those("quiet") == []
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 60}):
        assert len(check_those("quiet")) == 2  # PyMySQL's 280 and psycopg's -1


def test_an_engine_that_is_gone(make: Any, engines: list[Engine]) -> None:
    """Nothing of ours keeps it."""
    watch_engine(make("mysqlclient"), name="gone")
    engines.clear()
    gc.collect()
    assert check_those("gone") == []


@pytest.mark.parametrize("value", ["mysql://", None])
def test_no_engine(value: Any) -> None:
    with pytest.raises(TypeError, match=r"takes an Engine, and was given a (str|NoneType)\."):
        watch_engine(value)


# open_connections()


@every_driver
def test_open_connections(name: str, make: Any, request: pytest.FixtureRequest) -> None:
    """The pool's connections are there, lent or not, until they are closed."""
    engine, server = make(name), request.getfixturevalue(DIALECTS[name][0])
    for each in ("shop", "again"):  # a second call changes nothing
        watch_engine(engine, name=each)

    def held() -> list[Any]:
        return [each for each in open_connections() if each.alias == "shop"]

    assert held() == []
    with engine.connect() as first:
        first.execute(text("SELECT 1"))
        with engine.connect():
            assert [each.in_transaction for each in held()] == [True, True]
            assert {each.opened_at.rpartition(":")[0] for each in held()} == {__file__}
            assert PASSWORD not in str(held())
    assert [each.in_transaction for each in held()] == [False, False]
    with pytest.raises(DBAPIError), engine.connect() as connection:
        session = connection.scalar(text(SESSION_ID[DIALECTS[name][0]]))
        server.kill_connection(session)
        server.wait_until_gone(session)
        connection.execute(text("SELECT 1"))
    assert len(held()) == 1
    with engine.connect() as connection:
        connection.detach()
        assert [each.in_transaction for each in held()] == []
    engine.dispose()
    assert held() == []


def test_watched_late(make: Any) -> None:
    """What was opened before is not known, and does no harm."""
    engine = make("mysqlclient")
    session_id(engine, "mysqlclient")
    watch_engine(engine, name="late")
    session_id(engine, "mysqlclient")
    assert [each for each in open_connections() if each.alias == "late"] == []
    engine.dispose()


# Forks and settings

FORK = """
import gc, json, os, sys
from django.conf import settings
from sqlalchemy import create_engine, text
from django_dbhealth import open_connections
from django_dbhealth.contrib.sqlalchemy import pool_options, watch_engine

url, session = json.loads(sys.argv[1])
assert pool_options() == {"pool_pre_ping": True, "pool_recycle": 280}
engine = create_engine(url)  # which does not probe
watch_engine(engine)
memory = create_engine("sqlite://")
watch_engine(memory)

def ask():
    with engine.connect() as connection:
        return connection.scalar(text(session))

def ends():
    pass

def disposes():
    engine.dispose()

def collects():
    global engine
    del engine
    gc.collect()

def queries():
    assert open_connections() == []
    assert ask() != mine
    assert len(open_connections()) == 1
    with memory.connect() as connection:
        assert connection.scalar(text("SELECT COUNT(*) FROM shelf")) == 1
    engine.dispose()

def fork(action):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(status)

with memory.begin() as connection:
    connection.execute(text("CREATE TABLE shelf (id INT)"))
    connection.execute(text("INSERT INTO shelf VALUES (1)"))
mine = ask()
for action in (ends, disposes, collects, queries) * 3:
    assert fork(action) == 0, action
    assert ask() == mine, action
with engine.connect() as lent:
    assert lent.scalar(text(session)) == mine
    for action in (ends, disposes, queries) * 3:
        assert fork(action) == 0, action
        assert lent.scalar(text(session)) == mine, action
engine.dispose()
memory.dispose()
assert not settings.configured
"""


@every_driver
def test_fork_without_settings(name: str, request: pytest.FixtureRequest) -> None:
    """A child leaves its parent's sessions alone; and all of this needs no Django settings."""
    kind, dialect = DIALECTS[name]
    url = url_of(request.getfixturevalue(kind), dialect).render_as_string(hide_password=False)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK, json.dumps([url, SESSION_ID[kind]])],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


# classify()


@every_driver
def test_classify(name: str, make: Any, request: pytest.FixtureRequest) -> None:
    """SQLAlchemy's exception is known by the driver's in it, also when its cause is gone."""
    engine, server = make(name), request.getfixturevalue(DIALECTS[name][0])
    with pytest.raises(DBAPIError) as caught, engine.connect() as connection:
        session = connection.scalar(text(SESSION_ID[DIALECTS[name][0]]))
        server.kill_connection(session)
        server.wait_until_gone(session)
        connection.execute(text("SELECT 1"))
    fault = classify(caught.value)
    assert fault is not None
    assert fault.kind is Kind.LOST
    caught.value.__cause__ = caught.value.__context__ = None
    assert classify(caught.value) == fault


def test_classify_what_was_pickled(make: Any) -> None:
    with pytest.raises(DBAPIError) as caught, make("mysqlclient").connect() as connection:
        connection.exec_driver_sql("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213")
    fault = classify(pickle.loads(pickle.dumps(caught.value)))
    assert fault is not None
    assert (fault.code, fault.outcome) == (1213, Outcome.ROLLED_BACK)
