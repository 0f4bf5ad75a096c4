"""The checks that ask the servers, and the connections on which they do."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from django.core import checks
from django.core.checks import CheckMessage, Tags, Warning  # noqa: A004
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import Error, OperationalError, connections
from django.test import override_settings

from django_dbhealth.live_checks import TAG, check_servers, check_servers_for_deployment
from django_dbhealth.own_connection import ask_apart, own_connection
from django_dbhealth.vendors.mysql import MySQL
from tests.conftest import register, unregister
from tests.servers import HAProxy, MariaDBServer, PgBouncer, PostgreSQLServer, wait_for
from tests.servers.base import PASSWORD, USER, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import Server

    NewServer = Callable[..., Server]
    AddDatabase = Callable[..., str]

KINDS = ["mariadb", "postgresql"]
TIMEOUT = {"mariadb": "wait_timeout", "postgresql": "idle_session_timeout"}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """A server of each kind that drops a session after 60 idle seconds."""
    with (
        MariaDBServer(wait_timeout=60) as mariadb,
        PostgreSQLServer(idle_session_timeout="60s", max_connections=12) as postgresql,
    ):
        yield {"mariadb": mariadb, "postgresql": postgresql}


@pytest.fixture
def project() -> Iterator[Callable[..., list[CheckMessage]]]:
    """Return what the checks say of one database: `project(server.django(), deploy=True)`."""
    yield check
    for alias in ("live", "other"):
        if alias in connections.settings:
            unregister(alias)


def check(
    database: dict[str, Any], config: dict[str, Any] | None = None, *, deploy: bool = False
) -> list[CheckMessage]:
    register("live", database)
    with override_settings(DBHEALTH=config or {}):
        return run(["live"], deploy=deploy)


def run(databases: list[str] | None, *, deploy: bool = False) -> list[CheckMessage]:
    """Return what `check --tag dbhealth_live --database ...` has."""
    found = checks.run_checks(tags=[TAG], databases=databases, include_deployment_checks=deploy)
    assert all((each.id or "").startswith("django_dbhealth.W1") for each in found)
    return found


def short(found: list[CheckMessage]) -> list[str]:
    return [(each.id or "").removeprefix("django_dbhealth.") for each in found]


# When they run


def test_registered_for_databases() -> None:
    """They are Django's database checks, and have a tag of their own."""
    for each in (check_servers, check_servers_for_deployment):
        assert set(each.tags) == {Tags.database, TAG}  # type: ignore[attr-defined]


def test_without_a_database() -> None:
    """Django 5.2 and 6.0 call database checks without one too: nothing is asked then."""
    for databases in (None, []):
        assert check_servers(databases=databases) == []
        assert check_servers_for_deployment(databases=databases) == []


def test_only_with_database(
    servers: dict[str, Server], project: Any, mariadb: Server, postgresql: Server
) -> None:
    """Without `--database` nothing is found, with Django's checks around it or without.

    The suite's own servers run: Django 6.1's checks of models connect to all databases.
    """
    register("live", servers["mariadb"].django(CONN_MAX_AGE=600))
    with override_settings(DBHEALTH={"SERVER_IDLE_TIMEOUT": 60}):
        call_command("check", fail_level="WARNING")
        for tags in (None, ["dbhealth"]):
            everything = checks.run_checks(tags=tags, include_deployment_checks=True)
            assert "django_dbhealth.W003" in {each.id for each in everything}
            assert "django_dbhealth.W102" not in {each.id for each in everything}
        assert short(run(["live"], deploy=True)) == ["W102"]
        with pytest.raises(SystemCheckError, match="W102"):
            call_command("check", databases=["live"], fail_level="WARNING")


