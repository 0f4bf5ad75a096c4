"""System checks of DATABASES and DBHEALTH. None of them opens a connection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004

from .conf import (
    BadValue,
    Config,
    NotADict,
    Problem,
    UnknownAlias,
    UnknownKey,
    aliases_in,
    described,
    get_config,
)
from .vendors import vendor_for_engine
from .vendors.base import Vendor

TAG = "dbhealth"
DUMMY = "django.db.backends.dummy"


# The registered checks and the one for everybody


def register_checks() -> None:
    """Register the checks with Django. A second call changes nothing."""
    checks.register(check_settings, TAG)
    checks.register(check_settings_for_deployment, TAG, deploy=True)


def check_settings(**kwargs: object) -> list[CheckMessage]:
    """Check for what cannot work, or does not do what it says."""
    config = get_config()
    return [*_check_guard(config), *_find_mistakes(settings.DATABASES, config)]


def check_settings_for_deployment(**kwargs: object) -> list[CheckMessage]:
    """Check for what works until a connection has been idle for too long."""
    return _find_risks(settings.DATABASES, get_config())


def check_database_settings(
    databases: Mapping[str, Mapping[str, Any]], config: Config | Mapping[str, Any] | None = None
) -> list[CheckMessage]:
    """Return all that the checks have to say about a DATABASES and a DBHEALTH.

    It reads nothing else, so a settings file or a script can call it. Nothing is connected, but
    each ENGINE's module is imported, to see which database is behind it.
    """
    if config is None:
        config = Config()
    elif not isinstance(config, Config):
        config = Config.from_dict(config, aliases=aliases_in(databases))
    return [*_find_mistakes(databases, config), *_find_risks(databases, config)]


def _find_mistakes(databases: object, config: Config) -> list[CheckMessage]:
    found = [_config_problem(problem) for problem in config.problems]
    return found + [
        message
        for database in databases_in(databases, config)
        for check in MISTAKES
        for message in check(database)
    ]


def _find_risks(databases: object, config: Config) -> list[CheckMessage]:
    return [
        message
        for database in databases_in(databases, config)
        for check in RISKS
        for message in check(database)
    ]


# One entry of DATABASES


@dataclass(frozen=True, kw_only=True)
class Database:
    """One entry of DATABASES, and what is known of the database behind it."""

    alias: str
    settings: Mapping[str, Any]
    config: Config
    vendor: Vendor  # a plain Vendor where the engine is not known

    @property
    def max_age(self) -> Any:
        return self.settings.get("CONN_MAX_AGE", 0)

    @property
    def health_checks(self) -> Any:
        return self.settings.get("CONN_HEALTH_CHECKS", False)

    @property
    def options(self) -> Mapping[str, Any]:
        options = self.settings.get("OPTIONS")
        return options if isinstance(options, Mapping) else {}

    @property
    def has_pool(self) -> bool:
        return self.vendor.has_pool and bool(self.options.get("pool"))

    @property
    def pool_options(self) -> Mapping[str, Any]:
        options = self.options.get("pool")
        return options if isinstance(options, Mapping) else {}  # True: psycopg_pool's defaults


def databases_in(databases: object, config: Config) -> Iterator[Database]:
    """Yield the entries that Django could connect to. What is none is Django's to complain of."""
    if not isinstance(databases, Mapping):
        return
    for alias, entry in databases.items():
        engine = entry.get("ENGINE") if isinstance(entry, Mapping) else None
        if isinstance(engine, str) and engine not in ("", DUMMY):
            yield Database(
                alias=alias,
                settings=entry,
                config=config.for_alias(alias),
                vendor=_vendor_of(engine),
            )


def _vendor_of(engine: str) -> Vendor:
    # A leading dot would be a relative import, which is a TypeError.
    found = None if engine.startswith(".") else vendor_for_engine(engine)
    return found or Vendor()


@dataclass(frozen=True, kw_only=True)
class IdleLimit:
    """After how many seconds of idleness a connection is dropped, and who says so."""

    seconds: float
    source: str
    from_options: bool = False


