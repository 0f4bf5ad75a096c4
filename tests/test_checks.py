from __future__ import annotations

import math
import os
import re
import select
import socket
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import MySQLdb
import psycopg
import psycopg2
import psycopg_pool
import pymysql
import pytest
from django.core import checks
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004
from django.core.checks.registry import registry
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import connections
from django.db.utils import ConnectionHandler
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from django_dbhealth.checks import (
    TAG,
    check_database_settings,
    check_settings,
    check_settings_for_deployment,
    register_checks,
)
from django_dbhealth.conf import KINDS, Config
from django_dbhealth.live_checks import (
    check_servers,
    check_servers_for_deployment,
    register_live_checks,
)
from tests.test_conf import JSON

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.servers import Server

ROOT = Path(__file__).parent.parent
MYSQL = "django.db.backends.mysql"
POSTGRESQL = "django.db.backends.postgresql"
SQLITE = "django.db.backends.sqlite3"
UNKNOWN = "tests.no_such_backend"


def found(engine: str, config: Any = None, **settings: Any) -> list[CheckMessage]:
    """Return what the checks have to say about one database."""
    return check_database_settings({"default": {"ENGINE": engine, **settings}}, config)


def ids(engine: str, config: Any = None, **settings: Any) -> list[str]:
    return [short(message) for message in found(engine, config, **settings)]


def short(message: CheckMessage) -> str:
    assert message.id is not None
    return message.id.removeprefix("django_dbhealth.")


def pool(value: Any = True, **options: Any) -> dict[str, Any]:
    return {"pool": value, **options}


# CONN_MAX_AGE


def test_max_age_is_no_number() -> None:
    assert found(MYSQL, CONN_MAX_AGE="60") == [
        Error(
            "CONN_MAX_AGE of database 'default' is '60': Django adds it to a number of "
            "seconds, so that every attempt to connect fails.",
            hint=(
                "Write a number of seconds without quotes, such as 60; or 0 to close each "
                "connection at the end of its request; or None to keep it. Text from the "
                "environment has to be converted first, for instance by int(). "
                "(see docs/checks.md#django-dbhealth-e001)"
            ),
            id="django_dbhealth.E001",
        )
    ]


@pytest.mark.parametrize(
    "value", ["60", "", [], {}, timedelta(minutes=1), Decimal(60), 1j, 10**400, object()]
)
@pytest.mark.parametrize("engine", [MYSQL, POSTGRESQL, SQLITE, UNKNOWN])
def test_max_age_that_django_cannot_add(engine: str, value: object) -> None:
    """What Django cannot add to a float is an Error, on every database, and nothing else."""
    assert ids(engine, CONN_MAX_AGE=value) == ["E001"]


@pytest.mark.parametrize("value", ["60", timedelta(minutes=1), Decimal(60), 10**400])
def test_django_cannot_connect_with_it(value: object) -> None:
    """Django raises where E001 says so."""
    with pytest.raises((TypeError, OverflowError)):
        connection(SQLITE, NAME=":memory:", CONN_MAX_AGE=value).ensure_connection()


def connection(engine: str, **settings: Any) -> Any:
    return ConnectionHandler({"default": {"ENGINE": engine, **settings}})["default"]


@pytest.mark.parametrize("value", [0, 0.0, 60, 0.5, Fraction(1, 2), math.inf, None])
def test_max_age_that_django_can_add(value: object, tmp_path: Path) -> None:
    """Any other number works, and PostgreSQL is not assumed to drop anything."""
    assert ids(POSTGRESQL, CONN_MAX_AGE=value) == []
    other = connection(SQLITE, NAME=tmp_path / "db.sqlite3", CONN_MAX_AGE=value)
    other.ensure_connection()
    other.close()


def test_no_max_age() -> None:
    """Django's default is 0, which is no finding."""
    assert ids(MYSQL) == []


ODD = [
    (True, "True, which counts as 1."),
    (False, "False, which counts as 0."),
    (
        math.nan,
        "nan, so that no connection is ever too old and Django closes none for its age.",
    ),
    (
        -1,
        "-1, which has the effect of 0: each connection is closed at the end of its request.",
    ),
    (
        -math.inf,
        "-inf, which has the effect of 0: each connection is closed at the end of its request.",
    ),
]


@pytest.mark.parametrize(("value", "words"), ODD)
def test_max_age_is_odd(value: object, words: str) -> None:
    """A number that is no age is a Warning that says what Django does, and nothing else."""
    assert found(MYSQL, {"SERVER_IDLE_TIMEOUT": 0.5}, CONN_MAX_AGE=value) == [
        Warning(
            f"CONN_MAX_AGE of database 'default' is {words}",
            hint=(
                "Write a number of seconds such as 60; or 0 to close each connection at the end "
                "of its request; or None to keep it. (see docs/checks.md#django-dbhealth-w001)"
            ),
            id="django_dbhealth.W001",
        )
    ]


@pytest.mark.parametrize(("value", "kept"), [(math.nan, True), (-1, False), (False, False)])
def test_what_django_does_with_it(mariadb: Server, value: object, kept: bool) -> None:
    """Django does with it what the Warning says."""
    settings = {**mariadb.django(), "CONN_MAX_AGE": value}
    other = ConnectionHandler({"default": settings})["default"]
    other.ensure_connection()
    other.close_if_unusable_or_obsolete()
    assert (other.connection is not None) is kept
    other.close()


