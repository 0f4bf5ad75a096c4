"""Connections are watched from their birth, and nothing else about them changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from django.db import connections, reset_queries
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorDebugWrapper, CursorWrapper
from django.db.utils import ConnectionHandler, load_backend
from django.test import override_settings
from psycopg.adapt import Dumper
from psycopg.sql import SQL, Literal

from django_dbhealth.handler import guard_off_reason, install_guard
from django_dbhealth.session_state import OPAQUE
from django_dbhealth.watch import Watch, watch_of
from django_dbhealth.wrappers import WatchedConnection

ROOT = Path(__file__).resolve().parent.parent


def watch() -> Watch:
    found = watch_of(connections["database"])
    assert found is not None
    return found


def execute(sql: str, *params: Any) -> None:
    with connections["database"].cursor() as cursor:
        cursor.execute(sql, params)


def test_connection_keeps_its_identity(database: Any) -> None:
    """repr(), names and isinstance() are those of Django's own class."""
    connection = connections["database"]
    plain = load_backend(connection.settings_dict["ENGINE"]).DatabaseWrapper
    assert isinstance(connection, plain)
    assert type(connection) is not plain
    names = ("__name__", "__qualname__", "__module__")
    assert [getattr(type(connection), n) for n in names] == [getattr(plain, n) for n in names]
    assert repr(connection) == f"<DatabaseWrapper vendor={plain.vendor!r} alias='database'>"
    assert type(connection) is type(connections["database"])


def test_cursor_keeps_its_kind(database: Any) -> None:
    """Cursors stay Django's, the one that logs queries too."""
    with connections["database"].cursor() as cursor:
        assert isinstance(cursor, CursorWrapper)
        assert type(cursor).__name__ == "CursorWrapper"
    with override_settings(DEBUG=True), connections["database"].cursor() as cursor:
        assert isinstance(cursor, CursorDebugWrapper)
        cursor.execute("SELECT 1")
    assert connections["database"].queries_log[-1]["sql"] == "SELECT 1"
    reset_queries()


def test_handler_is_the_same_object() -> None:
    """Whoever imported `connections` before has the watching handler too; twice changes nothing."""
    kind = type(connections)
    assert isinstance(connections, ConnectionHandler)
    assert kind.__name__ == "ConnectionHandler"
    install_guard()
    assert type(connections) is kind


def test_copies_are_watched(database: Any) -> None:
    """connection.copy() and the connection that creates test databases work as ever."""
    copied = connections["database"].copy()
    with copied.cursor() as cursor:
        cursor.execute("SELECT 1")
    assert watch_of(copied) not in (None, watch())
    copied.close()
    with connections["database"]._nodb_cursor() as cursor:
        cursor.execute("SELECT 1")


def test_sqlite_is_not_watched() -> None:
    """There is nothing to lose: its class is Django's own."""
    assert type(connections["sqlite"]) is load_backend("django.db.backends.sqlite3").DatabaseWrapper
    assert watch_of(connections["sqlite"]) is None


def test_guard_off(database: Any) -> None:
    """With GUARD off, for all or for one alias, the class is Django's own."""
    plain = load_backend(connections["database"].settings_dict["ENGINE"]).DatabaseWrapper
    for setting in ({"GUARD": False}, {"DATABASES": {"database": {"GUARD": False}}}):
        del connections["database"]
        with override_settings(DBHEALTH=setting):
            assert type(connections["database"]) is plain
    del connections["database"]
    assert type(connections["database"]) is not plain


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (BaseDatabaseWrapper, "make_cursor", "BaseDatabaseWrapper.make_cursor()"),
        (CursorWrapper, "callproc", "CursorWrapper.callproc()"),
        (ConnectionHandler, "create_connection", "ConnectionHandler.create_connection()"),
    ],
)
def test_hooks_that_are_gone(
    owner: type, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Django without the private hooks is told by name. (No such Django exists to run.)"""
    assert guard_off_reason() is None
    monkeypatch.delattr(owner, name)
    reason = guard_off_reason()
    assert reason is not None
    assert words in reason


def run(program: str) -> str:
    """Run a program with tests.settings in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=True,
        env={"DJANGO_SETTINGS_MODULE": "tests.handler_settings", "PATH": "/usr/bin:/bin"},
    ).stdout.strip()


def test_guard_stays_off_where_hooks_are_gone() -> None:
    """The project then runs with Django's own classes, and a warning is logged."""
    out = run(
        "import django\n"
        "from django.db.backends.utils import CursorWrapper\n"
        "from django.db.utils import ConnectionHandler\n"
        "del CursorWrapper.callproc\n"
        "django.setup()\n"
        "from django.db import connections\n"
        "print(type(connections) is ConnectionHandler)\n"
    )
    assert out.splitlines() == [
        "The guard stays off: this version of Django has no CursorWrapper.callproc().",
        "True",
    ]


def test_connections_made_before_ready_are_adopted() -> None:
    """A models.py may ask for connection.vendor while the apps are loading."""
    out = run(
        "from django.conf import settings\n"
        "from django.db import connections\n"
        "early = connections['mysql']\n"
        "import django; django.setup()\n"
        "from django_dbhealth.watch import watch_of\n"
        "print(watch_of(early) is not None, connections['mysql'] is early)\n"
    )
    assert out == "True True"


