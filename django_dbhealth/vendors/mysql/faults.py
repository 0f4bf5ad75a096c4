"""What the errors of MySQL and MariaDB mean: one line for each, beside what proves it.

The names are those of the manuals: server error message reference, client error message reference.
The first line that fits an error counts.
"""

from __future__ import annotations

from functools import partial

from django_dbhealth.faults import Fault, Kind, KnownFault, Outcome

MANUAL = "manual: server error message reference"
CLIENT_MANUAL = "manual: client error message reference"

_refusal = partial(Fault, outcome=Outcome.NOT_EXECUTED, connection_usable=False)

FAULTS = (
    # At connect
    KnownFault(
        fault=_refusal(
            kind=Kind.NO_FREE_SLOT,
            code=1226,
            name="ER_USER_LIMIT_REACHED",
            meaning="The account has as many connections open as it may have at once.",
            advice="Give connections back while nobody uses them.",
            source=MANUAL,
        ),
        text="max_user_connections",
    ),
    KnownFault(
        fault=_refusal(
            kind=Kind.NO_FREE_SLOT,
            code=1040,
            name="ER_CON_COUNT_ERROR",
            meaning="The server has as many connections open as it may have at once.",
            advice="Give connections back while nobody uses them.",
            source=MANUAL,
        ),
    ),
    KnownFault(
        fault=_refusal(
            kind=Kind.NO_FREE_SLOT,
            code=1203,
            name="ER_TOO_MANY_USER_CONNECTIONS",
            meaning="The account has as many connections open as the server allows to any account.",
            advice="Give connections back while nobody uses them.",
            source=MANUAL,
        ),
    ),
    *(
        KnownFault(
            fault=_refusal(
                kind=Kind.UNREACHABLE,
                code=code,
                name=name,
                meaning="No server answers, or it hung up before it took the connection.",
                advice="Is the server running, and does the address stand for it?",
                source=CLIENT_MANUAL,
            ),
            connecting=True,
        )
        for code, name in (
            (1053, "ER_SERVER_SHUTDOWN"),
            (2002, "CR_CONNECTION_ERROR"),
            (2003, "CR_CONN_HOST_ERROR"),
            (2006, "CR_SERVER_GONE_ERROR"),
            (2013, "CR_SERVER_LOST"),
        )
    ),
)