# CONN_MAX_AGE and the idle timeout


def test_max_age_over_the_assumed_timeout() -> None:
    assert found(MYSQL, CONN_MAX_AGE=600) == [
        Warning(
            "CONN_MAX_AGE of database 'default' is 600, but a connection that was idle for "
            "300 seconds is dropped by its server (assumed as long as DBHEALTH has no "
            "SERVER_IDLE_TIMEOUT for it) and CONN_HEALTH_CHECKS is off: the first request after "
            "a quiet time fails.",
            hint=(
                'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below 300. If the server '
                "really waits longer, write its timeout in seconds as SERVER_IDLE_TIMEOUT in "
                "DBHEALTH. (see docs/checks.md#django-dbhealth-w003)"
            ),
            id="django_dbhealth.W003",
        )
    ]


def test_max_age_over_the_timeout_of_the_setting() -> None:
    config = {"DATABASES": {"default": {"SERVER_IDLE_TIMEOUT": 5_000_000}}}
    assert found(POSTGRESQL, config, CONN_MAX_AGE=None) == [
        Warning(
            "CONN_MAX_AGE of database 'default' is None, but a connection that was idle for "
            "5000000 seconds is dropped by its server (SERVER_IDLE_TIMEOUT in DBHEALTH) and "
            "CONN_HEALTH_CHECKS is off: the first request after a quiet time fails.",
            hint=(
                'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below 5000000. If the server '
                "really waits longer, write its timeout in seconds as SERVER_IDLE_TIMEOUT in "
                "DBHEALTH. (see docs/checks.md#django-dbhealth-w003)"
            ),
            id="django_dbhealth.W003",
        )
    ]


@pytest.mark.parametrize(
    ("engine", "max_age", "timeout", "expected"),
    [
        (MYSQL, 299.5, None, []),
        (MYSQL, 300, None, ["W003"]),
        (MYSQL, 5_000_000, None, ["W003"]),
        (MYSQL, math.inf, None, ["W003"]),
        (MYSQL, None, None, ["W003"]),
        (MYSQL, Fraction(601, 2), None, ["W003"]),
        (MYSQL, 300, 301, []),
        (MYSQL, 301, 301, ["W003"]),
        (MYSQL, None, 28800, ["W003"]),
        (POSTGRESQL, None, None, []),
        (POSTGRESQL, 59, 60, []),
        (POSTGRESQL, 60, 60, ["W003"]),
        (SQLITE, None, 60, []),
        (UNKNOWN, None, None, []),
        (UNKNOWN, 60, 60, ["W003"]),
    ],
)
def test_idle_timeouts(engine: str, max_age: Any, timeout: Any, expected: list[str]) -> None:
    """At the timeout is too late, and only a known one counts; SQLite has no server."""
    assert ids(engine, {"SERVER_IDLE_TIMEOUT": timeout}, CONN_MAX_AGE=max_age) == expected


@pytest.mark.parametrize("checks_on", [True, 1])
def test_health_checks_are_enough(checks_on: object) -> None:
    """With Django's health checks a connection may be kept for ever."""
    assert ids(MYSQL, CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=checks_on) == []


def test_max_age_over_the_timeout_of_init_command() -> None:
    options = {"init_command": "SET SESSION wait_timeout=60"}
    assert found(MYSQL, CONN_MAX_AGE=120, OPTIONS=options) == [
        Warning(
            "CONN_MAX_AGE of database 'default' is 120, but its server is told to drop a "
            "connection that was idle for 60 seconds (set in OPTIONS['init_command']) and "
            "CONN_HEALTH_CHECKS is off: the first request after a quiet time fails.",
            hint=(
                'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below 60, or let OPTIONS set '
                "a longer timeout. (see docs/checks.md#django-dbhealth-w004)"
            ),
            id="django_dbhealth.W004",
        )
    ]


@pytest.mark.parametrize(
    ("max_age", "timeout", "expected"),
    [
        (59, None, []),
        (60, None, ["W004"]),
        (None, None, ["W004"]),
        (600, 300, ["W004"]),  # once for one cause
        (59, 300, []),
        (50, 40, ["W003"]),
        (60, 60, ["W003"]),
    ],
)
def test_the_shortest_timeout_counts(max_age: Any, timeout: Any, expected: list[str]) -> None:
    """What DBHEALTH and OPTIONS say are both true, so the shorter one drops the connection."""
    options = {"init_command": "SET wait_timeout=60"}
    config = {"SERVER_IDLE_TIMEOUT": timeout}
    assert ids(MYSQL, config, CONN_MAX_AGE=max_age, OPTIONS=options) == expected


def test_a_longer_timeout_of_init_command() -> None:
    """A session that sets its own timeout does not have the assumed one."""
    options = {"init_command": "SET wait_timeout=28800"}
    assert ids(MYSQL, CONN_MAX_AGE=600, OPTIONS=options) == []


