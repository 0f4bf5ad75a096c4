"""docs/neighbours.md: the snippets as they are usually written, what each does wrong, and ours."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import MySQLdb
import pytest
from django.core.checks.registry import registry
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import OperationalError

from tests.servers.base import PASSWORD, USER
from tests.test_docs import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = [each for each in blocks() if each.page.name == "neighbours.md"]


def load(marker: str, **names: Any) -> dict[str, Any]:
    """Run the one snippet that has these words in it; return what it defines."""
    [snippet] = [each for each in SNIPPETS if marker in each.text]
    exec(compile(snippet.text, str(snippet), "exec"), names)
    return names


ORM = "def report"
USUAL_ENGINE = "create_engine(url)\n"
OUR_ENGINE = "watch_engine(engine)"
USUAL_QUERY = "class DB"
OUR_QUERY = "def move"
OUR_ERROR = "[note] ="


def test_every_snippet_is_run() -> None:
    markers = (ORM, USUAL_ENGINE, OUR_ENGINE, USUAL_QUERY, OUR_QUERY, OUR_ERROR)
    found = [[marker for marker in markers if marker in each.text] for each in SNIPPETS]
    assert found == [[each] for each in markers]


@pytest.fixture
def server(new_server: Any) -> Server:
    server: Server = new_server("mariadb")
    for table in ("shelf", "store"):
        server.execute(f"CREATE TABLE test.{table} (sku VARCHAR(9), amount INT) ENGINE=InnoDB")
        server.execute(f"INSERT INTO test.{table} VALUES ('XXX', 9)")
    return server


@pytest.fixture
def account(server: Server) -> dict[str, Any]:
    address = {"host": server.host, "port": server.port}
    return {**address, "user": USER, "password": PASSWORD, "database": "test"}


# Django's ORM

RUN = """
import os
import django
django.setup()
from django.core.management import call_command
from django.db import connection
call_command("migrate", verbosity=0)
connection.close()
connection.settings_dict["OPTIONS"]["init_command"] = "SET SESSION wait_timeout = 1"
exec(os.environ["SNIPPET"])
report(2, 4)
"""


@pytest.mark.parametrize("plain", [True, False])
def test_orm(plain: bool, server: Server) -> None:
    """The same lines: they fail without the app, and work with it."""
    [snippet] = [each for each in SNIPPETS if ORM in each.text]
    environment = {
        "DATABASE_URL": server.url(),
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
        "PLAIN_DJANGO": str(int(plain)),
        "SNIPPET": snippet.text,
    }
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ("2006" in run.stderr) is plain, run.stderr
    assert run.stdout.count("0 products") == (1 if plain else 2)


# SQLAlchemy


@pytest.fixture
def url(account: dict[str, Any]) -> URL:
    names = {"user": "username"}
    return URL.create("mysql+mysqldb", **{names.get(k, k): v for k, v in account.items()})


def test_usual_engine(server: Server, url: URL) -> None:
    """The first statement after a quiet time fails."""
    server.set(wait_timeout=1)
    names = load(USUAL_ENGINE, url=url)
    with closing(names["engine"].raw_connection()):
        pass
    server.wait_for_sessions(0, USER)
    with pytest.raises(OperationalError):
        names["count"]()
    names["engine"].dispose()


def test_pool_recycle_alone(server: Server, url: URL) -> None:
    """A young connection that was killed is lent all the same."""
    engine = create_engine(url, pool_recycle=280)
    with closing(engine.raw_connection()) as connection:
        session = connection.dbapi_connection.thread_id()
    server.kill_connection(session)
    server.wait_until_gone(session)
    with pytest.raises(OperationalError), engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    engine.dispose()


def test_our_engine(server: Server, url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    server.set(wait_timeout=1)
    monkeypatch.setattr(registry, "registered_checks", {*registry.registered_checks})
    names = load(OUR_ENGINE, url=url)
    for _ in range(2):
        assert names["count"]() == 1
        server.wait_for_sessions(0, USER)
    names["engine"].dispose()


# A driver by hand


@pytest.fixture
def usual(account: dict[str, Any]) -> Iterator[Any]:
    db = load(USUAL_QUERY, account=account)["db"]
    yield db
    with suppress(MySQLdb.Error):
        db.conn.close()


def lose(db: Any, server: Server) -> None:
    ((session,),) = db.query("SELECT CONNECTION_ID()")
    server.kill_connection(session)
    server.wait_until_gone(session)


def test_usual_query_in_a_transaction(usual: Any, server: Server) -> None:
    """What came after the loss is stored without what came before."""
    usual.query("START TRANSACTION")
    usual.query("UPDATE shelf SET amount = amount - 1")
    lose(usual, server)
    usual.query("UPDATE store SET amount = amount + 1")
    usual.query("COMMIT")
    assert server.execute("SELECT amount FROM test.shelf") == [(9,)]
    assert server.execute("SELECT amount FROM test.store") == [(10,)]


def test_usual_query_with_a_lock(usual: Any, account: dict[str, Any], server: Server) -> None:
    """Two programs have it."""
    assert usual.query("SELECT GET_LOCK('prices', 0)") == ((1,),)
    lose(usual, server)
    other = load(USUAL_QUERY, account=account)["db"]
    assert other.query("SELECT GET_LOCK('prices', 0)") == ((1,),)
    usual.query("UPDATE shelf SET amount = 0")
    assert server.execute("SELECT amount FROM test.shelf") == [(0,)]
    other.conn.close()


def test_usual_query_after_a_lock_wait(usual: Any, account: dict[str, Any], server: Server) -> None:
    """It sends again what was refused on a connection that is fine."""
    server.set(innodb_lock_wait_timeout=1)
    ((before,),) = usual.query("SELECT CONNECTION_ID()")
    with closing(MySQLdb.connect(**account)) as holder, closing(holder.cursor()) as cursor:
        cursor.execute("UPDATE shelf SET amount = 1")
        with pytest.raises(MySQLdb.OperationalError, match="1205"):
            usual.query("UPDATE shelf SET amount = 0")
    ((after,),) = usual.query("SELECT CONNECTION_ID()")
    assert after != before


def test_our_query(account: dict[str, Any], server: Server) -> None:
    """Healed outside of a transaction; both or neither inside; a lost lock is an error."""
    names = load(OUR_QUERY, account=account)
    db = names["db"]
    lose(db, server)
    assert names["move"]("XXX", 1) == [(8,)]
    with pytest.raises(MySQLdb.OperationalError), db.transaction():
        db.query("UPDATE shelf SET amount = amount - 1")
        lose(db, server)
        db.query("UPDATE store SET amount = amount + 1")
    assert server.execute("SELECT amount FROM test.shelf") == [(8,)]
    assert server.execute("SELECT amount FROM test.store") == [(10,)]
    note = load(OUR_ERROR, **names, lose_connection=lambda: lose(db, server))["note"]
    assert "Not healed: lost with its session: lock by GET_LOCK" in note
    assert server.execute("SELECT amount FROM test.shelf") == [(0,)]
    db.close()
