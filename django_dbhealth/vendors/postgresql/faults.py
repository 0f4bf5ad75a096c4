"""What the errors of PostgreSQL mean: one line for each, beside what proves it.

The names are those of the manual's appendix A. An error at connect has no SQLSTATE for a client:
only its text tells, the server's in English, or libpq's. The first line that fits an error counts.
"""

from __future__ import annotations

from functools import partial

from django_dbhealth.faults import Fault, Kind, KnownFault, Outcome

_refusal = partial(Fault, code=None, outcome=Outcome.NOT_EXECUTED, connection_usable=False)


def _full(text: str, meaning: str) -> KnownFault:
    fault = _refusal(
        kind=Kind.NO_FREE_SLOT,
        name=text,
        meaning=meaning,
        advice="Give connections back while nobody uses them.",
        source="src/backend/utils/init/postinit.c",
    )
    return KnownFault(fault=fault, text=text)


def _unreachable(text: str) -> KnownFault:
    fault = _refusal(
        kind=Kind.UNREACHABLE,
        name=text,
        meaning="No server answers, or it hung up before it took the connection.",
        advice="Is the server running, and does the address stand for it?",
        source="src/interfaces/libpq/fe-connect.c",
    )
    return KnownFault(fault=fault, text=text, connecting=True)


def _credentials(text: str) -> KnownFault:
    fault = _refusal(
        kind=Kind.CREDENTIALS,
        name=text,
        meaning="The server does not let this account in.",
        advice="Check the account, its password and the database's name.",
        source="src/backend/libpq/auth.c",
    )
    return KnownFault(fault=fault, text=text, connecting=True)


FAULTS = (
    # At connect. A refusal of one of several hosts may stand beside another host's.
    *map(
        _credentials,
        ("authentication failed", "does not exist", "no pg_hba.conf entry"),
    ),
    _full("too many clients already", "The server has as many connections open as it may have."),
    _full("remaining connection slots are reserved", "Only the reserved slots are free."),
    _full("too many connections for", "The role or the database has no free slot."),
    _full("no more connections allowed", "PgBouncer takes no more connections."),
    _full("couldn't get a connection after", "All connections of Django's pool are in use."),
    *map(
        _unreachable,
        (
            "the database system is",  # starting up, shutting down, in recovery
            "Connection refused",
            "No such file or directory",  # of the unix socket
            "Connection reset by peer",
            "Connection timed out",
            "Network is unreachable",
            "No route to host",
            "server closed the connection",
            "timeout expired",
        ),
    ),
)