def test_only_the_database_that_was_named(servers: dict[str, Server], project: Any) -> None:
    """Another database is not asked, and none of our own connections is left."""
    server = servers["mariadb"]
    server.wait_for_sessions(0, USER)
    silence = {"other": {"PING_TIMEOUT": 0.2}}
    config = {"SERVER_IDLE_TIMEOUT": 60, "DATABASES": silence}
    # Django's own checks would wait for the silent one for ever.
    with socket.create_server(("127.0.0.1", 0)) as silent, override_settings(DBHEALTH=config):
        host, port = silent.getsockname()
        register("live", server.django(CONN_MAX_AGE=600))
        register("other", server.django(HOST=host, PORT=str(port)))
        assert short(run(["live"], deploy=True)) == ["W102"]
        assert not select.select([silent], [], [], 0)[0]
        assert short(run(["other"])) == ["W101"]
        assert select.select([silent], [], [], 10)[0]
    server.wait_for_sessions(0, USER)


def test_migrate_goes_on(servers: dict[str, Server], project: Any, capsys: Any) -> None:
    """What they find is a Warning, which does not stop `migrate`."""
    register("live", servers["mariadb"].django(CONN_MAX_AGE=600))
    call_command("migrate", database="live", verbosity=0, skip_checks=False)
    assert "django_dbhealth.W102" in capsys.readouterr().err


def test_own_connection_is_closed(servers: dict[str, Server], project: Any) -> None:
    """The program's own connection is neither used nor closed."""
    server = servers["mariadb"]
    register("live", server.django())
    with connections["live"].cursor() as cursor:
        cursor.execute("SET @mine = 1")
        handle = connections["live"].connection
        assert short(check(server.django(), deploy=True)) == ["W104"]
        cursor.execute("SELECT @mine")
        assert cursor.fetchall() == ((1,),)
    assert connections["live"].connection is handle
    server.wait_for_sessions(1, USER)


def test_databases_without_a_server(project: Any, tmp_path: Any) -> None:
    """SQLite is not opened: there is no server to ask."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "nowhere" / "db"}
    assert project(database, deploy=True) == []


# A server that cannot be asked


def test_unreachable(mariadb: Server, project: Any) -> None:
    """A server that is not there is one Warning, whatever else is asked for."""
    database = mariadb.django(transport="tcp", PORT=str(free_port()), CONN_MAX_AGE=600)
    [found] = project(database, deploy=True)
    fault = MySQL().fault(OperationalError(2002, ""), connecting=True)
    assert fault is not None
    assert found == Warning(
        "The server of database 'live' could not be asked: 2002 CR_CONNECTION_ERROR. "
        f"{fault.meaning}",
        hint=f"{fault.advice} (see docs/checks.md#django-dbhealth-w101)",
        id="django_dbhealth.W101",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_password(kind: str, request: pytest.FixtureRequest, project: Any) -> None:
    """A wrong password is one Warning, which shows no password."""
    server: Server = request.getfixturevalue(kind)
    wrong = "shibboleth/@200%"
    [found] = project(server.django(PASSWORD=wrong), deploy=True)
    assert short([found]) == ["W101"]
    assert wrong not in str(found)
    assert PASSWORD not in str(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["socket", "tcp"])
def test_frozen(kind: str, transport: Any, new_server: NewServer, project: Any) -> None:
    """A server that hangs is one Warning, after PING_TIMEOUT."""
    server = new_server(kind)

    def own_finding() -> CheckMessage | None:
        """Return it unless we came late, and found what the driver itself says after a second."""
        server.freeze()
        began = time.monotonic()
        [found] = project(server.django(transport=transport), {"PING_TIMEOUT": 0.4}, deploy=True)
        assert time.monotonic() - began < 30  # the hang itself would be for ever
        server.thaw()
        server.wait_for_sessions(0, USER)  # a PostgreSQL does not stop while it is connected to
        assert short([found]) == ["W101"]
        return found if "PING_TIMEOUT" in found.msg else None

    assert wait_for(own_finding, timeout=30) == Warning(
        "The server of database 'live' could not be asked: it gave no answer within 0.4 seconds "
        "(PING_TIMEOUT).",
        hint=(
            "See whether the server runs, and whether something on the way drops packets. "
            "(see docs/checks.md#django-dbhealth-w101)"
        ),
        id="django_dbhealth.W101",
    )


def test_no_free_slot(new_server: NewServer, project: Any) -> None:
    """Without a free slot the Warning says so, and at once, whatever CONNECT_RETRY_TIMEOUT says."""
    server = new_server("mariadb")
    server.grant_limit(USER, 1)
    register("other", server.django())
    connections["other"].ensure_connection()
    began = time.monotonic()
    [found] = project(server.django(), {"CONNECT_RETRY_TIMEOUT": 60}, deploy=True)
    assert time.monotonic() - began < 30
    assert "1226 ER_USER_LIMIT_REACHED, max_user_connections" in found.msg


def test_settings_that_cannot_work(mariadb: Server, project: Any) -> None:
    """What Django itself stumbles over is no crash of the check."""
    [found] = project(mariadb.django(CONN_MAX_AGE="60"))
    assert found.msg == "The server of database 'live' could not be asked: TypeError."


def test_a_frozen_server_does_not_keep_the_thread(new_server: NewServer, project: Any) -> None:
    """Who waits for a frozen server's answer is hung up on, so that no thread is left waiting."""
    server = new_server("postgresql")
    register("live", server.django())

    def question(connection: Any) -> None:
        with connection.cursor() as cursor:
            server.freeze()
            cursor.execute("SELECT 1")

    with override_settings(DBHEALTH={"PING_TIMEOUT": 1}), pytest.raises(TimeoutError):
        ask_apart("live", question)
    wait_for(lambda: "dbhealth live" not in {each.name for each in threading.enumerate()})
    server.thaw()
    server.wait_for_sessions(0, USER)