def test_setup_asks_for_no_connection() -> None:
    """ready() makes no wrapper and does not evaluate DATABASES."""
    out = run(
        "import django; django.setup()\n"
        "from django.db import connections\n"
        "print('settings' in vars(connections))\n"
    )
    assert out == "False"


def test_import_is_cheap_and_needs_no_settings() -> None:
    """Importing the package loads no Django and needs no configured settings."""
    out = run(
        "import sys, os; del os.environ['DJANGO_SETTINGS_MODULE']\n"
        "import django_dbhealth\n"
        "names = django_dbhealth.__all__\n"
        "print('django' in sys.modules, sorted(names) == names)\n"
        "print(set(django_dbhealth.__all__) <= set(dir(django_dbhealth)))\n"
        "from django_dbhealth import *\n"
        "print(close_old_connections.__name__, LongRunningCommand.__name__)\n"
        "try: django_dbhealth.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    assert out.splitlines() == [
        "False True",
        "True",
        "close_old_connections LongRunningCommand",
        "module 'django_dbhealth' has no attribute 'nonsense'",
    ]


# What is watched


def test_statements_of_birth_are_not_counted(database: Any) -> None:
    """What Django, init_command and connection_created receivers set is set again: no state."""
    from django.db.backends.signals import connection_created

    def receiver(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            if connection.vendor == "mysql":
                cursor.execute("SET SESSION sql_mode = ''")
            else:
                cursor.execute("SET statement_timeout = '5s'")

    connection_created.connect(receiver)
    try:
        connections["database"].ensure_connection()
    finally:
        connection_created.disconnect(receiver)
    assert not watch().carries_anything()


def test_new_session_carries_nothing(database: Any) -> None:
    """What was carried is forgotten with the session."""
    execute("CREATE TEMPORARY TABLE shelf (id int)")
    assert watch().session.descriptions() == ("temporary table shelf",)
    connections["database"].close()
    connections["database"].ensure_connection()
    assert not watch().carries_anything()


def test_statement_that_failed_carries_nothing(database: Any) -> None:
    """A table that could not be made is not there to be lost."""
    from django.db import DatabaseError

    with pytest.raises(DatabaseError):
        execute("CREATE TEMPORARY TABLE shelf (id nonsense)")
    assert not watch().carries_anything()
    assert not watch().interrupted


def test_executemany_and_raw_transactions(database: Any) -> None:
    """executemany() is seen; a driver's commit ends a transaction that raw SQL began."""
    with connections["database"].cursor() as cursor:
        cursor.executemany("INSERT INTO app_row (name, number) VALUES (%s, 1)", [["a"], ["b"]])
        assert not watch().carries_anything()
        cursor.execute("BEGIN")
        assert watch().session.descriptions() == ("transaction begun by raw SQL",)
    connections["database"].commit()
    assert not watch().carries_anything()


def test_rollback_brings_state_back(database: Any) -> None:
    """PostgreSQL undoes a DROP with the transaction; MySQL does not, and its drop ends the hold."""
    from django.db import transaction

    execute("CREATE TEMPORARY TABLE shelf (id int)")
    with transaction.atomic(using="database"):
        execute("DROP TABLE shelf")
        transaction.set_rollback(True, using="database")
    assert watch().carries_anything() is (connections["database"].vendor == "postgresql")


def test_callproc_is_watched(mariadb: Any, add_database: Any) -> None:
    """A procedure's call counts as a use until its end, and ends as one."""
    connection = connections[add_database(mariadb.django("test"))]
    with connection.cursor() as cursor:
        cursor.execute("CREATE PROCEDURE IF NOT EXISTS nothing() DO SLEEP(0.1)")
        seen = watch_of(connection)
        assert seen is not None
        began = monotonic()
        cursor.callproc("nothing")
        assert seen.last_used >= began + 0.09
        assert not seen.interrupted


def test_stream_is_watched(postgresql: Any, add_database: Any) -> None:
    """psycopg's stream() passes Django by, and may take a lock."""
    connection = connections[add_database(postgresql.django("test"))]
    with connection.cursor() as cursor:
        assert list(cursor.stream("SELECT 1")) == [(1,)]
        assert watch_of(connection).session_state() == ()  # type: ignore[union-attr]
        list(cursor.stream("SELECT pg_advisory_lock(99)"))
    assert watch_of(connection).session_state() == ("advisory lock",)  # type: ignore[union-attr]


def test_sql_that_only_its_connection_can_quote(postgresql: Any, add_database: Any) -> None:
    """It has run, and no error of ours says otherwise; what it did is not known."""

    class Name:
        pass

    class NameDumper(Dumper):
        def dump(self, value: object) -> bytes:
            return b"a"

    connection = connections[add_database(postgresql.django("test"))]
    connection.ensure_connection()
    connection.connection.adapters.register_dumper(Name, NameDumper)
    with connection.cursor() as cursor:
        cursor.execute(SQL("SELECT {}").format(Literal(Name())))
        assert cursor.fetchone() == ("a",)
    assert watch_of(connection).session_state() == (OPAQUE,)  # type: ignore[union-attr]


def test_foreign_driver_is_left_alone(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose driver is not known here keeps its class."""

    class Foreign:
        __name__ = "oracledb"

    backend = load_backend(connections["database"].settings_dict["ENGINE"])
    monkeypatch.setattr(backend.DatabaseWrapper, "Database", Foreign())
    del connections["database"]
    assert not isinstance(connections["database"], WatchedConnection)
    del connections["database"]
