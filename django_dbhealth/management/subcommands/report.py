"""``dbhealth report``: each server, its limits and timeouts, who uses it, and a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.checks import ERROR

from django_dbhealth.asking import FAILURES
from django_dbhealth.health import Status
from django_dbhealth.management.screen import Column
from django_dbhealth.report import DatabaseReport, findings_about, grouped

from .base import duration, print_holdings
from .connections import print_sockets, print_unseen, product_of

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable

    from django_dbhealth.asking import Target
    from django_dbhealth.management.screen import Screen
    from django_dbhealth.vendors.server import Limit, ServerState

    from .base import Run

HELP = "each server, its limits and timeouts, who uses it, and a verdict (the default)"
DESCRIPTION = """\
Shows for each database: the server, its limits and timeouts, how many sessions
it has and whose they are, how long a round trip takes, the settings that do
not fit, and a verdict.

  dbhealth report
  dbhealth report --database default --format json

Exit status: 0 healthy, also with warnings; 1 a server is unreachable or
refuses the account, or the settings cannot work; 2 wrong usage.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Nothing but what every subcommand takes."""


def run(run: Run, **options: Any) -> None:
    """Report on each database."""
    reports = []
    for number, target in enumerate(run.targets):
        report = report_of(target)
        reports.append(report)
        if report.problem:
            run.fail(target, report.problem)
        elif report.status is Status.FAIL:
            run.failures.append(f"The database {target.alias!r} is unhealthy.")
        if not run.as_json:
            if number:
                run.screen.line()
            print_report(run, target, report)
    if run.as_json:
        is_healthy = not run.failures
        databases = [report.as_dict() for report in reports]
        run.print_json({"command": "report", "healthy": is_healthy, "databases": databases})


def report_of(target: Target) -> DatabaseReport:
    """Ask a database for all that a report has."""
    try:
        with target.asked() as server:
            round_trip = server.round_trip_ms()
            state = server.state()
            in_use = grouped(server.sessions(), lambda session: (session.user, session.host))
    except FAILURES as error:
        return DatabaseReport(
            alias=target.alias,
            through=target.through,
            processes=target.sockets(),
            problem=target.problem(error),
        )
    return DatabaseReport(
        alias=target.alias,
        through=target.through,
        server=state,
        round_trip_ms=round_trip,
        in_use=in_use,
        processes=target.sockets(),
        findings=findings_about(target.alias, state),
    )


# Text

STYLES = {Status.PASS: "bold green", Status.WARN: "bold yellow", Status.FAIL: "bold red"}

TIMEOUTS = (Column("TIMEOUT"), Column("SECONDS", is_number=True))
LIMITS = (
    Column("LIMIT"),
    Column("OF THE"),
    Column("IN USE", is_number=True),
    Column("AT MOST", is_number=True),
)
IN_USE = (
    Column("USER"),
    Column("HOST", is_flexible=True),
    Column("SESSIONS", is_number=True),
    Column("LONGEST IDLE", is_number=True),
)


def print_report(run: Run, target: Target, report: DatabaseReport) -> None:
    if report.server is None:
        run.screen.line(f"{report.alias}: could not be asked", "bold")
        print_sockets(run, target)
    else:
        _print_server(run, report, report.server)
    _print_findings(run.screen, report)
    run.screen.line(report.verdict, STYLES[report.status])


def _print_server(run: Run, report: DatabaseReport, state: ServerState) -> None:
    screen = run.screen
    through = f", through {report.through!r}" if report.through != report.alias else ""
    screen.line(f"{report.alias}: {product_of(state)}{through}", "bold")
    if report.round_trip_ms is not None:
        screen.line(f"A round trip takes {report.round_trip_ms:.2f} ms.")
    if state.proxy:
        screen.line(state.proxy)
    if state.timeouts:
        screen.line()
        screen.table(TIMEOUTS, _timeout_rows(state))
    if state.limits:
        screen.line()
        screen.table(LIMITS, _limit_rows(state.limits))
    if report.in_use:
        screen.line()
        screen.table(
            IN_USE,
            [
                [
                    user or "-",
                    host or "-",
                    f"{group.sessions}",
                    duration(group.longest_idle_seconds),
                ]
                for group in report.in_use
                for user, host in [group.value]
            ],
        )
    if report.processes:
        screen.line()
        screen.line("This machine's processes with sockets to it, without this command:")
        print_holdings(screen, report.processes)
    screen.line()
    print_unseen(run, state.unseen)


def _timeout_rows(state: ServerState) -> list[list[str]]:
    return [
        [
            f"{name} *" if name == state.idle_timeout else name,
            "none" if value is None else f"{value:g}",
        ]
        for name, value in state.timeouts.items()
    ]


def _limit_rows(limits: Iterable[Limit]) -> list[list[str]]:
    return [
        [
            limit.name,
            limit.scope,
            "unknown" if limit.used is None else f"{limit.used}",
            "no limit" if limit.maximum is None else f"{limit.maximum}",
        ]
        for limit in limits
    ]


def _print_findings(screen: Screen, report: DatabaseReport) -> None:
    for finding in report.findings:
        style = "red" if finding.level >= ERROR else "yellow"
        screen.line(f"{finding.id}: {finding.msg}", style)
        screen.line(f"  {finding.hint}")
    if report.findings:
        screen.line()