def test_errors_of_the_question_are_raised(mariadb: Server, project: Any) -> None:
    """What the question raises is raised where it was put."""
    register("live", mariadb.django())

    def question(connection: Any) -> None:
        connection.cursor().execute("SELECT nonsense")

    with pytest.raises(Error, match="nonsense"):
        ask_apart("live", question)


def test_own_connection_is_closed_at_once(mariadb: Server, project: Any) -> None:
    """It is closed when the question is answered, and not when nobody refers to it any more."""
    register("live", mariadb.django())
    connection = ask_apart("live", lambda connection: connection)
    assert connection.connection is None


def test_pool_is_left_alone(new_server: NewServer, project: Any) -> None:
    """The question is not put on a connection of a pool, which might have none left."""
    server = new_server("postgresql")
    pool = {"pool": {"min_size": 1, "max_size": 1}}
    register("live", server.django(OPTIONS=pool))
    with connections["live"].cursor():
        assert ask_apart("live", lambda connection: connection.vendor) == "postgresql"
    with closing(own_connection("live")) as connection:
        assert "pool" not in connection.settings_dict["OPTIONS"]


# CONN_MAX_AGE, pools and SERVER_IDLE_TIMEOUT against the real timeout


@pytest.mark.parametrize("kind", KINDS)
def test_max_age_over_the_real_timeout(kind: str, servers: dict[str, Server], project: Any) -> None:
    """A CONN_MAX_AGE at or over what the server allows is found, one below it is not."""
    server = servers[kind]
    config = {"SERVER_IDLE_TIMEOUT": 60}
    [found] = project(server.django(CONN_MAX_AGE=600), config)
    assert found == Warning(
        "CONN_MAX_AGE of database 'live' is 600, but its server drops a connection that was "
        f"idle for 60 seconds ({TIMEOUT[kind]}) and CONN_HEALTH_CHECKS is off: the first request "
        "after a quiet time fails.",
        hint=(
            'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below 60. '
            "(see docs/checks.md#django-dbhealth-w102)"
        ),
        id="django_dbhealth.W102",
    )
    assert short(project(server.django(CONN_MAX_AGE=None), config)) == ["W102"]
    assert short(project(server.django(CONN_MAX_AGE=60), config)) == ["W102"]
    assert project(server.django(CONN_MAX_AGE=59), config) == []
    assert project(server.django(CONN_MAX_AGE=600, CONN_HEALTH_CHECKS=True), config) == []


def test_timeout_of_the_session(mariadb: Server, project: Any) -> None:
    """What counts is the session's own timeout, whoever has set it, and not the server's."""
    options = {"init_command": "SET SESSION wait_timeout = 45"}
    config = {"SERVER_IDLE_TIMEOUT": 45}
    [found] = project(mariadb.django(CONN_MAX_AGE=50, OPTIONS=options), config)
    assert "idle for 45 seconds (wait_timeout)" in found.msg


