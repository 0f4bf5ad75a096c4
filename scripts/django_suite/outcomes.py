"""What became of each test, and where two runs of the same tests differ.

A run is a file of JSON lines, written as it goes on: one when a test starts, one or more when it
ends, the last one when the run has ended or says what kept it from beginning.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

STARTED = "did not end"
PASSED = "passed"
SKIPPED = "skipped"
EXPECTED_FAILURE = "failed as expected"
UNEXPECTED_SUCCESS = "passed unexpectedly"
FAILED = "failed"
ERROR = "error"
NOT_RUN = "not run"

# A test of several subtests has several outcomes: the last one in this order counts.
ORDER = [STARTED, PASSED, SKIPPED, EXPECTED_FAILURE, UNEXPECTED_SUCCESS, FAILED, ERROR]
BAD = {STARTED, UNEXPECTED_SUCCESS, FAILED, ERROR}


@dataclass(frozen=True)
class Outcome:
    """How a test ended, and the reason: an exception's text, why it was skipped."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


class Run:
    """The outcomes of one run, by test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.ended = False
        self.problem = ""
        self.last = ""
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._times: Counter[str] = Counter()

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read what a run has written, though it may not have come to its end."""
        run = cls()
        if path.exists():
            for line in path.read_text().splitlines():
                run.add(json.loads(line))
        return run

    def add(self, record: dict[str, Any]) -> None:
        if "test" not in record:
            self.ended = "ended" in record
            self.problem = record.get("problem", "")
            return
        test, new = record["test"], Outcome(record["outcome"], record.get("reason", ""))
        self.last = test
        self._times[test] += new.name == STARTED
        # A test class that another module imports is run there too, under the same name.
        key = f"{test} #{self._times[test]}" if self._times[test] > 1 else test
        old = self.outcomes.get(key)
        if old is None or ORDER.index(new.name) > ORDER.index(old.name):
            self.outcomes[key] = new

    def of(self, test: str) -> Outcome:
        return self.outcomes.get(test, Outcome(NOT_RUN))

    def not_found(self) -> str:
        """Return why tests could not be loaded, empty where all were."""
        return "\n".join(
            outcome.reason
            for test, outcome in self.outcomes.items()
            if test.startswith("unittest.loader._FailedTest.")
        )

    def count(self, *names: str) -> int:
        return sum(outcome.name in names for outcome in self.outcomes.values())


def differences(off: Run, on: Run) -> list[str]:
    """Return the tests that did not end in the same way."""
    return [
        test
        for test in sorted({*off.outcomes, *on.outcomes})
        if off.of(test).name != on.of(test).name
    ]


def fails_in_both(off: Run, on: Run) -> list[str]:
    """Return the tests that failed, the same way in both."""
    return [
        test
        for test, outcome in sorted(off.outcomes.items())
        if outcome.name in BAD and on.of(test).name == outcome.name
    ]