def test_health_checks_are_enough_for_init_command() -> None:
    """CONN_MAX_AGE is an age, not an idleness: with health checks both may stand."""
    options = {"init_command": "SET wait_timeout=60"}
    assert ids(MYSQL, CONN_MAX_AGE=600, CONN_HEALTH_CHECKS=True, OPTIONS=options) == []


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (MYSQL, {"init_command": "SET @@session.wait_timeout := 60, sql_mode='ANSI'"}),
        (MYSQL, {"init_command": "SET sql_mode='ANSI', wait_timeout = 60"}),
        (MYSQL, {"init_command": "SET @@wait_timeout=60"}),
        (MYSQL, {"init_command": "set local wait_timeout=60"}),
        (MYSQL, {"init_command": "SET wait_timeout=28800; SET wait_timeout=60"}),
        (POSTGRESQL, {"options": "-c idle_session_timeout=60000"}),
        (POSTGRESQL, {"options": "-c search_path=a -c idle_session_timeout=1min"}),
        (POSTGRESQL, {"options": "-cidle_session_timeout=60s"}),
        (POSTGRESQL, {"options": "--idle-session-timeout=60000ms"}),
        (POSTGRESQL, {"options": r"-c idle_session_timeout=60\ s"}),
    ],
)
def test_forms_of_a_timeout_in_options(engine: str, options: dict[str, str]) -> None:
    """Each way to write 60 seconds is understood."""
    assert ids(engine, CONN_MAX_AGE=60, OPTIONS=options) == ["W004"]
    assert ids(engine, CONN_MAX_AGE=59.9, OPTIONS=options) == []


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (MYSQL, {"init_command": "SET GLOBAL wait_timeout=60"}),
        (MYSQL, {"init_command": "SET @@global.wait_timeout=60"}),
        (MYSQL, {"init_command": "SET lock_wait_timeout=60"}),
        (MYSQL, {"init_command": "SET @wait_timeout=60"}),
        (MYSQL, {"init_command": 60}),
        (MYSQL, {"options": "-c idle_session_timeout=60000"}),
        (MYSQL, "SET wait_timeout=60"),
        (POSTGRESQL, {"options": "-c idle_session_timeout=0"}),
        (POSTGRESQL, {"options": "-c idle_in_transaction_session_timeout=60000"}),
        (UNKNOWN, {"init_command": "SET wait_timeout=60"}),
    ],
)
def test_no_timeout_in_options(engine: str, options: object) -> None:
    """What is another's timeout, or none, is not taken for the session's."""
    assert ids(engine, CONN_MAX_AGE=60, OPTIONS=options) == []


# CONN_HEALTH_CHECKS


@pytest.mark.parametrize(("value", "counts_as"), [("false", True), ("True", True), ("", False)])
def test_health_checks_is_a_string(value: str, counts_as: bool) -> None:
    assert found(SQLITE, CONN_HEALTH_CHECKS=value) == [
        Warning(
            f"CONN_HEALTH_CHECKS of database 'default' is {value!r}, a string that counts "
            f"as {counts_as}.",
            hint=(
                "Write True or False without quotes. Text from the environment or from a URL has "
                "to be converted first. (see docs/checks.md#django-dbhealth-w002)"
            ),
            id="django_dbhealth.W002",
        )
    ]


def test_a_string_of_health_checks_acts_as_django_takes_it() -> None:
    """The health checks that "false" switches on are on."""
    assert ids(MYSQL, CONN_MAX_AGE=None, CONN_HEALTH_CHECKS="false") == ["W002"]
    assert ids(MYSQL, CONN_MAX_AGE=None, CONN_HEALTH_CHECKS="") == ["W002", "W003"]


# OPTIONS


def test_max_age_lost_in_options() -> None:
    assert found(MYSQL, OPTIONS={"conn_max_age": 60, "charset": "utf8mb4"}) == [
        Error(
            "conn_max_age stands in OPTIONS of database 'default': Django does not look for it "
            "there but hands it to the driver, which refuses it, so that nothing can connect.",
            hint=(
                'Move it out of OPTIONS and write DATABASES["default"]["CONN_MAX_AGE"]. With '
                "dj-database-url take it out of the URL and pass it to config() or parse(). "
                "(see docs/checks.md#django-dbhealth-e002)"
            ),
            id="django_dbhealth.E002",
        )
    ]


def test_both_lost_in_options() -> None:
    """Each of the two settings is one finding, whatever its case."""
    options = {"conn_health_checks": True, "CONN_MAX_AGE": 60}
    assert ids(POSTGRESQL, OPTIONS=options) == ["E002", "E002"]
    assert ids(SQLITE, OPTIONS=options) == ["E002", "E002"]


def test_options_of_an_unknown_driver() -> None:
    """Of an unknown driver nobody knows what it refuses."""
    assert ids(UNKNOWN, OPTIONS={"conn_max_age": 60}) == []


@pytest.mark.parametrize(
    ("connect", "error"),
    [
        (MySQLdb.connect, TypeError),
        (pymysql.connect, TypeError),
        (psycopg.connect, psycopg.ProgrammingError),
        (psycopg2.connect, psycopg2.ProgrammingError),
        (lambda **options: sqlite3.connect(":memory:", **options), TypeError),
    ],
    ids=["mysqlclient", "PyMySQL", "psycopg", "psycopg2", "sqlite3"],
)
def test_drivers_refuse_it(connect: Callable[..., Any], error: type[Exception]) -> None:
    """Each driver refuses the option before it connects to anything."""
    with pytest.raises(error, match="conn_max_age"):
        connect(conn_max_age=60)


# The pool