def _idle_limit(database: Database) -> IdleLimit | None:
    """Return the shortest limit that somebody has set, else the one that is assumed."""
    vendor = database.vendor
    if not vendor.has_server:
        return None
    limits = (limit_in_setting(database.config), _limit_in_options(database))
    said = [limit for limit in limits if limit]
    return min(said, key=lambda limit: limit.seconds) if said else assumed_limit(vendor)


def limit_in_setting(config: Config) -> IdleLimit | None:
    """Return what DBHEALTH says of a database, None where it says nothing."""
    seconds = config.server_idle_timeout
    if seconds is None:
        return None
    return IdleLimit(seconds=seconds, source="SERVER_IDLE_TIMEOUT in DBHEALTH")


def assumed_limit(vendor: Vendor) -> IdleLimit | None:
    """Return what holds where nobody says anything, None for a server that waits for ever."""
    if vendor.default_idle_timeout is None:
        return None
    return IdleLimit(
        seconds=vendor.default_idle_timeout,
        source="assumed as long as DBHEALTH has no SERVER_IDLE_TIMEOUT for it",
    )


def _limit_in_options(database: Database) -> IdleLimit | None:
    option = database.vendor.session_option
    text = database.options.get(option) if option else None
    seconds = database.vendor.idle_timeout_in(text) if isinstance(text, str) else None
    if seconds is None:
        return None
    return IdleLimit(seconds=seconds, source=f"set in OPTIONS[{option!r}]", from_options=True)


def _seconds_in(max_age: object) -> float | None:
    """Return the seconds as Django can reckon with them, None for what it cannot add."""
    if not isinstance(max_age, Real):
        return None
    try:
        return float(max_age)
    except OverflowError:
        return None


# What cannot work, or does not do what it says


def _check_max_age(database: Database) -> Iterator[CheckMessage]:
    max_age = database.max_age
    if max_age is None or database.has_pool:
        return
    seconds = _seconds_in(max_age)
    if seconds is None:
        yield max_age_is_no_number(database)
    elif effect := _odd_effect(max_age, seconds):
        yield max_age_is_odd(database, effect)


def _odd_effect(max_age: object, seconds: float) -> str | None:
    """Return what Django does with a number that is no age."""
    if isinstance(max_age, bool):
        return f"which counts as {seconds:g}"
    if math.isnan(seconds):
        return "so that no connection is ever too old and Django closes none for its age"
    if seconds < 0:
        return "which has the effect of 0: each connection is closed at the end of its request"
    return None


def _check_health_checks(database: Database) -> Iterator[CheckMessage]:
    if isinstance(database.health_checks, str):
        yield health_checks_is_a_string(database)


def _check_lost_in_options(database: Database) -> Iterator[CheckMessage]:
    if database.vendor.refuses_unknown_options:
        for option in map(str, database.options):
            if option.upper() in ("CONN_MAX_AGE", "CONN_HEALTH_CHECKS"):
                yield lost_in_options(database, option)


def _check_pool_max_age(database: Database) -> Iterator[CheckMessage]:
    if database.has_pool and database.max_age != 0:
        yield pool_with_max_age(database)


def _check_driver(database: Database) -> Iterator[CheckMessage]:
    problem = database.vendor.driver_problem()
    if problem is not None:
        yield driver_has_a_problem(database, problem)


def _check_pooler(database: Database) -> Iterator[CheckMessage]:
    if (
        database.config.pooler == "transaction"
        and database.vendor.has_server_side_cursors
        and not database.settings.get("DISABLE_SERVER_SIDE_CURSORS")
    ):
        yield server_side_cursors_through_pooler(database)


def _check_guard(config: Config) -> Iterator[CheckMessage]:
    from .handler import guard_off_reason  # it needs django.db, the settings checks do not

    wanted = any(each.guard for each in (config, *config.databases.values()))
    reason = guard_off_reason()
    if wanted and reason is not None:
        yield guard_is_off(reason)


# What works until a connection has been idle for too long


def _check_idle_max_age(database: Database) -> Iterator[CheckMessage]:
    limit = _idle_limit(database)
    if limit is not None and max_age_outlives(database, limit.seconds):
        build = max_age_over_own_timeout if limit.from_options else max_age_over_idle_timeout
        yield build(database, limit)


