"""``dbhealth wait``: until the database answers."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from django_dbhealth.asking import FAILURES
from django_dbhealth.diagnosis import classify
from django_dbhealth.faults import Kind
from django_dbhealth.management.screen import in_lines

from .base import duration, seconds

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from django_dbhealth.asking import Target
    from django_dbhealth.report import Problem

    from .base import Run

HELP = "wait until the database answers"
DESCRIPTION = """\
Returns as soon as each database answers. A server that is down, starts, hangs
or has no free slot is waited for; wrong credentials, or a database that does
not exist, end it at once.

  dbhealth wait --timeout 60 && ./serve

Exit status: 0 they answer, 1 one did not in time or refused the account, 2
wrong usage.
"""
TIMEOUT = 60.0  # seconds
PAUSE = 0.25  # seconds
LEAST = 1.0  # seconds that a try may take, also where less is left
WORTH_WAITING = (Kind.UNREACHABLE, Kind.NO_FREE_SLOT, Kind.LOST)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"for how long, for all databases together (default: {TIMEOUT:g})",
    )


def run(run: Run, *, timeout: float, **options: Any) -> None:
    """Wait for one database after the other."""
    began = time.monotonic()
    found = []
    for target in run.targets:
        problem = _wait(run, target, deadline=began + timeout)
        waited = time.monotonic() - began
        if problem:
            run.fail(target, problem)
        elif not run.as_json:
            run.screen.line(f"{target.alias}: answers, after {duration(waited)}")
        found.append(_as_dict(target, waited, problem))
    if run.as_json:
        run.print_json({"command": "wait", "databases": found})


def _as_dict(target: Target, waited: float, problem: Problem | None) -> dict[str, Any]:
    return {
        "alias": target.alias,
        "through": target.through,
        "answers": problem is None,
        "waited_seconds": waited,
        "error": asdict(problem) if problem else None,
    }


def _wait(run: Run, target: Target, deadline: float) -> Problem | None:
    """Return why the database does not answer, None once it does."""
    has_told = False
    while True:
        try:
            with target.asked(timeout=max(LEAST, deadline - time.monotonic())) as server:
                server.ping_ms()
                return None
        except FAILURES as error:
            left = deadline - time.monotonic()
            if left <= 0 or not _is_worth_waiting(error, target):
                return target.problem(error)
            if not has_told:
                reason = target.problem(error).message
                sentence = f"Waiting for {target.alias!r}, for up to {left:.0f} s: {reason}"
                run.err.write(in_lines(sentence, run.err))
                has_told = True
        time.sleep(min(PAUSE, left))


def _is_worth_waiting(error: BaseException, target: Target) -> bool:
    fault = classify(error, using=target.through)
    if fault is None:
        return isinstance(error, TimeoutError)
    return fault.kind in WORTH_WAITING
