"""``dbhealth connections``: the server's own list of sessions, and whose they are."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from django_dbhealth.asking import FAILURES
from django_dbhealth.management.screen import Column
from django_dbhealth.processes import why_unknown
from django_dbhealth.report import group_dict, grouped, holding_dict, server_dict, session_dict

from .base import duration, print_holdings, process_words, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from django_dbhealth.asking import Server, Target
    from django_dbhealth.processes import Locator, Process, Sockets
    from django_dbhealth.report import Problem
    from django_dbhealth.vendors.server import ServerState, Session

    from .base import Run

HELP = "the server's own list of sessions, and the local process behind each"
DESCRIPTION = """\
Shows the sessions that the server has, with the process of this machine that
holds each, where that can be known. An account without the right to see
others' sessions sees its own.

  dbhealth connections --database default
  dbhealth connections --idle-over 60
  dbhealth connections --by host
  dbhealth connections --watch 5

Exit status: 0 every server was asked, 1 one could not be, 2 wrong usage.
"""
WATCH_EVERY = 2.0  # seconds

VALUES: dict[str, Callable[[Session], tuple[str | None, ...]]] = {
    "host": lambda session: (session.host,),
    "user": lambda session: (session.user,),
    "state": lambda session: (session.state,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--idle-over",
        type=seconds,
        metavar="SECONDS",
        help="only sessions that have been idle for longer",
    )
    parser.add_argument("--by", choices=tuple(VALUES), help="count them instead of listing them")
    parser.add_argument(
        "--watch",
        type=_interval,
        nargs="?",
        const=WATCH_EVERY,
        metavar="SECONDS",
        help=f"look again and again, every {WATCH_EVERY:g} seconds or as many as are given",
    )


def _interval(text: str) -> float:
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("write a number of seconds above 0")
    return value


def run(
    run: Run, *, idle_over: float | None, by: str | None, watch: float | None, **options: Any
) -> None:
    """Show the sessions of each database, once or until nobody reads on."""
    look = _print_json if run.as_json else _print_text
    look(run, Wanted(idle_over=idle_over, by=by))
    while watch is not None and run.has_reader():
        time.sleep(watch)
        run.failures.clear()
        if not run.as_json:
            run.screen.clear()
        look(run, Wanted(idle_over=idle_over, by=by))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which sessions, and whether they are to be counted."""

    idle_over: float | None
    by: str | None

    def among(self, sessions: Iterable[Session]) -> Iterator[Session]:
        return (each for each in sessions if is_idle_over(each, self.idle_over))


def is_idle_over(session: Session, limit: float | None) -> bool:
    return limit is None or (session.idle_seconds is not None and session.idle_seconds > limit)


class Found:
    """The sessions of one server, with their processes; what was not found is remembered."""

    def __init__(
        self, server: Server, state: ServerState, sockets: Future[Sockets], wanted: Wanted
    ) -> None:
        self._server = server
        self._state = state
        self._sockets = sockets
        self._sessions = wanted.among(server.sessions())
        self.has_unknown = False
        self.has_unknown_without_port = False

    @cached_property
    def _locator(self) -> Locator:
        return self._server.locator(self._state, self._sockets.result())

    def __iter__(self) -> Iterator[tuple[Session, list[Process]]]:
        for session in self._sessions:  # the server is asked before the sockets are waited for
            processes = self._locator.processes_of(session)
            if not processes:
                self.has_unknown = True
                self.has_unknown_without_port |= session.port is None
            yield session, processes


# Text


COLUMNS = (
    Column("ID", is_number=True),
    Column("USER"),
    Column("HOST"),
    Column("DATABASE", needs_width=True),
    Column("STATE"),
    Column("IDLE", is_number=True),
    Column("PROCESS", is_flexible=True),
    Column("RUNS", is_flexible=True, needs_width=True),
)


def _print_text(run: Run, wanted: Wanted) -> None:
    for number, target in enumerate(run.targets):
        if number:
            run.screen.line()
        try:
            with target.asked() as server:
                _print_sessions(run, target, server, wanted)
        except FAILURES as error:
            print_problem(run, target, target.problem(error))


