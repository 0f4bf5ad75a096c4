"""dbhealth explain: the faults in plain words, with and without a project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_dbhealth.explanations import explanations, find, nearest

ROOT = Path(__file__).resolve().parent.parent


def places(query: str) -> list[str]:
    return [each.fault.anchor.partition("#fault-")[2] for each in find(query)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("2006", ["2006", "2006-at-connect"]),
        (" 57p05 ", ["57p05"]),
        ("er_lock_deadlock", ["1213"]),
        ("1226 ER_USER_LIMIT_REACHED, max_user_connections", ["1226-max-user-connections"]),
        (
            "1226",
            [
                "1226-max-user-connections",
                "1226-max-connections-per-hour",
                "1226-statements-per-hour",
            ],
        ),
        # What somebody copies from a traceback
        (
            "(1226, \"User 'shop' has exceeded the 'max_questions' resource (current value: 9)\")",
            ["1226-statements-per-hour"],
        ),
        ("django.db.utils.OperationalError: (1040, 'Too many connections')", ["1040"]),
        ("MySQL server has gone away", ["2006", "2006-at-connect"]),
        ("Server has gone away", ["2006", "2006-at-connect"]),
        ("Lost connection", ["2013-at-connect", "2013", "2055"]),
        ("(2013, 'Lost connection to MySQL server during query')", ["2013-at-connect", "2013"]),
        ("deadlock", ["1213", "40p01"]),
        (
            'connection to server at "10.0.0.1" failed: FATAL: sorry, too many clients already',
            ["too-many-clients-already", "53300"],
        ),
        ("the connection is closed", ["connection-is-closed"]),
        # Nothing
        ("", []),
        ("  ", []),
        ("424242", []),
        ("a mistake in the moon's orbit", []),
    ],
)
def test_find(query: str, expected: list[str]) -> None:
    """By the number, the SQLSTATE, the name, a message, or a part of one."""
    assert places(query) == expected


@pytest.mark.parametrize("explanation", explanations(), ids=lambda each: each.fault.anchor)
def test_everything_is_found(explanation: Any) -> None:
    """Each fault by its title, its name, its code and all that it says."""
    fault = explanation.fault
    for query in (fault.title, fault.name, str(fault.code or fault.name), *fault.messages):
        assert explanation in find(query), query


def test_nearest() -> None:
    """What was perhaps meant, not every code there is."""
    assert "2006 CR_SERVER_GONE_ERROR" in nearest("2006x")
    assert "1213 ER_LOCK_DEADLOCK" in nearest("ER_LOCK_DEADLCK")
    assert "too many clients already" in nearest("to many clients alredy")
    for far in ("%%%", "42", "23505", "duplicate key", "no such table", "ER_DUP_ENTRY"):
        assert nearest(far) == []
    assert len(nearest("2000")) <= 5


def explain(*arguments: str) -> str:
    out = StringIO()
    call_command("dbhealth", "explain", *arguments, stdout=out)
    return out.getvalue()


def test_text() -> None:
    """All that a newcomer needs, in lines that fit."""
    text = explain("57P05")
    assert text.startswith("57P05 idle_session_timeout (PostgreSQL)\n")
    for words in ("What to do:", "not executed", "Safe to retry: yes", "Source: measured"):
        assert words in text
    assert max(map(len, explain("1226").splitlines())) <= 88
    assert explain("Lost", "connection") == explain("Lost connection")


def test_json() -> None:
    first, second = json.loads(explain("2006", "--format", "json"))
    assert first["code"] == 2006
    assert first["outcome"] == "not executed"
    assert first["safe_to_retry"] is True
    assert first["docs"] == "docs/faults.md#fault-2006"
    assert second["variant"] == "at connect"


def test_unknown() -> None:
    """It says so, and lists the nearest; a program that reads JSON gets an empty list."""
    out = StringIO()
    with pytest.raises(CommandError, match="'2007'.* The nearest:\n  20") as caught:
        call_command("dbhealth", "explain", "2007", "--format", "json", stdout=out)
    assert caught.value.returncode == 2
    assert json.loads(out.getvalue()) == []
    with pytest.raises(CommandError) as caught:
        explain("%%%")
    assert str(caught.value) == (
        "'%%%' is not known: only errors that concern connections are listed here."
    )


# In a process of its own


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: os.environ[key] for key in os.environ if key != "DJANGO_SETTINGS_MODULE"}
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


NOWHERE = "mysql://nobody:wrong@127.0.0.1:9/none"


def test_manage_py_without_a_database() -> None:
    """No database is asked, so none is needed."""
    result = run("manage.py", "dbhealth", "explain", "2006", DATABASE_URL=NOWHERE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "2006 CR_SERVER_GONE_ERROR" in result.stdout
    unknown = run("manage.py", "dbhealth", "explain", "424242", DATABASE_URL=NOWHERE)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "only errors that concern connections" in unknown.stderr


@pytest.mark.parametrize("settings", ["", "no.such.module"])
def test_module_without_settings(settings: str) -> None:
    """python -m works where no project is, or one that is broken."""
    environment = {"DJANGO_SETTINGS_MODULE": settings} if settings else {}
    result = run("-m", "django_dbhealth", "explain", "gone", "away", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "2006 CR_SERVER_GONE_ERROR" in result.stdout
    assert run("-m", "django_dbhealth", "explain", "424242", **environment).returncode == 2


def test_help() -> None:
    """It teaches by examples, each of which works."""
    result = run("-m", "django_dbhealth", "explain", "--help")
    assert result.returncode == 0
    examples = [
        line.split(maxsplit=2)[2]
        for line in result.stdout.splitlines()
        if "  dbhealth explain" in line
    ]
    assert len(examples) >= 4
    for example in examples:
        assert find(example), example
    assert run("-m", "django_dbhealth", "explain").returncode == 2


def test_output_in_ascii() -> None:
    """A terminal without Unicode can show everything."""
    for each in explanations():
        each.in_words().encode("ascii")
