"""System checks that ask the servers: only those of the databases that ``--database`` names."""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from django.core import checks
from django.core.checks import CheckMessage, Tags, Warning  # noqa: A004
from django.db import connections

from .checks import (
    MISTAKES,
    Database,
    age_of,
    assumed_limit,
    databases_in,
    limit_in_setting,
    max_age_outlives,
    pool_outlives,
    warning,
)
from .conf import get_config
from .diagnosis import classify
from .own_connection import ask_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .checks import IdleLimit
    from .vendors.server import Limit, ServerState


# Not the tag of the other checks: given a tag and no --database, Django 6.1 names all databases.
TAG = "dbhealth_live"


def register_live_checks() -> None:
    """Register the checks with Django. A second call changes nothing."""
    checks.register(check_servers, Tags.database, TAG)
    checks.register(check_servers_for_deployment, Tags.database, TAG, deploy=True)


def check_servers(
    *, databases: Iterable[str] | None = None, **kwargs: object
) -> list[CheckMessage]:
    """Check whether the settings fit what the servers say of themselves."""
    return [message for database in _with_server(databases) for message in _find_misfits(database)]


def check_servers_for_deployment(
    *, databases: Iterable[str] | None = None, **kwargs: object
) -> list[CheckMessage]:
    """Check whether the servers have connections left."""
    return [message for database in _with_server(databases) for message in _find_tight(database)]


