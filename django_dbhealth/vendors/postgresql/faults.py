"""What the errors of PostgreSQL mean: a few lines for each, beside what proves it.

The names are those of the manual's appendix A. Where there is no SQLSTATE (at connect, and where
only libpq or the driver speaks) the text tells: the server's in its languages, theirs in English.
The first line that fits an error counts, and so it does of two where nobody knows whether a
connection was being opened.
"""

from __future__ import annotations

from functools import partial

from django_dbhealth.faults import (
    AFTER_A_PAUSE,
    CHECK_THE_SERVER,
    PAUSE_OUTSIDE,
    Fault,
    Kind,
    Outcome,
    known,
)

from .messages import (
    NOT_READY,
    SLOTS_ARE_RESERVED,
    TERMINATING,
    TOO_MANY_CLIENTS,
    TOO_MANY_CONNECTIONS,
)

MEASURED = "measured: PostgreSQL 15, psycopg 3.3, psycopg2 2.9"
MEASURED_PSYCOPG = "measured: PostgreSQL 15, psycopg 3.3"
MANUAL = "manual: appendix A, error codes"
BY_TEXT = ", by its text"

_refused = partial(Fault, outcome=Outcome.NOT_EXECUTED, connection_usable=False)
_lost = partial(Fault, kind=Kind.LOST, connection_usable=False)
_may_have_run = partial(
    _lost,
    outcome=Outcome.UNKNOWN,
    advice="Look whether its effect is there before you do it again.",
)
_alive = partial(Fault, outcome=Outcome.NOT_EXECUTED, connection_usable=True)
_conflict = partial(Fault, kind=Kind.CONFLICT, connection_usable=True)

_no_slot = partial(
    _refused,
    kind=Kind.NO_FREE_SLOT,
    advice="Give connections back while nobody uses them: CONN_MAX_AGE = 0, or connections_released"
    " around slow work. manage.py dbhealth connections shows who holds them.",
)
_unreachable = partial(_refused, kind=Kind.UNREACHABLE, advice=CHECK_THE_SERVER)
_refused_account = partial(_refused, kind=Kind.CREDENTIALS)

_CLOSED_AT_CONNECT = _unreachable(
    name="server closed the connection",
    variant="at connect",
    meaning="Something accepted the connection and then hung up: a server that starts or"
    " stops, or a proxy with none behind it.",
    source=MEASURED + BY_TEXT,
)