def test_no_timeout(postgresql: Server, project: Any) -> None:
    """A server that never drops an idle session has no say."""
    assert project(postgresql.django(CONN_MAX_AGE=None)) == []


def test_pool_over_the_real_timeout(servers: dict[str, Server], project: Any) -> None:
    """A pool that keeps connections for longer than the server does is found."""
    server = servers["postgresql"]
    config = {"SERVER_IDLE_TIMEOUT": 60}
    [found] = project(server.django(OPTIONS={"pool": True}), config)
    assert found == Warning(
        "The pool of database 'live' keeps idle connections for longer than the 60 seconds after "
        "which its server drops them (idle_session_timeout), and CONN_HEALTH_CHECKS is off: the "
        "pool hands out dead connections.",
        hint=(
            'Write "CONN_HEALTH_CHECKS": True, so that the pool checks each connection before it '
            "hands it out. (see docs/checks.md#django-dbhealth-w103)"
        ),
        id="django_dbhealth.W103",
    )
    checked = {"OPTIONS": {"pool": True}, "CONN_HEALTH_CHECKS": True}
    assert project(server.django(**checked), config) == []
    short_lived = {"pool": {"min_size": 0, "max_size": 2, "max_idle": 10}}
    assert project(server.django(OPTIONS=short_lived), config) == []


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"SERVER_IDLE_TIMEOUT": 600}, "600 idle seconds (SERVER_IDLE_TIMEOUT in DBHEALTH)"),
        (
            {},
            "300 idle seconds (assumed as long as DBHEALTH has no SERVER_IDLE_TIMEOUT for it)",
        ),
    ],
)
def test_setting_over_the_real_timeout(
    config: dict[str, Any], source: str, servers: dict[str, Server], project: Any
) -> None:
    """What DBHEALTH believes of the server must not be more than what the server says."""
    server = servers["mariadb"]
    [found] = project(server.django(), config)
    assert found == Warning(
        f"A connection of database 'live' is believed to be kept by its server for {source}, but "
        "the server drops it after 60 (wait_timeout).",
        hint=(
            "Write 60 as SERVER_IDLE_TIMEOUT in DBHEALTH, or less where a proxy or a firewall "
            "drops connections earlier. (see docs/checks.md#django-dbhealth-w104)"
        ),
        id="django_dbhealth.W104",
    )
    assert project(server.django(), {"SERVER_IDLE_TIMEOUT": 30}) == []


def test_proxy_in_between(servers: dict[str, Server], project: Any) -> None:
    """Through a proxy that hands the bytes on the session is one's own, and so is its timeout."""
    server = servers["mariadb"]
    with HAProxy(server) as proxy:
        address = {"HOST": proxy.host, "PORT": str(proxy.port)}
        database = server.django(CONN_MAX_AGE=600, **address)
        assert short(project(database, {"SERVER_IDLE_TIMEOUT": 60})) == ["W102"]


def test_pooler_in_between(servers: dict[str, Server], project: Any) -> None:
    """Behind a pooler the server drops the pooler's connections, not its clients'."""
    server = servers["postgresql"]
    assert short(project(server.django(CONN_MAX_AGE=600))) == ["W102"]
    with PgBouncer(server, pool_mode="transaction") as bouncer:
        address = {"HOST": bouncer.host, "PORT": str(bouncer.port)}
        assert project(server.django(CONN_MAX_AGE=600, **address)) == []
    assert project(server.django(CONN_MAX_AGE=600), {"POOLER": "session"}) == []


# The limits


