"""The setting DBHEALTH as one frozen, validated object."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

# What a setting may be

YEAR = 31_536_000  # seconds; the most that MySQL and MariaDB take for wait_timeout
HOUR = 3_600  # seconds; a probe that takes longer is a hang (poll() itself takes 24 days)


class Kind(NamedTuple):
    """A kind of value: the question whether one is of it, and the answer in words."""

    accepts: Callable[[Any], bool]
    words: str


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


IDLE_TIMEOUT = Kind(
    lambda value: value is None or (_is_number(value) and 0 < value <= YEAR),
    f"a number of seconds above 0 and at most {YEAR}, or None",
)
PAUSE = Kind(
    lambda value: _is_number(value) and 0 <= value <= YEAR,
    f"a number of seconds from 0 to {YEAR}",
)
PROBE_TIMEOUT = Kind(
    lambda value: _is_number(value) and 0 < value <= HOUR,
    f"a number of seconds above 0 and at most {HOUR}",
)
STATE_LOSS = Kind(lambda value: value in ("raise", "warn", "ignore"), "'raise', 'warn' or 'ignore'")
SWITCH = Kind(lambda value: isinstance(value, bool), "True or False")
POOLER = Kind(
    lambda value: value is None or value in ("session", "transaction"),
    "'session', 'transaction' or None",
)


# What may be wrong with it


@dataclass(frozen=True, kw_only=True)
class NotADict:
    """DBHEALTH itself is something else."""

    value: str


@dataclass(frozen=True, kw_only=True)
class UnknownKey:
    """A key that no setting has."""

    name: str
    closest: str | None
    accepted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BadValue:
    """A value of the wrong type or out of range."""

    name: str
    value: str
    accepted: str
    used: str


@dataclass(frozen=True, kw_only=True)
class UnknownAlias:
    """Settings for a database that is not in DATABASES."""

    name: str
    closest: str | None
    aliases: tuple[str, ...]


Problem = NotADict | UnknownKey | BadValue | UnknownAlias

_HARMLESS = re.compile(r"[\w .+-]{0,20}")
_NAME = re.compile(r"[\w.-]{1,60}")  # of a setting, of a database: not as short, and no secret


def described(value: object) -> str:
    """Return a value as a message may show it: never long, and never a URL with its password."""
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int and abs(value) < 10**15:
        return repr(value)
    if type(value) is str and _HARMLESS.fullmatch(value):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def closest(name: object, names: Iterable[str]) -> str | None:
    """Return the one of the names that was probably meant, None where none is similar."""
    by_folded = {each.casefold(): each for each in names}
    matches = difflib.get_close_matches(str(name).casefold(), by_folded, n=1)
    return by_folded[matches[0]] if matches else None


# The settings


def _no_databases() -> Mapping[str, Config]:
    return MappingProxyType({})


def _setting(default: Any, kind: Kind) -> Any:
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What DBHEALTH says, with the defaults for what it does not say.

    A setting's key is its name in capitals. ``for_alias()`` gives what holds for one database.
    """

    server_idle_timeout: float | None = _setting(None, IDLE_TIMEOUT)
    ping_after: float = _setting(30, PAUSE)
    ping_timeout: float = _setting(5, PROBE_TIMEOUT)
    guard: bool = _setting(True, SWITCH)
    on_session_state_loss: str = _setting("raise", STATE_LOSS)
    connect_retry_timeout: float = _setting(0, PAUSE)
    pooler: str | None = _setting(None, POOLER)

    databases: Mapping[str, Config] = field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )
    problems: tuple[Problem, ...] = ()

    @classmethod
    def from_dict(cls, value: object, *, aliases: Iterable[str] | None = None) -> Config:
        """Read a DBHEALTH; what is wrong with it is kept in ``problems`` and never raised.

        ``aliases`` are the keys of DATABASES; without them no alias is doubted.
        """
        if not isinstance(value, Mapping):
            return cls(problems=(NotADict(value=described(value)),))
        own = {key: each for key, each in value.items() if key != "DATABASES"}
        known = None if aliases is None else tuple(aliases)
        accepted = (*KINDS, "DATABASES")
        top, problems = _read(own, name="DBHEALTH", base=cls(), accepted=accepted)
        databases: dict[str, Config] = {}
        for alias, entry in _entries(value.get("DATABASES", {}), problems).items():
            name = _item("DBHEALTH['DATABASES']", alias)
            databases[alias], found = _read(entry, name=name, base=top, accepted=tuple(KINDS))
            problems += _doubts(alias, name, known) + found
        return replace(top, databases=MappingProxyType(databases), problems=tuple(problems))

    def for_alias(self, alias: str) -> Config:
        """Return what holds for one database: its own entry over the rest of DBHEALTH."""
        return self.databases.get(alias, self)


KINDS: Mapping[str, Kind] = {
    each.name.upper(): each.metadata["kind"] for each in fields(Config) if each.metadata
}


def _item(name: str, key: object) -> str:
    is_name = type(key) is str and _NAME.fullmatch(key)
    return f"{name}[{key!r}]" if is_name else f"{name}[{described(key)}]"


def _read(
    entry: object, *, name: str, base: Config, accepted: tuple[str, ...]
) -> tuple[Config, list[Problem]]:
    """Return the base with what the entry says instead, and what is wrong with the entry."""
    if not isinstance(entry, Mapping):
        return base, [_not_a_dict(name, entry)]
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in entry.items():
        kind = KINDS.get(key)
        if kind is None:
            problems.append(
                UnknownKey(name=_item(name, key), closest=closest(key, accepted), accepted=accepted)
            )
        elif kind.accepts(value):
            values[key.lower()] = value
        else:
            problems.append(
                BadValue(
                    name=_item(name, key),
                    value=described(value),
                    accepted=kind.words,
                    used=described(getattr(base, key.lower())),
                )
            )
    return replace(base, **values), problems


def _entries(databases: object, problems: list[Problem]) -> Mapping[str, object]:
    if isinstance(databases, Mapping):
        return databases
    problems.append(_not_a_dict("DBHEALTH['DATABASES']", databases))
    return {}


def _not_a_dict(name: str, value: object) -> BadValue:
    return BadValue(name=name, value=described(value), accepted="a dict", used="{}")


def _doubts(alias: str, name: str, known: tuple[str, ...] | None) -> list[Problem]:
    if known is None or alias in known:
        return []
    texts = tuple(str(each) for each in known)
    return [UnknownAlias(name=name, closest=closest(alias, texts), aliases=texts)]


def aliases_in(databases: object) -> tuple[str, ...] | None:
    """Return the aliases of a DATABASES, None for one that is no dict."""
    if not isinstance(databases, Mapping):
        return None
    return tuple(databases) or ("default",)  # Django makes that one where there is none


# The project's own


def get_config() -> Config:
    """Return the project's settings, or the defaults where Django is not configured."""
    try:
        return _load_config()
    except ImproperlyConfigured:
        return Config()


@functools.cache
def config_for(alias: str) -> Config:
    """Return what holds for one database of the project's."""
    return get_config().for_alias(alias)


@functools.cache
def _load_config() -> Config:
    return Config.from_dict(
        getattr(settings, "DBHEALTH", {}), aliases=aliases_in(settings.DATABASES)
    )


def forget_config(*, setting: str, **kwargs: object) -> None:
    """Read the settings anew at the next use. A receiver of ``setting_changed``."""
    if setting in ("DBHEALTH", "DATABASES"):
        _load_config.cache_clear()
        config_for.cache_clear()


setting_changed.connect(forget_config, dispatch_uid="django_dbhealth.conf")
