from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from django_dbhealth.conf import (
    KINDS,
    BadValue,
    Config,
    NotADict,
    UnknownAlias,
    UnknownKey,
    aliases_in,
    closest,
    described,
    get_config,
)

KEYS = (
    "SERVER_IDLE_TIMEOUT",
    "PING_AFTER",
    "PING_TIMEOUT",
    "GUARD",
    "ON_SESSION_STATE_LOSS",
    "CONNECT_RETRY_TIMEOUT",
    "POOLER",
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from([*KEYS, "DATABASES"]), inner)
    ),
    max_leaves=12,
)


def run(code: str) -> str:
    """Run code in a process that has no Django settings, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


# Good values


def test_the_defaults() -> None:
    """Without a DBHEALTH the documented defaults hold."""
    assert Config.from_dict({}) == Config(
        server_idle_timeout=None, ping_after=30, ping_timeout=5, guard=True, pooler=None
    )


def test_each_key_is_read() -> None:
    """Each key sets the attribute of its name."""
    config = Config.from_dict(
        {
            "SERVER_IDLE_TIMEOUT": 300,
            "PING_AFTER": 0,
            "PING_TIMEOUT": 0.5,
            "GUARD": False,
            "POOLER": "session",
        }
    )
    assert config == Config(
        server_idle_timeout=300, ping_after=0, ping_timeout=0.5, guard=False, pooler="session"
    )


def test_the_keys_are_the_attributes() -> None:
    """The accepted keys are exactly those that act."""
    assert tuple(KINDS) == KEYS


def test_an_alias_has_its_own_over_the_rest() -> None:
    """An alias takes what its entry says, and the rest from the top."""
    config = Config.from_dict(
        {"PING_AFTER": 10, "GUARD": False, "DATABASES": {"replica": {"PING_AFTER": 20}}}
    )
    assert config.for_alias("replica") == Config(ping_after=20, guard=False)
    assert config.for_alias("default") is config


def test_an_alias_can_take_a_limit_back() -> None:
    """None in an entry is a value, not an absence."""
    config = Config.from_dict(
        {"SERVER_IDLE_TIMEOUT": 300, "DATABASES": {"replica": {"SERVER_IDLE_TIMEOUT": None}}}
    )
    assert config.for_alias("replica").server_idle_timeout is None


def test_it_is_frozen() -> None:
    """Neither an attribute nor the table of aliases can be changed, and it can be a key."""
    config = Config.from_dict({"DATABASES": {"default": {}}})
    with pytest.raises(FrozenInstanceError):
        config.ping_after = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.databases["default"] = config  # type: ignore[index]
    assert {config: 1}[config] == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SERVER_IDLE_TIMEOUT", None),
        ("SERVER_IDLE_TIMEOUT", 0.001),
        ("SERVER_IDLE_TIMEOUT", 31_536_000),
        ("PING_AFTER", 0),
        ("PING_AFTER", 31_536_000),
        ("PING_TIMEOUT", 0.001),
        ("PING_TIMEOUT", 3600),
        ("GUARD", True),
        ("POOLER", None),
        ("POOLER", "transaction"),
    ],
)
def test_good_values(key: str, value: object) -> None:
    """The ends of each range belong to it."""
    config = Config.from_dict({key: value})
    assert config.problems == ()
    assert getattr(config, key.lower()) == value


# Bad values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SERVER_IDLE_TIMEOUT", 0),
        ("SERVER_IDLE_TIMEOUT", 31_536_001),
        ("SERVER_IDLE_TIMEOUT", "300"),
        ("SERVER_IDLE_TIMEOUT", True),
        ("PING_AFTER", -1),
        ("PING_AFTER", None),
        ("PING_AFTER", math.nan),
        ("PING_AFTER", math.inf),
        ("PING_AFTER", 31_536_001),
        ("PING_AFTER", 10**400),
        ("PING_TIMEOUT", 0),
        ("PING_TIMEOUT", True),
        ("PING_TIMEOUT", 3601),
        ("PING_TIMEOUT", []),
        ("GUARD", 1),
        ("GUARD", None),
        ("POOLER", "statement"),
        ("POOLER", False),
    ],
)
def test_bad_values(key: str, value: object) -> None:
    """A bad value is ignored, and is one problem."""
    config = Config.from_dict({key: value, "PING_AFTR": 1})
    assert [type(problem) for problem in config.problems] == [BadValue, UnknownKey]
    assert getattr(config, key.lower()) == getattr(Config(), key.lower())


def test_a_bad_value() -> None:
    """The problem says where, what, what would be accepted and what holds instead."""
    assert Config.from_dict({"PING_AFTER": "30"}).problems == (
        BadValue(
            name="DBHEALTH['PING_AFTER']",
            value="'30'",
            accepted="a number of seconds from 0 to 31536000",
            used="30",
        ),
    )


def test_what_is_accepted_is_said() -> None:
    """Every kind of setting has its own words."""
    assert [kind.words for kind in KINDS.values()] == [
        "a number of seconds above 0 and at most 31536000, or None",
        "a number of seconds from 0 to 31536000",
        "a number of seconds above 0 and at most 3600",
        "True or False",
        "'raise', 'warn' or 'ignore'",
        "a number of seconds from 0 to 31536000",
        "'session', 'transaction' or None",
    ]


def test_a_bad_value_of_an_alias() -> None:
    """For an alias the value from the top holds instead."""
    config = Config.from_dict({"PING_AFTER": 7, "DATABASES": {"replica": {"PING_AFTER": -1}}})
    assert config.for_alias("replica").ping_after == 7
    assert config.problems == (
        BadValue(
            name="DBHEALTH['DATABASES']['replica']['PING_AFTER']",
            value="-1",
            accepted="a number of seconds from 0 to 31536000",
            used="7",
        ),
    )


def test_an_unknown_key() -> None:
    """The closest key is named, and all are listed."""
    assert Config.from_dict({"ping_aftr": 3}).problems == (
        UnknownKey(
            name="DBHEALTH['ping_aftr']", closest="PING_AFTER", accepted=(*KEYS, "DATABASES")
        ),
    )


def test_an_unknown_key_of_an_alias() -> None:
    """An entry for an alias has no DATABASES of its own."""
    config = Config.from_dict({"DATABASES": {"replica": {"DATABASES": {}}}})
    assert config.problems == (
        UnknownKey(
            name="DBHEALTH['DATABASES']['replica']['DATABASES']", closest=None, accepted=KEYS
        ),
    )


def test_a_key_that_is_no_string() -> None:
    """A number as a key is an unknown key."""
    problem = UnknownKey(name="DBHEALTH[5]", closest=None, accepted=(*KEYS, "DATABASES"))
    assert Config.from_dict({5: 6}).problems == (problem,)


def test_no_dict() -> None:
    """The value itself, which may be a URL with a password, is not kept."""
    config = Config.from_dict("mysql://shop:secret@127.0.0.1/shop")
    assert config == Config(problems=(NotADict(value="a value of type str"),))


def test_databases_is_no_dict() -> None:
    """A DATABASES that is no dict is ignored."""
    config = Config.from_dict({"DATABASES": ["replica"], "PING_AFTER": 1})
    assert config == Config(
        ping_after=1,
        problems=(
            BadValue(
                name="DBHEALTH['DATABASES']",
                value="a value of type list",
                accepted="a dict",
                used="{}",
            ),
        ),
    )


def test_an_entry_is_no_dict() -> None:
    """An entry that is no dict leaves its alias as the rest."""
    config = Config.from_dict({"PING_AFTER": 1, "DATABASES": {"replica": 300}})
    assert config.for_alias("replica") == Config(ping_after=1)
    assert config.problems == (
        BadValue(
            name="DBHEALTH['DATABASES']['replica']", value="300", accepted="a dict", used="{}"
        ),
    )


def test_a_long_name_is_shown() -> None:
    """A name that is one is said, or nobody would find what is wrong; anything else is not."""
    alias, secret = "a_replica_in_frankfurt_2", "mysql://root:secret@db/shop"
    config = Config.from_dict(
        {
            "CONNECT_RETRY_TIMEOUT": -1,
            "DATABASES": {alias: {"ON_SESSION_STATE_LOSS": "Warn"}, secret: {"X": 1}},
        },
    )
    assert [problem.name for problem in config.problems if not isinstance(problem, NotADict)] == [
        "DBHEALTH['CONNECT_RETRY_TIMEOUT']",
        f"DBHEALTH['DATABASES']['{alias}']['ON_SESSION_STATE_LOSS']",
        "DBHEALTH['DATABASES'][a value of type str]['X']",
    ]


def test_an_unknown_alias() -> None:
    """The closest alias is named, and all are listed; what the entry says is kept."""
    config = Config.from_dict(
        {"DATABASES": {"Replca": {"GUARD": False}, "default": {}}},
        aliases=iter(["default", "replica"]),
    )
    assert config.problems == (
        UnknownAlias(
            name="DBHEALTH['DATABASES']['Replca']",
            closest="replica",
            aliases=("default", "replica"),
        ),
    )
    assert not config.for_alias("Replca").guard


def test_all_problems_are_kept() -> None:
    """One problem does not hide another."""
    config = Config.from_dict(
        {"GUARD": 1, "X": 1, "DATABASES": {"a": {"GUARD": 2}, "b": 3}}, aliases=["default"]
    )
    assert [type(problem).__name__ for problem in config.problems] == [
        "BadValue",
        "UnknownKey",
        "UnknownAlias",
        "BadValue",
        "UnknownAlias",
        "BadValue",
    ]


@given(JSON, st.none() | st.lists(st.text(max_size=5)))
def test_reading_never_raises(value: object, aliases: list[str] | None) -> None:
    """Whatever DBHEALTH is, the result is a Config whose values are all accepted ones."""
    config = Config.from_dict(value, aliases=aliases)
    for each in (config, *config.databases.values()):
        assert all(kind.accepts(getattr(each, key.lower())) for key, kind in KINDS.items())


# Words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (True, "True"),
        (0.5, "0.5"),
        (math.nan, "nan"),
        (999_999_999_999_999, "999999999999999"),
        (-999_999_999_999_999, "-999999999999999"),
        (10**15, "a value of type int"),
        pytest.param(10**5000, "a value of type int", id="too long for str()"),
        ("", "''"),
        ("x" * 20, repr("x" * 20)),
        ("x" * 21, "a value of type str"),
        ("a://b:c@d", "a value of type str"),
        ({"PASSWORD": "secret"}, "a value of type dict"),
    ],
)
def test_described(value: object, words: str) -> None:
    """A message shows what is short and harmless, and of the rest the type."""
    assert described(value) == words


def test_closest() -> None:
    """Case does not count, and what is far off is not named."""
    assert closest("DEFALT", ["replica", "Default"]) == "Default"
    assert closest("analytics", ["replica", "default"]) is None


def test_aliases_in() -> None:
    """Django makes a "default" where there is no database."""
    assert aliases_in({"default": {}, "replica": {}}) == ("default", "replica")
    assert aliases_in({}) == ("default",)
    assert aliases_in([]) is None


# The project's own


def test_a_change_of_the_setting_is_seen() -> None:
    """The settings are read once, and again after Django says that they have changed."""
    assert get_config() is get_config()
    with override_settings(DBHEALTH={"PING_AFTER": 1, "DATABASES": {"defaul": {}}}):
        assert get_config().ping_after == 1
        assert [type(problem) for problem in get_config().problems] == [UnknownAlias]
    assert get_config() == Config()


def test_another_setting_changes_nothing() -> None:
    """Only DBHEALTH and DATABASES are read anew."""
    before = get_config()
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        assert get_config() is before


def test_a_change_of_the_databases_is_seen() -> None:
    """The aliases are known from DATABASES, so a change of it counts."""
    from django_dbhealth.conf import forget_config

    before = get_config()
    forget_config(setting="DATABASES", value={}, enter=True)
    assert get_config() is not before


def test_without_settings() -> None:
    """Without configured settings the defaults hold; once there are some, they do."""
    code = """
from django_dbhealth.conf import Config, get_config
from django.conf import settings
assert get_config() == Config(), get_config()
assert not settings.configured
settings.configure(DBHEALTH={"PING_AFTER": 1})
print(get_config().ping_after, get_config() is get_config())
"""
    assert run(code) == "1 True\n"


def test_without_dbhealth_in_the_settings() -> None:
    """A project need not have the setting."""
    code = """
from django.conf import settings
from django_dbhealth.conf import Config, get_config
settings.configure()
print(get_config() == Config())
"""
    assert run(code) == "True\n"
