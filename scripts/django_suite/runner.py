"""Django's test runner, which here writes down what becomes of each test, the guard off or on."""

# ruff: noqa: N802 - unittest's names
from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import unittest
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.utils import load_backend
from django.test.runner import DiscoverRunner

from django_suite.outcomes import (
    ERROR,
    EXPECTED_FAILURE,
    FAILED,
    PASSED,
    SKIPPED,
    STARTED,
    UNEXPECTED_SUCCESS,
)

if TYPE_CHECKING:
    from unittest import TestCase

    from django.db.backends.base.base import BaseDatabaseWrapper

GUARD = os.environ["DJANGO_SUITE_GUARD"] == "on"
OUTCOMES = os.open(os.environ["DJANGO_SUITE_OUTCOMES"], os.O_WRONLY | os.O_APPEND)


class RecordingRunner(DiscoverRunner):
    """Django's runner, with a result that writes to OUTCOMES."""

    def get_resultclass(self) -> type[unittest.TestResult]:
        return RecordingResult

    def run_tests(self, *args: Any, **kwargs: Any) -> int:
        if GUARD:
            turn_on()
        check_guard()
        failures = super().run_tests(*args, **kwargs)
        check_guard()
        write(ended=True)
        return failures


def turn_on() -> None:
    """Do what the app's ready() does; runtests.py sets INSTALLED_APPS itself."""
    from django_dbhealth.boundaries import note_opened_connections
    from django_dbhealth.handler import install_guard

    install_guard()
    note_opened_connections()


def check_guard() -> None:
    """Exit unless each connection is guarded, or is Django's own: that is what is compared."""
    for connection in connections.all():
        if is_guarded(connection) != (GUARD and connection.vendor != "sqlite"):
            problem = f"connections[{connection.alias!r}] is of {type(connection).__mro__}."
            write(problem=problem)
            sys.exit(problem)


def is_guarded(connection: BaseDatabaseWrapper) -> bool:
    engine = connection.settings_dict["ENGINE"]
    if type(connection) is load_backend(engine).DatabaseWrapper:
        return False
    from django_dbhealth.wrappers import WatchedConnection

    return isinstance(connection, WatchedConnection)


def write(**record: Any) -> None:
    # Past every buffer, and past what a test may have patched: it may fork, or end this process.
    os.write(OUTCOMES, json.dumps(record).encode() + b"\n")


class RecordingResult(unittest.TextTestResult):
    """unittest's own result; what it is told of a test it writes down too."""

    def startTest(self, test: TestCase) -> None:
        record(test, STARTED)
        super().startTest(test)

    def addSuccess(self, test: TestCase) -> None:
        record(test, PASSED)
        super().addSuccess(test)

    def addSkip(self, test: TestCase, reason: str) -> None:
        record(test, SKIPPED, reason)
        super().addSkip(test, reason)

    def addFailure(self, test: TestCase, err: Any) -> None:
        record(test, FAILED, in_words(err))
        super().addFailure(test, err)

    def addError(self, test: TestCase, err: Any) -> None:
        record(test, ERROR, in_words(err))
        super().addError(test, err)

    def addExpectedFailure(self, test: TestCase, err: Any) -> None:
        record(test, EXPECTED_FAILURE, in_words(err))
        super().addExpectedFailure(test, err)

    def addUnexpectedSuccess(self, test: TestCase) -> None:
        record(test, UNEXPECTED_SUCCESS)
        super().addUnexpectedSuccess(test)

    def addSubTest(self, test: TestCase, subtest: TestCase, err: Any) -> None:
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            description = f"{subtest._subDescription()} {in_words(err)}"
            record(test, FAILED if failed else ERROR, description)
        super().addSubTest(test, subtest, err)


def record(test: TestCase, outcome: str, reason: str = "") -> None:
    # A subtest's own id holds the repr() of its parameters, an address perhaps.
    whole = getattr(test, "test_case", test)
    write(test=whole.id(), outcome=outcome, reason=reason)


def in_words(err: Any) -> str:
    with contextlib.suppress(Exception):  # an exception whose str() raises
        return "".join(traceback.format_exception_only(*err[:2])).strip()[:500]
    return err[0].__name__
