"""What the subcommands have in common: where they write, and whom they ask."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from django_dbhealth.management.screen import Column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from django_dbhealth.asking import Target
    from django_dbhealth.management.output import PatientOutput
    from django_dbhealth.management.screen import Screen
    from django_dbhealth.processes import Holding, Process
    from django_dbhealth.report import Problem

LINES_AT_A_TIME = 50


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a subcommand. ``failures`` are the sentences for standard error at its end."""

    out: PatientOutput
    err: PatientOutput
    screen: Screen
    as_json: bool
    targets: Sequence[Target]
    failures: list[str] = field(default_factory=list)

    def fail(self, target: Target, problem: Problem) -> None:
        """Note that a database could not be asked."""
        self.failures.append(f"The database {target.alias!r} cannot be asked: {problem}")

    def print_json(self, value: object) -> None:
        self.out.write(json.dumps(value, indent=2))

    def print_json_list(self, items: Iterable[object]) -> None:
        """Write the items as they come, with what a JSON array has between them.

        Some at a time: with PYTHONUNBUFFERED each write is a call of the system.
        """
        lines = map(json.JSONEncoder(check_circular=False).encode, items)
        separator = "\n"
        while some := list(islice(lines, LINES_AT_A_TIME)):
            self.out.write(separator + ",\n".join(some), ending="")
            separator = ",\n"

    def has_reader(self) -> bool:
        """Return whether somebody reads the output."""
        return not self.out.is_given_up


# What somebody types


def seconds(text: str) -> float:
    """Return a number of seconds; what is none is wrong usage."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"write a number of seconds, 0 or more, not {text!r}")
    return value


def count(text: str) -> int:
    """Return a number of things, at least one; what is none is wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"write a whole number, 1 or more, not {text!r}")
    return int(text)


# What is shown


def duration(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def process_words(processes: Sequence[Process]) -> str:
    """Return the processes of a session; after a fork several hold one socket."""
    if not processes:
        return "unknown"
    first = processes[0]
    others = f" (and {len(processes) - 1} more)" if len(processes) > 1 else ""
    return f"{first.pid} {first.command}{others}"


HOLDINGS = (
    Column("PID", is_number=True),
    Column("USER"),
    Column("SOCKETS", is_number=True),
    Column("COMMAND", is_flexible=True),
)


def print_holdings(screen: Screen, holdings: Sequence[Holding]) -> None:
    """Write which processes of this machine have sockets to a server."""
    if not holdings:
        screen.line("  none that can be seen")
        return
    screen.table(HOLDINGS, [_holding_row(*holding) for holding in holdings])


def _holding_row(process: Process | None, sockets: int) -> list[str]:
    if process is None:
        return ["?", "?", f"{sockets}", "unknown"]
    return [f"{process.pid}", process.user or "?", f"{sockets}", process.command]