@pytest.mark.parametrize(("max_age", "words"), [(60, "60"), (None, "None"), ("60", "'60'")])
def test_pool_with_max_age(max_age: object, words: str) -> None:
    """Whatever CONN_MAX_AGE is, beside a pool it is one finding."""
    config = {"SERVER_IDLE_TIMEOUT": 10}
    settings = {"CONN_MAX_AGE": max_age, "CONN_HEALTH_CHECKS": True, "OPTIONS": pool()}
    assert found(POSTGRESQL, config, **settings) == [
        Error(
            f"Database 'default' has a pool in OPTIONS and a CONN_MAX_AGE of {words}: Django "
            "allows only one of the two, so that every attempt to connect fails.",
            hint=(
                "Remove CONN_MAX_AGE or write 0: the pool keeps the connections. "
                "(see docs/checks.md#django-dbhealth-e003)"
            ),
            id="django_dbhealth.E003",
        )
    ]


def test_pool_and_max_age_are_reported_once() -> None:
    """A CONN_MAX_AGE that a pool forbids is not also one that is too long or odd."""
    assert ids(POSTGRESQL, CONN_MAX_AGE=-1, OPTIONS=pool()) == ["E003"]
    config = {"SERVER_IDLE_TIMEOUT": 10}
    assert ids(POSTGRESQL, config, CONN_MAX_AGE=60, OPTIONS=pool()) == ["E003", "W005"]


@pytest.mark.parametrize(
    ("engine", "max_age", "options"),
    [
        (POSTGRESQL, 0, pool()),
        (POSTGRESQL, 60, pool({})),
        (POSTGRESQL, 60, pool(False)),
        (MYSQL, 60, pool()),
        (UNKNOWN, 60, pool()),
    ],
)
def test_no_pool_with_max_age(engine: str, max_age: object, options: object) -> None:
    """Without a CONN_MAX_AGE, without a pool, or with a pool that is not Django's, it is none."""
    assert ids(engine, CONN_MAX_AGE=max_age, OPTIONS=options) == []


def test_django_refuses_a_pool_with_max_age() -> None:
    """Django raises where E003 says so."""
    other = connection(POSTGRESQL, NAME="x", CONN_MAX_AGE=60, OPTIONS=pool())
    with pytest.raises(ImproperlyConfigured, match="Pooling doesn't support persistent"):
        other.ensure_connection()


def test_pool_over_the_idle_timeout() -> None:
    assert found(POSTGRESQL, {"SERVER_IDLE_TIMEOUT": 300}, OPTIONS=pool()) == [
        Warning(
            "The pool of database 'default' keeps idle connections for longer than the 300 "
            "seconds after which they are dropped by the server (SERVER_IDLE_TIMEOUT in "
            "DBHEALTH), and CONN_HEALTH_CHECKS is off: the pool hands out dead connections.",
            hint=(
                'Write "CONN_HEALTH_CHECKS": True, so that the pool checks each connection '
                "before it hands it out. A shorter max_lifetime does not help: it is looked at "
                "only when a connection is given back. (see docs/checks.md#django-dbhealth-w005)"
            ),
            id="django_dbhealth.W005",
        )
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (pool(), ["W005"]),
        (pool("yes"), ["W005"]),
        (pool({"max_size": 4}), ["W005"]),
        (pool({"max_lifetime": 10}), ["W005"]),
        (pool({"min_size": 1, "max_size": 1, "max_idle": 1}), ["W005"]),
        (pool({"min_size": 0, "max_size": 4}), ["W005"]),
        (pool({"min_size": 0, "max_size": 4, "max_idle": 60}), ["W005"]),
        (pool({"min_size": 0, "max_size": 4, "max_idle": 59.9}), []),
        (pool({"min_size": 0, "max_size": 4, "max_idle": "1"}), ["W005"]),
        (pool({"min_size": 0, "max_idle": 1}), ["W005"]),
        (pool({"min_size": 4, "check": psycopg_pool.ConnectionPool.check_connection}), []),
        (pool({}), []),
        ({}, []),
    ],
)
def test_pools(options: dict[str, Any], expected: list[str]) -> None:
    """Only a pool that empties itself in time, or that checks, is without a finding."""
    assert ids(POSTGRESQL, {"SERVER_IDLE_TIMEOUT": 300}, OPTIONS=options) == expected


def test_pool_with_the_timeout_of_its_sessions() -> None:
    """A timeout that OPTIONS set counts for the pool too."""
    options = pool(options="-c idle_session_timeout=1min")
    (message,) = found(POSTGRESQL, OPTIONS=options)
    assert short(message) == "W005"
    assert "60 seconds after which they are dropped by the server (set in OPTIONS['options'])" in (
        message.msg
    )


def test_pool_without_a_finding() -> None:
    """Health checks are enough, and PostgreSQL alone drops nothing."""
    assert ids(POSTGRESQL, OPTIONS=pool()) == []
    config = {"SERVER_IDLE_TIMEOUT": 300}
    assert ids(POSTGRESQL, config, OPTIONS=pool(), CONN_HEALTH_CHECKS=True) == []


def test_django_checks_the_pool_with_health_checks(postgresql: Server) -> None:
    """CONN_HEALTH_CHECKS gives Django's pool its check; without, it has none."""
    for on in (True, False):
        settings = {**postgresql.django(), "OPTIONS": pool(), "CONN_HEALTH_CHECKS": on}
        other = ConnectionHandler({"default": {}, f"pooled-{on}": settings})[f"pooled-{on}"]
        assert (other.pool._check is not None) is on
        del other._connection_pools[other.alias]


