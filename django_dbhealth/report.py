"""What the dbhealth command has to say: plain data, and the dicts that JSON is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from django.core.checks import ERROR
from django.db import connections

from .checks import databases_in
from .conf import get_config
from .diagnosis import classify
from .faults import Kind
from .health import Status
from .live_checks import find_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from django.core.checks import CheckMessage

    from .processes import Holding, Process
    from .vendors.server import ServerState, Session

STATEMENT_LENGTH = 1_000  # characters: a list of sessions is no log


# What went wrong


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a server could not be asked. ``message`` has the driver's own words, no password."""

    kind: str | None  # faults.Kind; None: an unknown error
    code: int | str | None
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message} What to do: {self.advice}" if self.advice else self.message


def problem_of(error: BaseException, alias: str, secrets: Iterable[str]) -> Problem:
    """Return what an error of a connect or a question to an alias means, without the secrets."""
    fault = classify(error, using=alias)
    words = " ".join(str(error.args[-1] if error.args else error).split())
    for secret in secrets:
        words = words.replace(secret, "***")
    if isinstance(error, TimeoutError):
        return Problem(
            kind=Kind.UNREACHABLE.value,
            code=None,
            message=_sentence(words),
            advice="See whether the server runs, and whether something on the way drops packets.",
        )
    if fault is None:
        name = type(error).__name__
        return Problem(kind=None, code=None, message=f"{name}: {words}", advice="")
    return Problem(
        kind=fault.kind.value,
        code=fault.code,
        message=f"{fault.title}: {_sentence(words)}" if fault.code else _sentence(words),
        advice=fault.advice,
    )


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."


# Who uses the server


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sessions that have something in common."""

    value: tuple[str | None, ...]
    sessions: int
    longest_idle_seconds: float | None


@dataclass
class _Sum:
    sessions: int = 0
    longest_idle: float | None = None

    def add(self, session: Session) -> None:
        self.sessions += 1
        if session.idle_seconds is not None:
            self.longest_idle = max(session.idle_seconds, self.longest_idle or 0.0)


def grouped(
    sessions: Iterable[Session], value_of: Callable[[Session], tuple[str | None, ...]]
) -> list[Group]:
    """Return the sessions counted by a value, the most frequent first."""
    sums: dict[tuple[str | None, ...], _Sum] = {}
    for session in sessions:
        sums.setdefault(value_of(session), _Sum()).add(session)
    groups = [
        Group(value=value, sessions=each.sessions, longest_idle_seconds=each.longest_idle)
        for value, each in sums.items()
    ]
    return sorted(groups, key=lambda group: group.sessions, reverse=True)


# One database


@dataclass(frozen=True, kw_only=True)
class DatabaseReport:
    """All that is known of one database. ``through`` is the alias whose account asked."""

    alias: str
    through: str
    server: ServerState | None = None
    round_trip_ms: float | None = None
    in_use: Sequence[Group] = ()  # by user and host
    processes: Sequence[Holding] = ()  # of this machine, with sockets to the server
    findings: Sequence[CheckMessage] = ()
    problem: Problem | None = None

    @property
    def status(self) -> Status:
        if self.problem or any(finding.level >= ERROR for finding in self.findings):
            return Status.FAIL
        is_read_only = self.server is not None and self.server.is_read_only
        return Status.WARN if self.findings or is_read_only else Status.PASS

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.problem:
            return f"Unhealthy: {self.problem.message}"
        reasons = []
        if self.server and self.server.is_read_only:
            reasons.append("it is read-only")
        if self.findings:
            ids = ", ".join(str(finding.id).rpartition(".")[2] for finding in self.findings)
            reasons.append(f"see {ids} above")
        words = {Status.PASS: "Healthy", Status.WARN: "Healthy, but", Status.FAIL: "Unhealthy:"}
        return " ".join([words[self.status], " and ".join(reasons)]).strip() + "."

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "alias": self.alias,
            "through": self.through,
            "status": self.status.name.lower(),
            "verdict": self.verdict,
            "server": server_dict(self.server),
            "round_trip_ms": self.round_trip_ms,
            "in_use": [
                {"user": group.value[0], "host": group.value[1], **group_dict(group)}
                for group in self.in_use
            ],
            "processes": [holding_dict(holding) for holding in self.processes],
            "findings": [finding_dict(finding) for finding in self.findings],
            "error": asdict(self.problem) if self.problem else None,
        }


def findings_about(alias: str, state: ServerState) -> list[CheckMessage]:
    """Return what the checks say of the alias's settings, with what its server has said."""
    databases = databases_in({alias: connections.settings[alias]}, get_config())
    return [finding for database in databases for finding in find_all(database, state)]


# Its parts, for JSON


def server_dict(state: ServerState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    return {
        "product": state.product,
        "version": state.version,
        "user": state.user,
        "is_read_only": state.is_read_only,
        "proxy": state.proxy,
        "is_pooled": state.is_pooled,
        "timeouts": dict(state.timeouts),
        "idle_timeout": state.idle_timeout,
        "limits": [asdict(limit) for limit in state.limits],
        "unseen": list(state.unseen),
    }


def session_dict(session: Session, processes: Sequence[Process]) -> dict[str, Any]:
    return {
        "id": session.id,
        "user": session.user,
        "host": session.host,
        "port": session.port,
        "database": session.database,
        "state": session.state,
        "idle_seconds": session.idle_seconds,
        "statement": session.statement[:STATEMENT_LENGTH] if session.statement else None,
        "is_replication": session.is_replication,
        "is_own": session.is_own,
        "processes": [process_dict(process) for process in processes],
    }


def process_dict(process: Process) -> dict[str, Any]:
    return {"pid": process.pid, "user": process.user, "command": process.command}


def holding_dict(holding: Holding) -> dict[str, Any]:
    process = process_dict(holding.process) if holding.process else None
    return {"process": process, "sockets": holding.sockets}


def group_dict(group: Group) -> dict[str, Any]:
    return {"sessions": group.sessions, "longest_idle_seconds": group.longest_idle_seconds}


def finding_dict(finding: CheckMessage) -> dict[str, Any]:
    level = "error" if finding.level >= ERROR else "warning"
    return {"id": finding.id, "level": level, "message": finding.msg, "hint": finding.hint}