def _print_sessions(run: Run, target: Target, server: Server, wanted: Wanted) -> None:
    sockets = server.look_for_processes()
    state = server.state()
    title = f"{target.alias}: {product_of(state)}"
    if not server.vendor.has_server:
        run.screen.line(title, "bold")
    elif wanted.by:
        groups = grouped(wanted.among(server.sessions()), VALUES[wanted.by])
        run.screen.line(title, "bold")
        run.screen.table(
            (
                Column(wanted.by.upper()),
                Column("SESSIONS", is_number=True),
                Column("LONGEST IDLE", is_number=True),
            ),
            [
                [group.value[0] or "-", f"{group.sessions}", duration(group.longest_idle_seconds)]
                for group in groups
            ],
        )
    else:
        found = Found(server, state, sockets, wanted)
        rows = [session_row(session, processes) for session, processes in found]
        run.screen.line(f"{title}: {number_of(len(rows), 'session')}", "bold")
        if rows:
            run.screen.table(COLUMNS, rows)
        if found.has_unknown_without_port:
            run.screen.line("This machine's processes with sockets to this server:")
            print_holdings(run.screen, target.sockets())
        print_unseen(run, why_unknown() if found.has_unknown else [])
    print_unseen(run, state.unseen)


def product_of(state: ServerState) -> str:
    name = f"{state.product} {state.version}".strip()
    return f"{name}, asked as {state.user}" if state.user else name


def number_of(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def session_row(session: Session, processes: list[Process]) -> list[str]:
    return [
        f"{session.id}",
        session.user or "-",
        session.host or "-",
        session.database or "-",
        session.state,
        duration(session.idle_seconds),
        "this command" if session.is_own else process_words(processes),
        "" if session.is_own else (session.statement or "").strip(),
    ]


def print_problem(run: Run, target: Target, problem: Problem) -> None:
    """Say that a server could not be asked, and show what can be seen without it."""
    run.fail(target, problem)
    run.screen.line(f"{target.alias}: could not be asked", "bold")
    print_sockets(run, target)


def print_sockets(run: Run, target: Target) -> None:
    run.screen.line("Seen without asking, this machine's processes with sockets to the server:")
    print_holdings(run.screen, target.sockets())
    print_unseen(run, why_unknown())


def print_unseen(run: Run, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        run.screen.line(sentence, "dim")


# JSON


def _print_json(run: Run, wanted: Wanted) -> None:
    """Write each session as it comes in, so that no list of them is kept."""
    run.out.write('{"command": "connections", "databases": [', ending="")
    for number, target in enumerate(run.targets):
        run.out.write(",\n" if number else "\n", ending="")
        _print_database(run, target, wanted)
    run.out.write("\n]}")


def _print_database(run: Run, target: Target, wanted: Wanted) -> None:
    problem = None
    unseen: list[str] = []
    sockets = None
    names = {"alias": target.alias, "through": target.through, "by": wanted.by}
    run.out.write(f"{json.dumps(names)[:-1]}, ", ending="")
    key = "groups" if wanted.by else "sessions"
    run.out.write(f'"{key}": [', ending="")
    server_words = None
    try:
        with target.asked() as server:
            looked_up = server.look_for_processes()
            state = server.state()
            server_words = server_dict(state)
            unseen += state.unseen
            if wanted.by:
                run.print_json_list(_group_dicts(server, wanted))
            else:
                found = Found(server, state, looked_up, wanted)
                run.print_json_list(session_dict(*each) for each in found)
                unseen += why_unknown() if found.has_unknown else []
                if found.has_unknown_without_port:
                    sockets = target.sockets()
    except FAILURES as error:
        problem = target.problem(error)
        run.fail(target, problem)
        sockets = target.sockets()
        unseen += why_unknown()
    rest = {
        "server": server_words,
        "unseen": unseen,
        "sockets": None if sockets is None else [holding_dict(each) for each in sockets],
        "error": asdict(problem) if problem else None,
    }
    run.out.write(f"\n], {json.dumps(rest)[1:]}", ending="")


def _group_dicts(server: Server, wanted: Wanted) -> Iterator[dict[str, Any]]:
    assert wanted.by
    for group in grouped(wanted.among(server.sessions()), VALUES[wanted.by]):
        yield {"value": group.value[0], **group_dict(group)}