def max_age_outlives(database: Database, idle_timeout: float) -> bool:
    """Return whether a request may be given a connection that was dropped meanwhile."""
    if database.has_pool or database.health_checks:
        return False
    max_age = math.inf if database.max_age is None else _seconds_in(database.max_age)
    if max_age is None or _odd_effect(database.max_age, max_age):
        return False
    return max_age >= idle_timeout


def _check_idle_pool(database: Database) -> Iterator[CheckMessage]:
    limit = _idle_limit(database)
    if limit is not None and pool_outlives(database, limit.seconds):
        yield pool_over_idle_timeout(database, limit)


def pool_outlives(database: Database, idle_timeout: float) -> bool:
    """Return whether the pool may hand out a connection that was dropped meanwhile."""
    # Since Django 6.1 a pool may bring its own check.
    if not database.has_pool or database.health_checks or database.pool_options.get("check"):
        return False
    return database.vendor.pooled_idle_time(database.pool_options) >= idle_timeout


Check = Callable[[Database], Iterable[CheckMessage]]

MISTAKES: tuple[Check, ...] = (
    _check_max_age,
    _check_health_checks,
    _check_lost_in_options,
    _check_pool_max_age,
    _check_driver,
    _check_pooler,
)
RISKS: tuple[Check, ...] = (
    _check_idle_max_age,
    _check_idle_pool,
)


# The messages


def max_age_is_no_number(database: Database) -> Error:
    return error(
        "E001",
        f"CONN_MAX_AGE of database {database.alias!r} is {described(database.max_age)}: "
        "Django adds it to a number of seconds, so that every attempt to connect fails.",
        "Write a number of seconds without quotes, such as 60; or 0 to close each connection at "
        "the end of its request; or None to keep it. Text from the environment has to be "
        "converted first, for instance by int().",
    )


def lost_in_options(database: Database, option: str) -> Error:
    return error(
        "E002",
        f"{option} stands in OPTIONS of database {database.alias!r}: Django does not look for it "
        "there but hands it to the driver, which refuses it, so that nothing can connect.",
        f'Move it out of OPTIONS and write DATABASES["{database.alias}"]["{option.upper()}"]. '
        "With dj-database-url take it out of the URL and pass it to config() or parse().",
    )


def pool_with_max_age(database: Database) -> Error:
    return error(
        "E003",
        f"Database {database.alias!r} has a pool in OPTIONS and a CONN_MAX_AGE of "
        f"{described(database.max_age)}: Django allows only one of the two, so that every "
        "attempt to connect fails.",
        "Remove CONN_MAX_AGE or write 0: the pool keeps the connections.",
    )


def config_is_no_dict(problem: NotADict) -> Error:
    return error(
        "E004",
        f"DBHEALTH is {problem.value}, so it is ignored and all defaults hold.",
        'Write a dict, such as DBHEALTH = {"SERVER_IDLE_TIMEOUT": 300}.',
    )


def config_value_is_bad(problem: BadValue) -> Error:
    return error(
        "E005",
        f"{problem.name} is {problem.value}, so it is ignored and {problem.used} holds.",
        f"Write {problem.accepted}.",
    )


def max_age_is_odd(database: Database, effect: str) -> Warning:
    return warning(
        "W001",
        f"CONN_MAX_AGE of database {database.alias!r} is {described(database.max_age)}, {effect}.",
        "Write a number of seconds such as 60; or 0 to close each connection at the end of its "
        "request; or None to keep it.",
    )


def health_checks_is_a_string(database: Database) -> Warning:
    value = database.health_checks
    return warning(
        "W002",
        f"CONN_HEALTH_CHECKS of database {database.alias!r} is {described(value)}, "
        f"a string that counts as {bool(value)}.",
        "Write True or False without quotes. Text from the environment or from a URL has to be "
        "converted first.",
    )