def test_a_pool_hands_out_what_is_past_its_lifetime(postgresql: Server) -> None:
    """psycopg_pool looks at max_lifetime when a connection is given back, not before its use."""
    account = postgresql.django()
    keys = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST"}
    kwargs = {key: account[name] for key, name in keys.items()} | {"port": account["PORT"]}
    with psycopg_pool.ConnectionPool(kwargs=kwargs, min_size=1, max_lifetime=60) as the_pool:
        with the_pool.connection() as first:
            pass
        first._expire_at = time.monotonic() - 1  # as if it had lived for a minute since
        with the_pool.connection() as second:
            assert second is first


# Drivers and poolers


def test_an_old_pymysql(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(MYSQL) == []
    # A process has one PyMySQL, and the tests' is a good one.
    old = ModuleType("pymysql")
    old.VERSION = (1, 1, 2, "final", 1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "MySQLdb", old)
    assert found(MYSQL) == [
        Warning(
            "The driver of database 'default' needs an upgrade. PyMySQL 1.1.2 is older than 1.2: "
            "its ping(), and so Django's health check, connects again by itself, and what the "
            "session carried is gone without an error.",
            hint="Upgrade the driver. (see docs/checks.md#django-dbhealth-w006)",
            id="django_dbhealth.W006",
        )
    ]
    assert ids(POSTGRESQL) == []


@pytest.mark.parametrize("version", [(1, 2, 0, "final"), (2, 0, 0, "final")])
def test_a_good_pymysql(version: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1.2 on PyMySQL does not connect again by itself."""
    good = ModuleType("pymysql")
    good.VERSION = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "MySQLdb", good)
    assert ids(MYSQL) == []


def test_the_real_pymysql_in_disguise() -> None:
    """PyMySQL is told by its own version, not by the one that it claims for Django's sake."""
    code = f"""
import pymysql
pymysql.install_as_MySQLdb()
from django_dbhealth.checks import check_database_settings as check
print([each.id for each in check({{"default": {{"ENGINE": "{MYSQL}"}}}})])
pymysql.VERSION = (1, 1, 2, "final", 1)
print([each.id for each in check({{"default": {{"ENGINE": "{MYSQL}"}}}})])
"""
    assert run("-c", code).stdout == "[]\n['django_dbhealth.W006']\n"


def test_server_side_cursors_through_a_pooler() -> None:
    assert found(POSTGRESQL, {"POOLER": "transaction"}) == [
        Warning(
            "Database 'default' is reached through a pooler that gives each transaction another "
            "session (POOLER in DBHEALTH), and DISABLE_SERVER_SIDE_CURSORS is off: iterator() "
            "asks for rows from a cursor that its session does not have.",
            hint=(
                'Write DATABASES["default"]["DISABLE_SERVER_SIDE_CURSORS"] = True. '
                "(see docs/checks.md#django-dbhealth-w007)"
            ),
            id="django_dbhealth.W007",
        )
    ]


def test_poolers_without_a_finding() -> None:
    """A session pooler, MySQL, or the cursors switched off are all well."""
    assert ids(POSTGRESQL, {"POOLER": "session"}) == []
    assert ids(MYSQL, {"POOLER": "transaction"}) == []
    assert ids(UNKNOWN, {"POOLER": "transaction"}) == []
    assert ids(POSTGRESQL, {"POOLER": "transaction"}, DISABLE_SERVER_SIDE_CURSORS=True) == []


# DBHEALTH


def test_config_is_no_dict() -> None:
    assert found(SQLITE, [300]) == [
        Error(
            "DBHEALTH is a value of type list, so it is ignored and all defaults hold.",
            hint=(
                'Write a dict, such as DBHEALTH = {"SERVER_IDLE_TIMEOUT": 300}. '
                "(see docs/checks.md#django-dbhealth-e004)"
            ),
            id="django_dbhealth.E004",
        )
    ]


def test_config_value_is_bad() -> None:
    assert found(SQLITE, {"PING_AFTER": True}) == [
        Error(
            "DBHEALTH['PING_AFTER'] is True, so it is ignored and 30 holds.",
            hint=(
                "Write a number of seconds from 0 to 31536000. "
                "(see docs/checks.md#django-dbhealth-e005)"
            ),
            id="django_dbhealth.E005",
        )
    ]


def test_config_key_is_unknown() -> None:
    accepted = (
        "SERVER_IDLE_TIMEOUT, PING_AFTER, PING_TIMEOUT, GUARD, ON_SESSION_STATE_LOSS, "
        "CONNECT_RETRY_TIMEOUT, POOLER, DATABASES"
    )
    assert found(SQLITE, {"PING_AFTR": 3, "X": 1}) == [
        Warning(
            "DBHEALTH['PING_AFTR'] is no setting of django-dbhealth, so it is ignored.",
            hint=(
                f"Did you mean PING_AFTER? The settings are: {accepted}. "
                "(see docs/checks.md#django-dbhealth-w008)"
            ),
            id="django_dbhealth.W008",
        ),
        Warning(
            "DBHEALTH['X'] is no setting of django-dbhealth, so it is ignored.",
            hint=f"The settings are: {accepted}. (see docs/checks.md#django-dbhealth-w008)",
            id="django_dbhealth.W008",
        ),
    ]


def test_config_alias_is_unknown() -> None:
    databases = {"default": {"ENGINE": SQLITE}, "replica": {"ENGINE": SQLITE}}
    assert check_database_settings(databases, {"DATABASES": {"replca": {}}}) == [
        Warning(
            "DBHEALTH['DATABASES']['replca'] is for a database that is not in DATABASES, so it "
            "is ignored.",
            hint=(
                "Did you mean replica? The aliases in DATABASES are: default, replica. "
                "(see docs/checks.md#django-dbhealth-w009)"
            ),
            id="django_dbhealth.W009",
        )
    ]


def test_a_config_can_be_given() -> None:
    """A Config is taken as it is, its problems too."""
    config = Config.from_dict({"SERVER_IDLE_TIMEOUT": 60, "X": 1})
    assert ids(POSTGRESQL, config, CONN_MAX_AGE=60) == ["W008", "W003"]
    assert ids(POSTGRESQL, Config(), CONN_MAX_AGE=60) == []


def test_each_alias_has_its_own_settings() -> None:
    """What DBHEALTH says of one alias does not count for another."""
    entry = {"ENGINE": MYSQL, "CONN_MAX_AGE": 600}
    config = {"DATABASES": {"patient": {"SERVER_IDLE_TIMEOUT": 28800}}}
    (message,) = check_database_settings({"default": entry, "patient": entry}, config)
    assert "of database 'default'" in message.msg


# Whatever stands in DATABASES


@pytest.mark.parametrize(
    "databases",
    [
        {},
        None,
        5,
        [],
        {"default": {}},
        {"default": None},
        {"default": "mysql://shop:secret@127.0.0.1/shop"},
        {"default": {"ENGINE": None, "CONN_MAX_AGE": "60"}},
        {"default": {"ENGINE": "", "CONN_MAX_AGE": "60"}},
        {"default": {"ENGINE": 5, "CONN_MAX_AGE": "60"}},
        {"default": {"ENGINE": "django.db.backends.dummy", "CONN_MAX_AGE": "60"}},
        {"default": {"ENGINE": ".mysql"}},
        {"default": {"ENGINE": "a..b"}},
        {"default": {"ENGINE": "a\0b"}},
        {"default": {"ENGINE": "json"}},
        {"default": {"ENGINE": MYSQL, "OPTIONS": None}},
        {"default": {"ENGINE": MYSQL, "OPTIONS": {5: 6}}},
        {"default": {"ENGINE": MYSQL}, "copy": {"ENGINE": MYSQL, "TEST": {"MIRROR": "default"}}},
    ],
)
@pytest.mark.parametrize("config", [None, {"DATABASES": {"default": {"GUARD": False}}}])
def test_nothing_to_say(databases: Any, config: Any) -> None:
    """What is no database of Django's is Django's to complain of."""
    assert check_database_settings(databases, config) == []


def test_one_bad_entry_does_not_hide_the_next() -> None:
    """Each database is looked at, whatever the one before it is."""
    databases: Any = {"default": None, "other": {"ENGINE": MYSQL, "CONN_MAX_AGE": "60"}}
    (message,) = check_database_settings(databases)
    assert "of database 'other'" in message.msg


@given(
    st.dictionaries(
        st.sampled_from(
            ["CONN_MAX_AGE", "CONN_HEALTH_CHECKS", "OPTIONS", "DISABLE_SERVER_SIDE_CURSORS"]
        ),
        JSON | st.fixed_dictionaries({"pool": JSON, "options": JSON, "init_command": JSON}),
    ),
    st.sampled_from([MYSQL, POSTGRESQL, SQLITE, UNKNOWN]),
    JSON,
)
def test_checking_never_raises(settings: dict[str, Any], engine: str, config: Any) -> None:
    """Whatever the values are, the checks end with messages that carry no long value."""
    for message in found(engine, config, **settings):
        assert message.id is not None
        assert message.id.startswith("django_dbhealth.")


def test_no_message_carries_a_password() -> None:
    """Neither the password nor a URL that stands in the wrong place is shown."""
    url = "mysql://shop:secret@127.0.0.1/shop"
    messages = found(
        MYSQL,
        {"GUARD": url, "POOLER": "transaction", "DATABASES": {"default": url}},
        PASSWORD="secret",
        CONN_MAX_AGE=url,
        CONN_HEALTH_CHECKS=url,
        OPTIONS={"conn_max_age": url, "passwd": "secret", "init_command": "SET wait_timeout=1"},
    )
    assert [short(message) for message in messages] == ["E005", "E005", "E001", "W002", "E002"]
    assert "secret" not in "\n".join(map(str, messages))


# The guard


def test_guard_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # No Django that we run on lacks a hook.
    reason = "this version of Django has no DatabaseWrapper._cursor()."
    monkeypatch.setattr("django_dbhealth.handler.guard_off_reason", lambda: reason)
    warning = Warning(
        "The guard of django-dbhealth stays off, so no lost connection is healed, and "
        "boundaries may close a connection with a lock or a temporary table: this version of "
        "Django has no DatabaseWrapper._cursor().",
        hint=(
            "Use versions of Django and django-dbhealth that fit each other, or write "
            '"GUARD": False in DBHEALTH to go without. (see docs/checks.md#django-dbhealth-w010)'
        ),
        id="django_dbhealth.W010",
    )
    assert check_settings() == [warning]
    with override_settings(DBHEALTH={"GUARD": False}):
        assert check_settings() == []
    with override_settings(DBHEALTH={"GUARD": False, "DATABASES": {"default": {"GUARD": True}}}):
        assert check_settings() == [warning]


def test_guard_is_on() -> None:
    """With a Django that we run on there is nothing to say."""
    assert check_settings() == []


# Registration


def test_registering_twice() -> None:
    """Each check is registered once, the advice only for --deploy."""
    for _ in range(2):
        register_checks()
        register_live_checks()
    assert ours(registry.registered_checks) == {check_settings, check_servers}
    assert ours(registry.deployment_checks) == {
        check_settings_for_deployment,
        check_servers_for_deployment,
    }
    assert check_settings.tags == check_settings_for_deployment.tags == ("dbhealth",)  # type: ignore[attr-defined]


def ours(registered: Iterable[Any]) -> set[Any]:
    return {each for each in registered if each.__module__.startswith("django_dbhealth.")}


def test_the_project_is_checked() -> None:
    """The registered checks read DBHEALTH from the settings."""
    with override_settings(DBHEALTH={"X": 1, "DATABASES": {"y": {}}}):
        messages = checks.run_checks(tags=[TAG])
        assert [short(message) for message in messages] == ["W008", "W009"]
        assert checks.run_checks(tags=[TAG], include_deployment_checks=True) == messages


def opened() -> list[str]:
    """Return the open aliases. Django 6.1's own checks ask SQLite for its features."""
    return [
        each.alias
        for each in connections.all(initialized_only=True)
        if each.connection and each.vendor != "sqlite"
    ]


def test_nothing_is_opened() -> None:
    """The checks open no connection of the project's databases."""
    check_settings()
    check_settings_for_deployment()
    assert opened() == []


@pytest.mark.parametrize("arguments", [{}, {"deploy": True}, {"tags": [TAG]}])
def test_the_suite_passes_its_own_checks(arguments: dict[str, Any]) -> None:
    """`check` finds nothing of ours in a project without a fault, and opens nothing."""
    call_command("check", verbosity=0, fail_level="ERROR", **arguments)
    assert opened() == []


# manage.py


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python without this suite's settings."""
    environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(path or ROOT), str(ROOT)])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the settings change within one second
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that would accept a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def has_been_called(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


SETTINGS = """
INSTALLED_APPS = ["django_dbhealth"]
SECRET_KEY = "only-for-tests"
USE_TZ = True

def server(engine, **settings):
    account = {{"NAME": "x", "USER": "x", "PASSWORD": "x", "HOST": "127.0.0.1", "PORT": {port}}}
    return {{"ENGINE": "django.db.backends." + engine, **account, **settings}}

DATABASES = {{
    "default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": {database!r}}},
    {databases}
}}
DBHEALTH = {config}
"""

FAULTS = """
    "e001": server("mysql", CONN_MAX_AGE="60"),
    "e002": server("postgresql", OPTIONS={"conn_max_age": 60}),
    "e003": server("postgresql", OPTIONS={"pool": True}, CONN_MAX_AGE=60),
    "w001": server("mysql", CONN_MAX_AGE=-1),
    "w002": server("mysql", CONN_HEALTH_CHECKS="false"),
    "w003": server("mysql", CONN_MAX_AGE=600),
    "w004": server("mysql", CONN_MAX_AGE=60, OPTIONS={"init_command": "SET wait_timeout=60"}),
    "w005": server("postgresql", OPTIONS={"pool": True}),
"""
CONFIG = """{
    "PING_AFTER": "30",
    "PING_AFTR": 30,
    "DATABASES": {
        "w005": {"SERVER_IDLE_TIMEOUT": 60, "POOLER": "transaction"},
        "nowhere": {},
    },
}"""
MISTAKES = ["E001", "E002", "E003", "E005", "W001", "W002", "W007", "W008", "W009"]
RISKS = ["W003", "W004", "W005"]
LIVE = ["W101", "W102", "W103", "W104", "W105", "W106"]  # see test_live_checks.py


@pytest.fixture
def manage(
    tmp_path: Path, listener: socket.socket
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `manage.py` in a project: `manage("check", databases=FAULTS)`."""

    def run_command(
        *arguments: str, databases: str = "", config: str = "{}"
    ) -> subprocess.CompletedProcess[str]:
        text = SETTINGS.format(
            port=listener.getsockname()[1],
            database=str(tmp_path / "db.sqlite3"),
            databases=databases,
            config=config,
        )
        (tmp_path / "the_settings.py").write_text(text)
        return run("-m", "django", *arguments, "--settings=the_settings", path=tmp_path)

    return run_command


def ids_in(process: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(re.findall(r"\(django_dbhealth\.([EW]\d+)\)", process.stderr))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], MISTAKES),
        (["--tag", "dbhealth"], MISTAKES),
        (["--deploy"], MISTAKES + RISKS),
        (["--deploy", "--tag", "dbhealth"], MISTAKES + RISKS),
        (["--database", "default"], MISTAKES),
    ],
)
def test_check(
    manage: Callable[..., subprocess.CompletedProcess[str]],
    listener: socket.socket,
    arguments: list[str],
    expected: list[str],
) -> None:
    """`check` reports what cannot work, `--deploy` the advice too, and nothing is connected."""
    process = manage("check", *arguments, databases=FAULTS, config=CONFIG)
    assert ids_in(process) == sorted(expected)
    assert process.returncode == 1
    assert not has_been_called(listener)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--deploy"], 0), (["--deploy", "--fail-level", "WARNING"], 1), ([], 0)],
)
def test_advice_is_no_error(
    manage: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], status: int
) -> None:
    """Advice makes `check` fail only where it was asked to."""
    databases = '"w003": server("mysql", CONN_MAX_AGE=600),'
    process = manage("check", "--tag", "dbhealth", *arguments, databases=databases)
    assert process.returncode == status
    assert ids_in(process) == (["W003"] if arguments else [])


def test_a_plain_check_of_a_good_project(
    manage: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A project without a fault hears nothing."""
    process = manage("check")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "System check identified no issues (0 silenced).\n"


def test_migrate(
    manage: Callable[..., subprocess.CompletedProcess[str]], listener: socket.socket
) -> None:
    """An Error stops `migrate`, a Warning does not, and advice is not given there."""
    process = manage("migrate", databases='"w": server("mysql", CONN_MAX_AGE=None),')
    assert (process.returncode, ids_in(process)) == (0, [])
    process = manage("migrate", databases='"w": server("mysql", CONN_MAX_AGE=True),')
    assert (process.returncode, ids_in(process)) == (0, ["W001"])
    process = manage("migrate", databases='"e": server("mysql", CONN_MAX_AGE="60"),')
    assert (process.returncode, ids_in(process)) == (1, ["E001"])
    assert not has_been_called(listener)


def test_a_settings_file_can_call_it(tmp_path: Path) -> None:
    """It works before Django is set up, in the middle of the settings, and without any."""
    (tmp_path / "the_settings.py").write_text(
        f"""
import sys
from django.conf import settings
from django_dbhealth.checks import check_database_settings

DATABASES = {{
    "default": {{"ENGINE": "{SQLITE}", "NAME": ":memory:"}},
    "a": {{"ENGINE": "{MYSQL}", "CONN_MAX_AGE": 600}},
    "b": {{"ENGINE": "{POSTGRESQL}", "CONN_MAX_AGE": "60"}},
}}
for message in check_database_settings(DATABASES, {{"PING_AFTR": 1}}):
    print(message.id, file=sys.stdout)
assert not settings.configured
"""
    )
    expected = ["django_dbhealth.W008", "django_dbhealth.E001", "django_dbhealth.W003"]
    process = run("-m", "django", "diffsettings", "--settings=the_settings", path=tmp_path)
    assert process.stdout.splitlines()[:3] == expected, process.stderr
    process = run("-c", "import the_settings", path=tmp_path)
    assert process.stdout.splitlines() == expected, process.stderr


# The docs


def ids_in_the_code() -> list[str]:
    files = ("checks.py", "live_checks.py", "contrib/sqlalchemy.py")
    source = "".join((ROOT / "django_dbhealth" / file).read_text() for file in files)
    return re.findall(r'\b_?(?:error|warning)\(\s*"([EW]\d+)"', source)


def test_ids_are_unique() -> None:
    """No two messages share an id, and an id's letter is its level."""
    assert len(ids_in_the_code()) == len(set(ids_in_the_code())) == 22


def test_each_id_has_a_heading() -> None:
    """The docs have a heading for each id, in order, and no other; and a row in the table."""
    text = (ROOT / "docs" / "checks.md").read_text()
    expected = sorted(ids_in_the_code())
    headings = r"^\(django-dbhealth-(\w+)\)=\n### django_dbhealth\.(\w+)$"
    assert [
        (anchor.upper(), heading) for anchor, heading in re.findall(headings, text, re.MULTILINE)
    ] == [(each, each) for each in expected]
    assert text.count("### ") == len(expected)
    rows = re.findall(r"^\| \[(\w+)\]\(#django-dbhealth-(\w+)\) \| `(.+?)` \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == [row[1].upper() for row in rows] == expected
    by_command = {command: [row[0] for row in rows if row[2] == command] for _, _, command in rows}
    assert by_command.pop("check") == [each for each in expected if each not in (*RISKS, *LIVE)]
    assert by_command == {
        "check --deploy": RISKS,
        "check --database": LIVE[:-1],
        "check --deploy --database": LIVE[-1:],
    }


def test_each_setting_has_a_heading() -> None:
    """The docs have a heading for each key of DBHEALTH, with its type, and the default."""
    text = (ROOT / "docs" / "settings.md").read_text()
    headings = re.findall(r"^## `(\w+): (.+)`$", text, re.MULTILINE)
    keys = list(KINDS)
    assert headings == [
        *((key, Config.__annotations__[key.lower()]) for key in keys),
        ("DATABASES", "dict[str, dict]"),
    ]
    example = re.search(r"^DBHEALTH = (\{.*?^\})", text, re.MULTILINE | re.DOTALL)
    assert example is not None
    defaults = {key: getattr(Config(), key.lower()) for key in keys}
    assert eval(example[1]) == {**defaults, "DATABASES": {}}