FAULTS = (
    # In use, by text. Before the refusals: where nobody knows, what may have run comes first.
    known(
        _alive(
            kind=Kind.BUSY,
            name="another command is already in progress",
            meaning="An exception of the program has left an earlier statement unfinished on this"
            " connection; this one was not sent.",
            advice="Close the connection; the next use opens another one.",
            source=MEASURED_PSYCOPG + BY_TEXT,
        ),
        "another command is already in progress",
    ),
    known(
        _alive(
            kind=Kind.BUSY,
            name="no COPY in progress",
            variant="psycopg 3",
            meaning="Data of a COPY were written or read where there is none; nothing was sent.",
            advice="Write and read inside the block of cursor.copy(), in the COPY's direction.",
            source=MEASURED_PSYCOPG + BY_TEXT,
        ),
        "no COPY in progress",
    ),
    known(
        _alive(
            kind=Kind.TOO_LARGE,
            name="number of parameters must be between",
            variant="psycopg 3",
            meaning="The statement has more parameters than the protocol can count, 65,535; it was"
            " not sent.",
            advice="Give bulk_create() a batch_size, or pass a list as one parameter: = ANY(%s).",
            source=MEASURED_PSYCOPG + BY_TEXT,
        ),
        "number of parameters must be between",
    ),
    known(
        _may_have_run(
            name="consuming input failed",
            variant="psycopg 3",
            meaning="The connection broke before the answer was there (the server crashed, a proxy"
            " or firewall cut it): the statement may have run.",
            source=MEASURED_PSYCOPG + BY_TEXT,
        ),
        "consuming input failed",
        "receiving copy data failed",
    ),
    known(
        _may_have_run(
            name="connection socket closed",
            variant="psycopg 3",
            meaning="The connection broke while psycopg waited for the answer: the statement may"
            " have run.",
            source="source code: psycopg 3, waiting.py" + BY_TEXT,
        ),
        "connection socket closed",
        "the connection is lost",
        connecting=False,
    ),
    known(
        _may_have_run(
            name="sending query failed",
            variant="psycopg 3",
            meaning="The connection broke while the statement, or the data of a COPY, was being"
            " sent: it may have run.",
            source=MEASURED_PSYCOPG + BY_TEXT,
        ),
        "sending query failed",
        "sending query and params failed",
        "sending prepared query failed",
        "sending copy data failed",
        "sending copy end failed",
        "sending describe prepared failed",
        "sending describe portal failed",
        "sending close prepared failed",
        "sending close portal failed",
        "flush request failed",
        "flushing failed",
        "failed to sync pipeline",
    ),
    known(
        _lost(
            name="connection is closed",
            outcome=Outcome.NOT_EXECUTED,
            meaning="The driver has closed this connection already, after an error or because the"
            " program said so.",
            advice="Look for the error before this one. connection.close() in Django, then the"
            " next use connects anew.",
            source=MEASURED + BY_TEXT,
        ),
        "the connection is closed",  # psycopg 3
        "connection already closed",  # psycopg2
    ),
    # At connect, by text. A refusal of one of several hosts may stand beside another host's.
    known(
        _refused_account(
            name="authentication failed",
            meaning="The server does not know this account, or the password is another.",
            advice="Check USER and PASSWORD in DATABASES. Trying again may lock the account.",
            source=MEASURED + BY_TEXT,
        ),
        "authentication failed",
        connecting=True,
    ),
    known(
        _refused_account(
            name="does not exist",
            meaning="There is no database, or no role, of this name.",
            advice="Check NAME and USER in DATABASES; CREATE DATABASE makes one.",
            source=MEASURED + BY_TEXT,
        ),
        "does not exist",
        connecting=True,
    ),
    known(
        _refused_account(
            name="not permitted to log in",
            meaning="The role may not log in, or not into this database.",
            advice="ALTER ROLE ... LOGIN and GRANT CONNECT ON DATABASE give these rights.",
            source=MEASURED + BY_TEXT,
        ),
        "is not permitted to log in",
        "permission denied for database",
        connecting=True,
    ),
    known(
        _refused_account(
            name="no pg_hba.conf entry",
            meaning="The server's pg_hba.conf lets nobody in from this host, or not without"
            " encryption.",
            advice="Add a line to pg_hba.conf for this host, role and database, or set"
            " OPTIONS['sslmode'].",
            source=MEASURED + BY_TEXT,
        ),
        "no pg_hba.conf entry",
        "pg_hba.conf rejects connection",
        connecting=True,
    ),
    known(
        _no_slot(
            name="too many clients already",
            meaning="The server has as many connections open, of all roles together, as its"
            " max_connections allows.",
            source=MEASURED + BY_TEXT,
        ),
        *TOO_MANY_CLIENTS,
        connecting=True,
    ),
    known(
        _no_slot(
            name="remaining connection slots are reserved",
            meaning="The server has only those slots left that superuser_reserved_connections"
            " keeps for administrators.",
            source=MEASURED + BY_TEXT,
        ),
        *SLOTS_ARE_RESERVED,
        connecting=True,
    ),
    known(
        _no_slot(
            name="too many connections for",
            meaning="The role, or the database, has as many connections open as its CONNECTION"
            " LIMIT allows.",
            source=MEASURED + BY_TEXT,
        ),
        *TOO_MANY_CONNECTIONS,
        connecting=True,
    ),
    known(
        _no_slot(
            name="no more connections allowed",
            variant="PgBouncer",
            meaning="PgBouncer has as many clients as its max_client_conn allows.",
            source="measured: PgBouncer 1.18" + BY_TEXT,
        ),
        "no more connections allowed",
        connecting=True,
    ),
    known(
        _no_slot(
            name="query_wait_timeout",
            variant="PgBouncer",
            meaning="PgBouncer had no connection to the server for this client within its"
            " query_wait_timeout: all of its pool are in use, or no server answers.",
            source="measured: PgBouncer 1.18" + BY_TEXT,
        ),
        "query_wait_timeout",
        connecting=True,
    ),
    known(
        _unreachable(
            name="server login has been failing",
            variant="PgBouncer",
            meaning="PgBouncer cannot log in to the server, so it refuses its clients"
            " (server_login_retry).",
            source="source code: PgBouncer, check_fast_fail()" + BY_TEXT,
        ),
        "server login has been failing",
        connecting=True,
    ),
    # Closed: at connect, unless a host had a reason; in use psycopg2 has much the same words.
    known(
        _CLOSED_AT_CONNECT,
        "failed: server closed the connection",
        "failed: Connection reset by peer",
        "failed: SSL SYSCALL error",
        "failed: SSL error: unexpected eof",
        connecting=True,
    ),
    known(
        _lost(
            name="server closed the connection",
            variant="psycopg2",
            outcome=Outcome.UNKNOWN,
            meaning="The connection broke before the answer was there; psycopg2 does not say why."
            " The statement may have run.",
            advice="Look whether its effect is there before you do it again. The server's log says"
            " why it closed the connection: idle_session_timeout, for one.",
            source="measured: PostgreSQL 15, psycopg2 2.9" + BY_TEXT,
        ),
        "server closed the connection",
        "connection has been closed unexpectedly",
        "SSL SYSCALL error",
        "SSL error: unexpected eof",
        "SSL error: decryption failed",  # another process has used it too
        "could not receive data from server",
        "could not send data to server",
        "invalid socket",  # COPY FROM
        "PGRES_COPY_OUT and no message from the libpq",  # COPY TO
        connecting=False,
    ),
    known(
        _refused(
            kind=Kind.NO_FREE_SLOT,
            name="couldn't get a connection",
            variant="psycopg_pool",
            meaning="All connections of Django's pool were in use for as long as its timeout.",
            advice="Give connections back while nobody uses them (connections_released), or raise"
            " max_size in OPTIONS['pool'] as far as the server has slots.",
            source="measured: psycopg_pool 3.3" + BY_TEXT,
        ),
        "couldn't get a connection after",
        "requests waiting",
    ),
    known(
        _unreachable(
            name="the database system is",
            variant="not ready",
            meaning="The server is starting, shutting down or recovering, and takes no connections"
            " meanwhile.",
            source=MEASURED + BY_TEXT,
        ),
        *NOT_READY,
        connecting=True,
    ),
    known(
        _may_have_run(
            name="terminating connection",
            meaning="The server was shut down, or has crashed, before it had answered: a statement"
            " that was running may have run.",
            source="measured by hand: PostgreSQL 15, psycopg 3.3, at connect" + BY_TEXT,
        ),
        *TERMINATING,
    ),
    known(
        _unreachable(
            name="connection refused",
            meaning="No server answers at this address or unix socket.",
            source=MEASURED + BY_TEXT,
        ),
        "Connection refused",
        "No such file or directory",  # of the unix socket
        "Network is unreachable",
        "No route to host",
        connecting=True,
    ),
    known(
        _unreachable(
            name="unknown host",
            meaning="The name in HOST stands for no address.",
            source="measured by hand: psycopg 3.3, psycopg2 2.9" + BY_TEXT,
        ),
        "failed to resolve host",  # psycopg 3
        "could not translate host name",  # libpq
        connecting=True,
    ),
    known(
        _unreachable(
            name="timeout expired",
            meaning="Nothing answered at this address for connect_timeout.",
            source=MEASURED + BY_TEXT,
        ),
        "timeout expired",
        "Connection timed out",
        connecting=True,
    ),
    known(
        _CLOSED_AT_CONNECT,
        "server closed the connection",
        "connection socket closed",
        "Connection reset by peer",
        connecting=True,
    ),
    # The connection is lost, and the server says why
    known(
        _may_have_run(
            code="57P01",
            name="admin_shutdown",
            messages=("terminating connection due to administrator command",),
            meaning="An administrator has ended this connection (pg_terminate_backend), or the"
            " server is shutting down: a statement that was running may have run.",
            source=MEASURED_PSYCOPG,
        ),
    ),
    known(
        _lost(
            code="57P02",
            name="crash_shutdown",
            messages=("terminating connection because of crash of another server process",),
            outcome=Outcome.UNKNOWN,
            meaning="Another process of the server has crashed, so all connections were ended.",
            advice="Look whether the statement's effect is there before you do it again, and into"
            " the server's log.",
            source=MANUAL,
        ),
    ),
    known(
        _unreachable(
            code="57P03",
            name="cannot_connect_now",
            messages=(
                "the database system is starting up",
                "the database system is shutting down",
            ),
            meaning="The server is starting, shutting down or recovering, and takes no connections"
            " meanwhile.",
            source=MANUAL,
        ),
    ),
    known(
        _lost(
            code="57P04",
            name="database_dropped",
            outcome=Outcome.UNKNOWN,
            meaning="The database was dropped while this connection was in it.",
            advice="Check NAME in DATABASES, and who dropped it.",
            source=MANUAL,
        ),
    ),
    known(
        _lost(
            code="57P05",
            name="idle_session_timeout",
            messages=("terminating connection due to idle-session timeout",),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The connection was idle for longer than idle_session_timeout, so the server"
            " closed it.",
            advice=f"Do the work again on a new connection. {AFTER_A_PAUSE} In a site set"
            " CONN_MAX_AGE below the timeout.",
            source=MEASURED_PSYCOPG,
        ),
    ),
    known(
        _lost(
            code="25P03",
            name="idle_in_transaction_session_timeout",
            messages=("terminating connection due to idle-in-transaction timeout",),
            outcome=Outcome.ROLLED_BACK,
            meaning="The transaction waited for its next statement for longer than"
            " idle_in_transaction_session_timeout, so the server rolled it back and closed the"
            " connection.",
            advice=PAUSE_OUTSIDE,
            source=MEASURED_PSYCOPG,
        ),
    ),
    known(
        _lost(
            code="25P04",
            name="transaction_timeout",
            messages=("terminating connection due to transaction timeout",),
            outcome=Outcome.ROLLED_BACK,
            meaning="The transaction took longer than transaction_timeout, so the server rolled it"
            " back and closed the connection.",
            advice="Make the transaction shorter, or raise transaction_timeout for it.",
            source=MANUAL,
        ),
    ),
    known(
        _refused_account(
            code="08P01",
            name="protocol_violation",
            variant="authentication failed",
            meaning="PgBouncer cannot log in to the server: the account, its password or the"
            " database is wrong.",
            advice="Check these in PgBouncer's configuration. Trying again may lock the account.",
            source="source code: PgBouncer, check_fast_fail()",
        ),
        "authentication failed",
        "does not exist",
        "no pg_hba.conf entry",
    ),
    known(
        _lost(
            code="08P01",
            name="protocol_violation",
            variant="PgBouncer",
            outcome=Outcome.UNKNOWN,
            meaning="PgBouncer has ended the connection (a timeout such as query_timeout, or the"
            " server crashed): the statement may have run.",
            advice="Look whether its effect is there before you do it again; the message names the"
            " timeout.",
            source="measured: PgBouncer 1.18, psycopg 3.3",
        ),
    ),
    *(
        known(
            _may_have_run(
                code=code,
                name=name,
                meaning="The connection broke: the statement may have run.",
                source=MANUAL,
            ),
        )
        for code, name in (
            ("08000", "connection_exception"),
            ("08006", "connection_failure"),
            ("08007", "transaction_resolution_unknown"),
        )
    ),
    known(
        _lost(
            code="08003",
            name="connection_does_not_exist",
            outcome=Outcome.NOT_EXECUTED,
            meaning="The connection is closed already.",
            advice="Look for the error before this one.",
            source=MANUAL,
        ),
    ),
    *(
        known(_unreachable(code=code, name=name, meaning=meaning, source=MANUAL))
        for code, name, meaning in (
            (
                "08001",
                "sqlclient_unable_to_establish_sqlconnection",
                "No connection could be opened.",
            ),
            (
                "08004",
                "sqlserver_rejected_establishment_of_sqlconnection",
                "The server did not take the connection.",
            ),
        )
    ),
    # Refused, where a code reaches the client: through a pooler
    known(
        _no_slot(
            code="53300",
            name="too_many_connections",
            messages=(
                "sorry, too many clients already",
                "remaining connection slots are reserved",
            ),
            meaning="The server, the database or the role has as many connections open as it may"
            " have at once.",
            source=MANUAL,
        ),
    ),
    *(
        known(
            _refused_account(
                code=code,
                name=name,
                meaning=meaning,
                advice="Check USER, PASSWORD and NAME in DATABASES. Trying again may lock the"
                " account.",
                source=MANUAL,
            ),
        )
        for code, name, meaning in (
            (
                "28000",
                "invalid_authorization_specification",
                "The server does not let this account in.",
            ),
            ("28P01", "invalid_password", "The password is another."),
            ("3D000", "invalid_catalog_name", "There is no database of this name."),
        )
    ),
    # The connection is fine
    known(
        _alive(
            kind=Kind.BUSY,
            code="25P02",
            name="in_failed_sql_transaction",
            messages=(
                "current transaction is aborted, commands ignored until end of transaction block",
            ),
            meaning="An earlier statement of this transaction has failed, and until the"
            " transaction is rolled back every other one is refused.",
            advice="Look for the first error. To go on after one inside atomic(), put what may fail"
            " into an atomic() of its own.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.TIMED_OUT,
            code="57014",
            name="query_canceled",
            messages=(
                "canceling statement due to statement timeout",
                "canceling statement due to user request",
            ),
            meaning="The statement took longer than statement_timeout, or somebody has cancelled"
            " it; it was undone, and the connection is fine.",
            advice="Make it faster or smaller, or raise statement_timeout for it.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.CONFLICT,
            code="55P03",
            name="lock_not_available",
            messages=(
                "canceling statement due to lock timeout",
                "could not obtain lock on",
            ),
            meaning="Another transaction kept a row or table locked for longer than lock_timeout,"
            " or NOWAIT was asked for; the statement was undone.",
            advice="Do the whole transaction again. Keep transactions short: no slow work inside"
            " atomic().",
            source=MEASURED,
        ),
    ),
    known(
        _conflict(
            code="40001",
            name="serialization_failure",
            messages=("could not serialize access due to",),
            outcome=Outcome.ROLLED_BACK,
            meaning="Another transaction has changed what this one had read, and the isolation"
            " level allows no such thing: it is rolled back.",
            advice="Do the whole transaction again.",
            source=MEASURED,
        ),
    ),
    known(
        _conflict(
            code="40003",
            name="statement_completion_unknown",
            outcome=Outcome.UNKNOWN,
            meaning="Nobody knows whether the statement ran.",
            advice="Look whether its effect is there before you do it again.",
            source=MANUAL,
        ),
    ),
    known(
        _conflict(
            code="40P01",
            name="deadlock_detected",
            messages=("deadlock detected",),
            outcome=Outcome.ROLLED_BACK,
            meaning="Two transactions waited for each other's locks, and the server has ended this"
            " one: it is rolled back.",
            advice="Do the whole transaction again. Lock rows in one order everywhere.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.READ_ONLY,
            code="25006",
            name="read_only_sql_transaction",
            messages=("in a read-only transaction",),
            meaning="The transaction may not change anything: the server is a standby, or"
            " default_transaction_read_only is on, or the program asked for READ ONLY.",
            advice="Check that HOST leads to the primary. After a failover close the connection:"
            " the next one may lead to the new primary.",
            source=MEASURED,
        ),
    ),
)


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, of a driver's or Django's; None where it has none."""
    # Both drivers' Error has one of the two; Django's has neither, but the driver's behind it.
    error = error.__cause__ or error
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
