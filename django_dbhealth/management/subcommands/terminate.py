"""``dbhealth terminate``: ends idle sessions from the server's side, after a question."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError
from django.db import connections

from django_dbhealth.asking import FAILURES
from django_dbhealth.conf import config_for
from django_dbhealth.report import session_dict

from .base import count, seconds
from .connections import (
    COLUMNS,
    is_idle_over,
    number_of,
    print_problem,
    print_unseen,
    product_of,
    session_row,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from django_dbhealth.asking import Server, Target
    from django_dbhealth.processes import Process
    from django_dbhealth.report import Problem
    from django_dbhealth.vendors.server import ServerState, Session

    from .base import Run

HELP = "end sessions that have been idle for too long, from the server's side"
DESCRIPTION = """\
Ends the sessions that have been idle for longer than so many seconds; asks
first. Only those of the account that is asked for, never replication's, never
its own. A transaction that such a session has open is rolled back.

  dbhealth terminate --idle-over 600 --dry-run
  dbhealth terminate --idle-over 600 --limit 5
  dbhealth terminate --idle-over 600 --no-input

It refuses to work through a pooler, whose sessions are used by many clients in
turn.

Exit status: 0 done, also if there was nothing to do; 1 a server could not be
asked, or refused to end a session; 2 wrong usage, a pooler, or nobody to
answer the question.
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--idle-over",
        type=seconds,
        required=True,
        metavar="SECONDS",
        help="those that have been idle for longer",
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", help="at most so many, longest idle first"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say which they are")
    parser.add_argument("--all-users", action="store_true", help="other accounts' sessions too")
    parser.add_argument(
        "--noinput",
        "--no-input",
        action="store_false",
        dest="interactive",
        help="do not ask first",
    )


def run(
    run: Run,
    *,
    idle_over: float,
    limit: int | None,
    dry_run: bool,
    all_users: bool,
    interactive: bool,
    **options: Any,
) -> None:
    """Look, ask, look again, end."""
    wanted = Wanted(idle_over=idle_over, limit=limit, all_users=all_users)
    asks = interactive and not dry_run
    if asks and run.as_json:
        raise CommandError("With --format json add --noinput or --dry-run.", returncode=2)
    for target in run.targets:
        _refuse_pooler(target)
    endings = [_end(run, target, wanted, asks=asks, dry_run=dry_run) for target in run.targets]
    if run.as_json:
        run.print_json({"command": "terminate", "databases": [each.as_dict() for each in endings]})


def _refuse_pooler(target: Target, state: ServerState | None = None) -> None:
    poolers = {config_for(target.alias).pooler, config_for(target.through).pooler} - {None}
    if poolers or (state and state.is_pooled):
        raise CommandError(
            f"{target.alias!r} is reached through a pooler, so no session is terminated: it would "
            "hit whichever client is using it. Name an alias that leads to the server itself.",
            returncode=2,
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which sessions are to be ended."""

    idle_over: float
    limit: int | None
    all_users: bool

    def among(self, server: Server, target: Target) -> list[Session]:
        """Return them, the longest idle first."""
        sessions = list(server.sessions())
        account = _account(target, sessions)
        found = [
            session
            for session in sessions
            if is_idle_over(session, self.idle_over)
            and not session.is_own
            and not session.is_replication
            and (self.all_users or session.user == account)
        ]
        found.sort(key=lambda session: session.idle_seconds or 0.0, reverse=True)
        return found[: self.limit]


@dataclass(kw_only=True)
class Ending:
    """What became of the sessions of one database."""

    target: Target
    found: list[tuple[Session, list[Process]]]
    results: dict[int, str]
    problem: Problem | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "alias": self.target.alias,
            "through": self.target.through,
            "sessions": [
                {**session_dict(*each), "result": self.results.get(each[0].id, KEPT)}
                for each in self.found
            ],
            "error": asdict(self.problem) if self.problem else None,
        }


TERMINATED, GONE, KEPT, DRY_RUN = "terminated", "gone", "kept", "dry run"


def _end(run: Run, target: Target, wanted: Wanted, *, asks: bool, dry_run: bool) -> Ending:
    ending = Ending(target=target, found=[], results={})
    try:
        _look(run, ending, wanted)
        if dry_run:
            ending.results = dict.fromkeys((each.id for each, _ in ending.found), DRY_RUN)
        elif ending.found and (not asks or _is_confirmed(run, ending)):
            _look_again_and_end(ending, wanted)
    except FAILURES as error:
        ending.problem = target.problem(error)
        _print_failure(run, ending)
    if not run.as_json and ending.found:
        run.screen.line(_summary(ending), "bold")
    return ending


def _look(run: Run, ending: Ending, wanted: Wanted) -> None:
    with ending.target.asked() as server:
        sockets = server.look_for_processes()
        state = server.state()
        _refuse_pooler(ending.target, state)
        locator = server.locator(state, sockets.result())
        ending.found = [
            (session, locator.processes_of(session))
            for session in wanted.among(server, ending.target)
        ]
    if run.as_json:
        return
    number = number_of(len(ending.found), "session") if ending.found else "no session"
    run.screen.line(
        f"{ending.target.alias}: {product_of(state)}: {number} to terminate, idle "
        f"for more than {wanted.idle_over:g} s",
        "bold",
    )
    print_unseen(run, state.unseen)
    if ending.found:
        run.screen.table(COLUMNS, [session_row(*each) for each in ending.found])


def _account(target: Target, sessions: list[Session]) -> str | None:
    """Return the account that is asked for, as sessions name it; another one may be asking."""
    own = next((session.user for session in sessions if session.is_own), None)
    if target.alias == target.through:
        return own
    return str(connections.settings[target.alias]["USER"]) or own


def _is_confirmed(run: Run, ending: Ending) -> bool:
    run.out.flush()
    run.err.write(f"Terminate {number_of(len(ending.found), 'session')}? [y/N] ", ending="")
    run.err.flush()
    answer = sys.stdin.readline() if sys.stdin else ""
    if not answer:
        run.err.write()
        raise CommandError(
            "Nothing was terminated: nobody answers here. --noinput does not ask.", returncode=2
        )
    return answer.strip().lower() in ("y", "yes")


def _look_again_and_end(ending: Ending, wanted: Wanted) -> None:
    """End those that are still there and still idle: the answer may have taken a while."""
    with ending.target.asked() as server:
        again = Wanted(idle_over=wanted.idle_over, limit=None, all_users=wanted.all_users)
        idle = {session.id for session in again.among(server, ending.target)}
        for session, _ in ending.found:
            if session.id in idle:
                is_ended = server.terminate(session.id)
                ending.results[session.id] = TERMINATED if is_ended else GONE


def _print_failure(run: Run, ending: Ending) -> None:
    assert ending.problem
    if ending.found or run.as_json:
        run.fail(ending.target, ending.problem)
    else:
        print_problem(run, ending.target, ending.problem)


def _summary(ending: Ending) -> str:
    results = [ending.results.get(session.id, KEPT) for session, _ in ending.found]
    if DRY_RUN in results:
        return "Nothing was terminated: a dry run."
    words = [f"Terminated {number_of(results.count(TERMINATED), 'session')}."]
    if gone := results.count(GONE):
        words.append(f"{gone} had ended already.")
    if TERMINATED in results and (kept := results.count(KEPT)):
        words.append(f"{kept} were used meanwhile, or not reached.")
    return " ".join(words)