def max_age_over_idle_timeout(database: Database, limit: IdleLimit) -> Warning:
    return warning(
        "W003",
        f"CONN_MAX_AGE of database {database.alias!r} is {age_of(database)}, but a connection "
        f"that was idle for {limit.seconds:.15g} seconds is dropped by its server ({limit.source}) "
        "and CONN_HEALTH_CHECKS is off: the first request after a quiet time fails.",
        'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below '
        f"{limit.seconds:.15g}. If the server really waits longer, write its timeout in seconds "
        "as SERVER_IDLE_TIMEOUT in DBHEALTH.",
    )


def max_age_over_own_timeout(database: Database, limit: IdleLimit) -> Warning:
    return warning(
        "W004",
        f"CONN_MAX_AGE of database {database.alias!r} is {age_of(database)}, but its server "
        f"is told to drop a connection that was idle for {limit.seconds:.15g} seconds "
        f"({limit.source}) and CONN_HEALTH_CHECKS is off: the first request after a quiet time "
        "fails.",
        'Write "CONN_HEALTH_CHECKS": True or a CONN_MAX_AGE below '
        f"{limit.seconds:.15g}, or let OPTIONS set a longer timeout.",
    )


def pool_over_idle_timeout(database: Database, limit: IdleLimit) -> Warning:
    return warning(
        "W005",
        f"The pool of database {database.alias!r} keeps idle connections for longer than the "
        f"{limit.seconds:.15g} seconds after which they are dropped by the server "
        f"({limit.source}), and CONN_HEALTH_CHECKS is off: the pool hands out dead connections.",
        'Write "CONN_HEALTH_CHECKS": True, so that the pool checks each connection before it '
        "hands it out. A shorter max_lifetime does not help: it is looked at only when a "
        "connection is given back.",
    )


def driver_has_a_problem(database: Database, problem: str) -> Warning:
    return warning(
        "W006",
        f"The driver of database {database.alias!r} needs an upgrade. {problem}",
        "Upgrade the driver.",
    )


def server_side_cursors_through_pooler(database: Database) -> Warning:
    return warning(
        "W007",
        f"Database {database.alias!r} is reached through a pooler that gives each transaction "
        "another session (POOLER in DBHEALTH), and DISABLE_SERVER_SIDE_CURSORS is off: "
        "iterator() asks for rows from a cursor that its session does not have.",
        f'Write DATABASES["{database.alias}"]["DISABLE_SERVER_SIDE_CURSORS"] = True.',
    )


def config_key_is_unknown(problem: UnknownKey) -> Warning:
    return warning(
        "W008",
        f"{problem.name} is no setting of django-dbhealth, so it is ignored.",
        f"{_guess(problem.closest)}The settings are: {', '.join(problem.accepted)}.",
    )


def config_alias_is_unknown(problem: UnknownAlias) -> Warning:
    return warning(
        "W009",
        f"{problem.name} is for a database that is not in DATABASES, so it is ignored.",
        f"{_guess(problem.closest)}The aliases in DATABASES are: {', '.join(problem.aliases)}.",
    )


def guard_is_off(reason: str) -> Warning:
    return warning(
        "W010",
        "The guard of django-dbhealth stays off, so no lost connection is healed, and "
        f"boundaries may close a connection with a lock or a temporary table: {reason}",
        "Use versions of Django and django-dbhealth that fit each other, or write "
        '"GUARD": False in DBHEALTH to go without.',
    )


def _config_problem(problem: Problem) -> CheckMessage:
    match problem:
        case NotADict():
            return config_is_no_dict(problem)
        case BadValue():
            return config_value_is_bad(problem)
        case UnknownKey():
            return config_key_is_unknown(problem)
        case UnknownAlias():
            return config_alias_is_unknown(problem)


def age_of(database: Database) -> str:
    seconds = _seconds_in(database.max_age)
    return "None" if seconds is None else f"{seconds:.15g}"


def _guess(closest: str | None) -> str:
    return f"Did you mean {closest}? " if closest else ""


def error(number: str, message: str, advice: str) -> Error:
    return Error(message, hint=_hint(number, advice), id=f"django_dbhealth.{number}")


def warning(number: str, message: str, advice: str) -> Warning:
    return Warning(message, hint=_hint(number, advice), id=f"django_dbhealth.{number}")


def _hint(number: str, advice: str) -> str:
    return f"{advice} (see docs/checks.md#django-dbhealth-{number.lower()})"