def test_pool_over_the_limit(servers: dict[str, Server], project: Any) -> None:
    """A pool that may grow beyond what the account, the database or the server allows is found."""
    server = servers["postgresql"]  # 3 of its 12 connections are reserved
    project = partial(project, config={"SERVER_IDLE_TIMEOUT": 60})
    server.grant_limit(USER, 5)
    pool = {"pool": {"min_size": 1, "max_size": 6}}
    [account] = project(server.django(OPTIONS=pool, CONN_HEALTH_CHECKS=True))
    assert account == Warning(
        "The pool of database 'live' may grow to 6 connections in each process, but the account "
        "may have 5 at once (CONNECTION LIMIT of the role).",
        hint=(
            "Write a max_size below 5, divided by the number of your processes, or have the limit "
            "raised. (see docs/checks.md#django-dbhealth-w105)"
        ),
        id="django_dbhealth.W105",
    )
    server.execute("ALTER DATABASE test CONNECTION LIMIT 8")
    checked = {"CONN_HEALTH_CHECKS": True}
    all_three = project(server.django(OPTIONS={"pool": {"min_size": 10}}, **checked))
    assert short(all_three) == ["W105"] * 3
    assert [each.msg.split(" but ")[1] for each in all_three] == [
        "the server may have 9 at once (max_connections, less the reserved ones).",
        "the account may have 5 at once (CONNECTION LIMIT of the role).",
        "the database may have 8 at once (CONNECTION LIMIT of the database).",
    ]
    for size in ({"min_size": 5}, True, {"max_size": "many"}, {"max_size": 5}):
        assert project(server.django(OPTIONS={"pool": size}, **checked)) == []
    server.execute("ALTER DATABASE test CONNECTION LIMIT -1")
    server.grant_limit(USER, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_limit_is_nearly_reached(kind: str, servers: dict[str, Server], project: Any) -> None:
    """What is left of the account's limit is advice; our own connection is not counted."""
    server = servers[kind]
    project = partial(project, config={"SERVER_IDLE_TIMEOUT": 60})
    server.wait_for_sessions(0, USER)
    server.grant_limit(USER, 3)
    register("other", server.django())
    connections["other"].ensure_connection()
    assert project(server.django(), deploy=True) == []  # 2 of 3 are left
    server.wait_for_sessions(1, USER)
    second = own_connection("other")
    with closing(second):
        second.ensure_connection()
        assert project(server.django()) == []
        server.wait_for_sessions(2, USER)
        [found] = project(server.django(), deploy=True)
    server.grant_limit(USER, 0)
    name = "max_user_connections" if kind == "mariadb" else "CONNECTION LIMIT of the role"
    assert found == Warning(
        f"Of database 'live' the account may have 3 at once ({name}), and 2 are open.",
        hint=(
            "See who holds them with python manage.py dbhealth connections, and close what nobody "
            "uses, or have the limit raised. (see docs/checks.md#django-dbhealth-w106)"
        ),
        id="django_dbhealth.W106",
    )


def test_limit_of_the_server_is_nearly_reached(new_server: NewServer, project: Any) -> None:
    """A fifth that is left of the server's is little, whoever holds the others."""
    server = new_server("mariadb", max_connections=10)
    held = []
    try:
        for _ in range(7):
            register("other", server.django())
            held.append(own_connection("other"))
            held[-1].ensure_connection()
        wait_for(lambda: connected(held[0]) == 7)  # the administrator has left
        assert project(server.django(), deploy=True) == []  # 3 of 10 are left
        wait_for(lambda: connected(held[0]) == 7)
        held.append(own_connection("other"))
        held[-1].ensure_connection()
        [found] = project(server.django(), deploy=True)
    finally:
        for each in held:
            each.close()
    assert found.msg == (
        "Of database 'live' the server may have 10 at once (max_connections), and 8 are open."
    )


def test_both_checks_judge_one_answer(servers: dict[str, Server], project: Any) -> None:
    """The two checks of one command open one connection; a later command's open another."""
    server = servers["mariadb"]
    register("live", server.django())
    before = server.status("Connections")
    run(["live"], deploy=True)
    assert server.status("Connections") - before == 2  # the other one is the administrator's
    run(["live"], deploy=True)
    assert server.status("Connections") - before == 4


def connected(connection: Any) -> int:
    """Return how many clients the server has: one that has left counts until it has noticed."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW STATUS LIKE 'Threads_connected'")
        return int(cursor.fetchone()[1])