def find_all(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    """Yield what is wrong with a database's settings, now that its server has said something."""
    for check in MISTAKES:
        yield from check(database)
    for check_against in MISFITS:
        yield from check_against(database, state)
    yield from _find_tight_limits(database, state)


def _with_server(aliases: Iterable[str] | None) -> list[Database]:
    """Return those of the databases that a server can be asked about, without asking it.

    Without ``--database`` Django 5.2 and 6.0 call these checks with None, 6.1 does not call them.
    """
    wanted = set(aliases or ())
    return [
        database
        for database in databases_in(connections.settings, get_config())
        if database.alias in wanted and database.vendor.drivers
    ]


def _find_misfits(database: Database) -> Iterator[CheckMessage]:
    state = _ask(database)
    if isinstance(state, CheckMessage):
        yield state
        return
    for check in MISFITS:
        yield from check(database, state)


def _find_tight(database: Database) -> Iterator[CheckMessage]:
    state = _answer(database)
    if isinstance(state, CheckMessage):
        return  # check_servers() says so
    yield from _find_tight_limits(database, state)


def _find_tight_limits(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    for limit in state.limits:
        if _is_tight(limit):
            yield limit_is_nearly_reached(database, limit)


# Both checks of one command judge the same answer: a server that has just been asked may hold the
# slot of that connection for a moment, and one that hangs need not be waited for twice.
_answers: dict[str, tuple[float, ServerState | Warning]] = {}
FRESH_FOR = 10.0  # seconds


def _answer(database: Database) -> ServerState | Warning:
    asked_at, answer = _answers.get(database.alias, (-math.inf, None))
    if answer is None or monotonic() - asked_at > FRESH_FOR:
        return _ask(database)
    return answer


def _ask(database: Database) -> ServerState | Warning:
    """Return what the server says, or the finding that it says nothing. Nothing is raised."""
    answer: ServerState | Warning
    try:
        answer = ask_apart(database.alias, database.vendor.server_state)
    except Exception as error:  # noqa: BLE001 (whatever it is, the server cannot be asked)
        answer = server_cannot_be_asked(database, error)
    _answers[database.alias] = monotonic(), answer
    return answer


# What the settings say against what the server says


def _check_max_age(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    seconds = _idle_timeout(database, state)
    if seconds is not None and max_age_outlives(database, seconds):
        yield max_age_over_real_timeout(database, state, seconds)


def _check_pool(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    seconds = _idle_timeout(database, state)
    if seconds is not None and pool_outlives(database, seconds):
        yield pool_over_real_timeout(database, state, seconds)


def _check_setting(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    seconds = _idle_timeout(database, state)
    believed = limit_in_setting(database.config) or assumed_limit(database.vendor)
    if seconds is not None and believed is not None and believed.seconds > seconds:
        yield setting_over_real_timeout(database, state, seconds, believed)


def _check_pool_size(database: Database, state: ServerState) -> Iterator[CheckMessage]:
    size = database.vendor.pool_size(database.pool_options) if database.has_pool else 0
    for limit in state.limits:
        if limit.maximum is not None and size > limit.maximum:
            yield pool_over_limit(database, limit, size)


def _idle_timeout(database: Database, state: ServerState) -> float | None:
    """Return after how many idle seconds the server drops a session, None where it never does.

    A pooler's clients have a timeout of the pooler's, of which the server knows nothing.
    """
    if state.idle_timeout is None or database.config.pooler is not None:
        return None
    return state.timeouts.get(state.idle_timeout)


MISFITS: tuple[Callable[[Database, ServerState], Iterable[CheckMessage]], ...] = (
    _check_max_age,
    _check_pool,
    _check_setting,
    _check_pool_size,
)


def _is_tight(limit: Limit) -> bool:
    """Return whether at most a fifth of the connections is left, or a single one."""
    used = _used_by_others(limit)
    if limit.maximum is None or not used:
        return False
    return limit.maximum - used <= max(1, limit.maximum / 5)


def _used_by_others(limit: Limit) -> int:
    """Return how many connections are open but for our own, which is closed again."""
    return 0 if limit.used is None else limit.used - 1


# The messages


def server_cannot_be_asked(database: Database, error: Exception) -> Warning:
    fault = classify(error)
    if isinstance(error, TimeoutError):
        seconds = database.config.ping_timeout
        reason = f"it gave no answer within {seconds:g} seconds (PING_TIMEOUT)."
        advice = "See whether the server runs, and whether something on the way drops packets."
    elif fault is not None:
        reason, advice = f"{fault.title}. {fault.meaning}", fault.advice
    else:
        reason = f"{type(error).__name__}."
        advice = "See what the database says when it is used: python manage.py dbshell."
    return warning(
        "W101",
        f"The server of database {database.alias!r} could not be asked: {reason}",
        advice,
    )


def max_age_over_real_timeout(database: Database, state: ServerState, seconds: float) -> Warning:
    return warning(
        "W102",
        f"CONN_MAX_AGE of database {database.alias!r} is {age_of(database)}, but its server "
        f"drops a connection that was idle for {seconds:.15g} seconds ({state.idle_timeout}) and "
        "CONN_HEALTH_CHECKS is off: the first request after a quiet time fails.",
        f'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below {seconds:.15g}.',
    )


def pool_over_real_timeout(database: Database, state: ServerState, seconds: float) -> Warning:
    return warning(
        "W103",
        f"The pool of database {database.alias!r} keeps idle connections for longer than the "
        f"{seconds:.15g} seconds after which its server drops them ({state.idle_timeout}), and "
        "CONN_HEALTH_CHECKS is off: the pool hands out dead connections.",
        'Write "CONN_HEALTH_CHECKS": True, so that the pool checks each connection before it '
        "hands it out.",
    )


def setting_over_real_timeout(
    database: Database, state: ServerState, seconds: float, believed: IdleLimit
) -> Warning:
    return warning(
        "W104",
        f"A connection of database {database.alias!r} is believed to be kept by its server for "
        f"{believed.seconds:.15g} idle seconds ({believed.source}), but the server drops it after "
        f"{seconds:.15g} ({state.idle_timeout}).",
        f"Write {seconds:.15g} as SERVER_IDLE_TIMEOUT in DBHEALTH, or less where a proxy or a "
        "firewall drops connections earlier.",
    )


def pool_over_limit(database: Database, limit: Limit, size: int) -> Warning:
    return warning(
        "W105",
        f"The pool of database {database.alias!r} may grow to {size} connections in each process, "
        f"but {_allowed(limit)}.",
        f"Write a max_size below {limit.maximum}, divided by the number of your processes, or have "
        "the limit raised.",
    )


def limit_is_nearly_reached(database: Database, limit: Limit) -> Warning:
    return warning(
        "W106",
        f"Of database {database.alias!r} {_allowed(limit)}, and {_used_by_others(limit)} are open.",
        "See who holds them with python manage.py dbhealth connections, and close what nobody "
        "uses, or have the limit raised.",
    )


def _allowed(limit: Limit) -> str:
    whose = {"server": "the server", "account": "the account", "database": "the database"}
    return f"{whose[limit.scope]} may have {limit.maximum} at once ({limit.name})"
