"""What the errors of MySQL and MariaDB mean: a few lines for each, beside what proves it.

The names are those of the manuals: server error message reference, client error message reference.
The first line that fits an error counts, and so it does of a code's two where nobody knows whether
a connection was being opened.
"""

from __future__ import annotations

from functools import partial

from django_dbhealth.faults import (
    AFTER_A_PAUSE,
    CHECK_THE_SERVER,
    Fault,
    Kind,
    Outcome,
    first_fit,
    known,
)

MEASURED = "measured: MariaDB 10.11, mysqlclient 2.3 on libmariadb 3.3, PyMySQL 1.2"
MANUAL = "manual: server error message reference"
MARIADB_MANUAL = "manual: MariaDB error code reference"
CLIENT_MANUAL = "manual: client error message reference"
CLIENT_CODES = range(2000, 3000)  # the client library's own

_refused = partial(Fault, outcome=Outcome.NOT_EXECUTED, connection_usable=False)
_lost = partial(Fault, kind=Kind.LOST, connection_usable=False)
_alive = partial(Fault, outcome=Outcome.NOT_EXECUTED, connection_usable=True)

_no_slot = partial(
    _refused,
    kind=Kind.NO_FREE_SLOT,
    advice="Give connections back while nobody uses them: CONN_MAX_AGE = 0, or connections_released"
    " around slow work. manage.py dbhealth connections shows who holds them.",
)
_unreachable = partial(_refused, kind=Kind.UNREACHABLE, advice=CHECK_THE_SERVER)
_refused_account = partial(_refused, kind=Kind.CREDENTIALS)
_read_only = partial(_alive, kind=Kind.READ_ONLY, source=MEASURED)
_quota = partial(
    Fault,
    kind=Kind.QUOTA,
    outcome=Outcome.NOT_EXECUTED,
    code=1226,
    name="ER_USER_LIMIT_REACHED",
    source=MEASURED,
)

_LOST_AT_CONNECT = _unreachable(
    code=2013,
    name="CR_SERVER_LOST",
    variant="at connect",
    messages=(
        "Lost connection to server at 'handshake: reading initial communication packet'",
        "Lost connection to MySQL server at 'reading initial communication packet'",
    ),
    meaning="Something accepted the connection and then hung up, or said nothing for"
    " connect_timeout: a server that starts or hangs, or a proxy with none behind it.",
    source=MEASURED,
)

FAULTS = (
    # No free slot, and quotas. 1226 names the resource in its text, in every language.
    known(
        _no_slot(
            code=1226,
            name="ER_USER_LIMIT_REACHED",
            variant="max_user_connections",
            messages=("has exceeded the 'max_user_connections' resource",),
            meaning="The account has as many connections open as it may have at once, in all"
            " processes together.",
            source=MEASURED,
        ),
        "max_user_connections",
    ),
    known(
        _quota(
            variant="max_connections_per_hour",
            messages=("has exceeded the 'max_connections_per_hour' resource",),
            connection_usable=False,
            meaning="The account has opened as many connections as it may in an hour.",
            advice="Open fewer: keep connections with CONN_MAX_AGE. Waiting helps only when the"
            " hour is over; an administrator may raise MAX_CONNECTIONS_PER_HOUR.",
        ),
        "max_connections_per_hour",
    ),
    known(
        _quota(
            variant="statements per hour",
            messages=(
                "has exceeded the 'max_queries_per_hour' resource",
                "has exceeded the 'max_questions' resource",
                "has exceeded the 'max_updates_per_hour' resource",
                "has exceeded the 'max_updates' resource",
            ),
            connection_usable=True,
            meaning="The account has sent as many statements, or changes, as it may in an hour;"
            " the connection is fine.",
            advice="Send fewer, for instance with bulk_create(). Waiting helps only when the hour"
            " is over; an administrator may raise MAX_QUERIES_PER_HOUR or MAX_UPDATES_PER_HOUR.",
        ),
        "max_queries_per_hour",  # MariaDB's word
        "max_questions",  # MySQL's
        "max_updates",  # and "max_updates_per_hour"
    ),
    known(
        _no_slot(
            code=1203,
            name="ER_TOO_MANY_USER_CONNECTIONS",
            messages=("already has more than 'max_user_connections' active connections",),
            meaning="The account has as many connections open as the server's max_user_connections"
            " allows to any account.",
            source=MEASURED,
        ),
    ),
    known(
        _no_slot(
            code=1040,
            name="ER_CON_COUNT_ERROR",
            messages=("Too many connections",),
            meaning="The server has as many connections open, of all accounts together, as its"
            " max_connections allows.",
            source=MEASURED,
        ),
    ),
    # The account is refused
    known(
        _refused_account(
            code=1044,
            name="ER_DBACCESS_DENIED_ERROR",
            messages=("Access denied for user",),
            meaning="The account is right, but it has no rights on this database.",
            advice="Check NAME in DATABASES; GRANT gives the account its rights.",
            source=MEASURED,
        ),
        connecting=True,
    ),
    known(
        _refused_account(
            code=1045,
            name="ER_ACCESS_DENIED_ERROR",
            messages=("Access denied for user",),
            meaning="The server does not know this account from this host, or the password is"
            " another.",
            advice="Check USER and PASSWORD in DATABASES, and the host that the message names: an"
            " account is a name and a host. Trying again may lock the account.",
            source=MEASURED,
        ),
    ),
    known(
        _refused_account(
            code=1698,
            name="ER_ACCESS_DENIED_NO_PASSWORD_ERROR",
            messages=("Access denied for user",),
            meaning="The account does not log in with a password, but as the system's user of the"
            " same name.",
            advice="Connect as that user over the unix socket, or make an account with a password.",
            source=MEASURED,
        ),
    ),
    known(
        _refused_account(
            code=1049,
            name="ER_BAD_DB_ERROR",
            messages=("Unknown database",),
            meaning="There is no database of this name.",
            advice="Check NAME in DATABASES; CREATE DATABASE makes one.",
            source=MEASURED,
        ),
        connecting=True,
    ),
    known(
        _refused_account(
            code=1129,
            name="ER_HOST_IS_BLOCKED",
            messages=("is blocked because of many connection errors",),
            meaning="Too many connects from this host were broken off (max_connect_errors), so the"
            " server refuses it.",
            advice="Find out what breaks them off, a port check for instance; then FLUSH HOSTS.",
            source=MANUAL,
        ),
    ),
    known(
        _refused_account(
            code=1130,
            name="ER_HOST_NOT_PRIVILEGED",
            messages=("is not allowed to connect to this",),
            meaning="No account at all may connect from this host.",
            advice="Check HOST in DATABASES, and the host in the account's name.",
            source=MANUAL,
        ),
    ),
    known(
        _refused_account(
            code=2059,
            name="CR_AUTH_PLUGIN_CANNOT_LOAD",
            messages=("Authentication plugin cannot be loaded",),
            meaning="The client library lacks the way in which this account proves who it is.",
            advice="Install the plugin that the message names, or change the account's.",
            source=CLIENT_MANUAL,
        ),
    ),
    known(
        _refused_account(
            code=3118,
            name="ER_ACCOUNT_HAS_BEEN_LOCKED",
            variant="MySQL",
            messages=("Access denied for user. Account is locked.",),
            meaning="The account is locked.",
            advice="ALTER USER ... ACCOUNT UNLOCK lets it in again.",
            source=MANUAL,
        ),
    ),
    known(
        _refused_account(
            code=4151,
            name="ER_ACCOUNT_HAS_BEEN_LOCKED",
            variant="MariaDB",
            messages=("Access denied, this account is locked",),
            meaning="The account is locked.",
            advice="ALTER USER ... ACCOUNT UNLOCK lets it in again.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.CREDENTIALS,
            code=1820,
            name="ER_MUST_CHANGE_PASSWORD",
            messages=("You must SET PASSWORD before executing this statement",),
            meaning="The account's password has expired: until it is changed nothing else works.",
            advice="Change it with SET PASSWORD, and PASSWORD in DATABASES with it.",
            source=MEASURED,
        ),
    ),
    # Nobody answers
    known(
        _unreachable(
            code=2002,
            name="CR_CONNECTION_ERROR",
            messages=(
                "Can't connect to local server through socket",
                "Can't connect to local MySQL server through socket",
                "Can't connect to server on",
                "Can't connect to MySQL server on",
            ),
            meaning="No server answers at this address or unix socket.",
            source=MEASURED,
        ),
    ),
    known(
        _unreachable(
            code=2003,
            name="CR_CONN_HOST_ERROR",
            messages=(
                "Can't connect to MySQL server on",
                "Can't connect to server on",
            ),
            meaning="No server answers at this address.",
            source=MEASURED,
        ),
    ),
    known(
        _unreachable(
            code=2005,
            name="CR_UNKNOWN_HOST",
            messages=(
                "Unknown server host",
                "Unknown MySQL server host",
            ),
            meaning="The name in HOST stands for no address.",
            source="measured by hand: libmariadb 3.3",
        ),
    ),
    known(
        _lost(
            code=1053,
            name="ER_SERVER_SHUTDOWN",
            messages=("Server shutdown in progress",),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The server is shutting down, and has ended the statement that was running.",
            advice="Do the work again when the server is up.",
            source="measured elsewhere: MySQL 9.7, SIGTERM during a statement",
        ),
        connecting=False,
    ),
    known(
        _unreachable(
            code=1053,
            name="ER_SERVER_SHUTDOWN",
            variant="at connect",
            messages=("Server shutdown in progress",),
            meaning="The server is shutting down, and takes no connections any more.",
            source=MANUAL,
        ),
    ),
    # Lost. At connect the text of 2013 tells, or the guard, which knows that it was connecting.
    known(
        _LOST_AT_CONNECT,
        "at 'handshake",  # libmariadb
        "at 'reading initial communication packet'",  # Oracle's library
        "at 'reading authorization packet'",
    ),
    known(
        _lost(
            code=2013,
            name="CR_SERVER_LOST",
            messages=(
                "Lost connection to server during query",
                "Lost connection to MySQL server during query",
            ),
            outcome=Outcome.UNKNOWN,
            meaning="The connection broke, or read_timeout passed, before the answer was there:"
            " the statement may have run, and may still be running.",
            advice="Look whether its effect is there before you do it again: of 231 inserts with"
            " this error 61 had run. After a pause: give the connection back before the next one"
            " (LongRunningCommand, connections_released), outside of atomic(). If results are read"
            " slowly, raise net_write_timeout.",
            source=MEASURED,
        ),
        connecting=False,
    ),
    known(
        _LOST_AT_CONNECT,
        connecting=True,
    ),
    known(
        _lost(
            code=2006,
            name="CR_SERVER_GONE_ERROR",
            messages=(
                "Server has gone away",
                "MySQL server has gone away",
            ),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The server had closed the connection before the statement was sent: it was"
            " idle for longer than wait_timeout, killed, or the server restarted.",
            advice=f"Do the work again on a new connection. {AFTER_A_PAUSE} If it happens at once"
            " and again, the statement is larger than max_allowed_packet: send less in one.",
            source=MEASURED,
        ),
        connecting=False,
    ),
    known(
        _unreachable(
            code=2006,
            name="CR_SERVER_GONE_ERROR",
            variant="at connect",
            messages=(
                "Server has gone away",
                "MySQL server has gone away",
            ),
            meaning="The server hung up before it took the connection, or init_command is too"
            " large for it.",
            source=CLIENT_MANUAL,
        ),
    ),
    known(
        _lost(
            code=0,
            name="InterfaceError",
            variant="PyMySQL",
            outcome=Outcome.NOT_EXECUTED,
            meaning="PyMySQL has closed this connection already, after an error or because the"
            " program said so.",
            advice="Look for the error before this one. connection.close() in Django, then the"
            " next use connects anew.",
            source="measured: PyMySQL 1.2",
        ),
    ),
    known(
        _lost(
            code=2026,
            name="CR_SSL_CONNECTION_ERROR",
            messages=(
                "TLS/SSL error",
                "SSL connection error",
            ),
            outcome=Outcome.UNKNOWN,
            meaning="The encrypted connection broke: the statement may have run.",
            advice="Look whether its effect is there before you do it again.",
            source="measured elsewhere: MariaDB 10.11, KILL while idle over TLS",
        ),
        connecting=False,
    ),
    known(
        _refused_account(
            code=2026,
            name="CR_SSL_CONNECTION_ERROR",
            variant="at connect",
            messages=(
                "TLS/SSL error",
                "SSL connection error",
            ),
            meaning="Server and client could not agree on an encrypted connection.",
            advice="Check the certificates, and OPTIONS['ssl'] or OPTIONS['ssl_mode'].",
            source=CLIENT_MANUAL,
        ),
    ),
    known(
        _lost(
            code=2027,
            name="CR_MALFORMED_PACKET",
            messages=(
                "Malformed packet",
                "Malformed communication packet",
            ),
            outcome=Outcome.UNKNOWN,
            meaning="The answer made no sense: two threads or processes use one connection.",
            advice="Give each thread its own connection, and close connections before a fork.",
            source=CLIENT_MANUAL,
        ),
    ),
    known(
        _lost(
            code=2055,
            name="CR_SERVER_LOST_EXTENDED",
            messages=("Lost connection to MySQL server at",),
            outcome=Outcome.UNKNOWN,
            meaning="The connection broke before the answer was there: the statement may have run.",
            advice="Look whether its effect is there before you do it again.",
            source=CLIENT_MANUAL,
        ),
    ),
    known(
        _lost(
            code=1927,
            name="ER_CONNECTION_KILLED",
            messages=("Connection was killed",),
            outcome=Outcome.UNKNOWN,
            meaning="Somebody has ended this connection with KILL.",
            advice="Look whether the statement's effect is there before you do it again, and who"
            " kills connections: an administrator, or a job that ends idle ones.",
            source=MARIADB_MANUAL,
        ),
    ),
    known(
        # MariaDB's 4031 is another error. The variable's name is in MySQL's text in any language.
        _lost(
            code=4031,
            name="ER_CLIENT_INTERACTION_TIMEOUT",
            variant="MySQL",
            messages=("The client was disconnected by the server because of inactivity",),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The connection was idle for longer than wait_timeout, so MySQL closed it. (On"
            " MariaDB 4031 is about a trigger, and the connection is fine.)",
            advice=f"Do the work again on a new connection. {AFTER_A_PAUSE} In a site set"
            " CONN_MAX_AGE below wait_timeout.",
            source="measured elsewhere: MySQL 9.7; told from MariaDB's 4031 by its text",
        ),
        "wait_timeout",
    ),
    known(
        _lost(
            code=1158,
            name="ER_NET_READ_ERROR",
            messages=("Got an error reading communication packets",),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The server could not read the whole statement from the network.",
            advice="Do the work again on a new connection.",
            source=MANUAL,
        ),
    ),
    known(
        _lost(
            code=1159,
            name="ER_NET_READ_INTERRUPTED",
            messages=("Got timeout reading communication packets",),
            outcome=Outcome.NOT_EXECUTED,
            meaning="The statement came in too slowly: the server waits net_read_timeout for it.",
            advice="Send less in one statement, or raise net_read_timeout.",
            source="measured elsewhere: MySQL 9.7",
        ),
    ),
    known(
        _lost(
            code=1160,
            name="ER_NET_ERROR_ON_WRITE",
            messages=("Got an error writing communication packets",),
            outcome=Outcome.UNKNOWN,
            meaning="The server could not send its answer: the statement may have run.",
            advice="Look whether its effect is there before you do it again.",
            source=MANUAL,
        ),
    ),
    known(
        _lost(
            code=1161,
            name="ER_NET_WRITE_INTERRUPTED",
            messages=("Got timeout writing communication packets",),
            outcome=Outcome.UNKNOWN,
            meaning="The answer was read too slowly: the server waits net_write_timeout for that."
            " The statement may have run.",
            advice="Read results faster or in pieces, or raise net_write_timeout.",
            source=MANUAL,
        ),
    ),
    # Too large
    known(
        _refused(
            kind=Kind.TOO_LARGE,
            code=1153,
            name="ER_NET_PACKET_TOO_LARGE",
            messages=("Got a packet bigger than 'max_allowed_packet' bytes",),
            meaning="The statement is larger than the server's max_allowed_packet, and the server"
            " has closed the connection.",
            advice="Send less in one statement (batch_size of bulk_create()), or raise"
            " max_allowed_packet. The same statement again never helps.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.TOO_LARGE,
            code=2020,
            name="CR_NET_PACKET_TOO_LARGE",
            messages=("Got packet bigger than 'max_allowed_packet' bytes",),
            meaning="The statement or a row of its result is larger than the client's"
            " max_allowed_packet.",
            advice="Send or read less in one statement, or raise max_allowed_packet in the client's"
            " options.",
            source=CLIENT_MANUAL,
        ),
    ),
    # Busy
    known(
        _alive(
            kind=Kind.BUSY,
            code=2014,
            name="CR_COMMANDS_OUT_OF_SYNC",
            messages=("Commands out of sync; you can't run this command now",),
            meaning="The connection is still giving the rows of another, unbuffered result; the"
            " statement was not sent.",
            advice="Read that result to its end or close its cursor first. If an exception has left"
            " it unfinished, close the connection.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.BUSY,
            name="already in use from another thread",
            variant="mysqlclient",
            meaning="Another thread is using this connection at this moment; the statement was not"
            " sent.",
            advice="Give each thread its own connection: django.db.connections does.",
            source="measured: mysqlclient 2.3",
        ),
        "already in use from another thread",
    ),
    known(
        Fault(
            kind=Kind.BUSY,
            name="Packet sequence number wrong",
            variant="PyMySQL",
            outcome=Outcome.UNKNOWN,
            connection_usable=False,
            meaning="Two threads or processes use this connection at once, and their answers are"
            " mixed up: the statement may have run.",
            advice="Close the connection. Give each thread its own, and close connections before a"
            " fork.",
            source="measured: PyMySQL 1.2",
        ),
        "Packet sequence number wrong",
    ),
    # Conflicts with other transactions
    known(
        _alive(
            kind=Kind.CONFLICT,
            code=1205,
            name="ER_LOCK_WAIT_TIMEOUT",
            messages=("Lock wait timeout exceeded; try restarting transaction",),
            meaning="Another transaction kept a row locked for innodb_lock_wait_timeout seconds;"
            " the statement was undone, what the transaction did before it was not.",
            advice="Do the whole transaction again. Keep transactions short: no slow work inside"
            " atomic().",
            source=MEASURED,
        ),
    ),
    known(
        Fault(
            kind=Kind.CONFLICT,
            code=1213,
            name="ER_LOCK_DEADLOCK",
            messages=("Deadlock found when trying to get lock; try restarting transaction",),
            outcome=Outcome.ROLLED_BACK,
            connection_usable=True,
            meaning="Two transactions waited for each other's locks, and the server has rolled"
            " this one back.",
            advice="Do the whole transaction again. Lock rows in one order everywhere.",
            source=MEASURED,
        ),
    ),
    known(
        Fault(
            kind=Kind.CONFLICT,
            code=1020,
            name="ER_CHECKREAD",
            messages=("Record has changed since last read in table",),
            outcome=Outcome.ROLLED_BACK,
            connection_usable=True,
            meaning="Another transaction has changed the row since this one first read"
            " (innodb_snapshot_isolation), and the server has rolled this one back.",
            advice="Do the whole transaction again; select_for_update() locks rows as it reads.",
            source=MEASURED,
        ),
    ),
    # Out of time
    known(
        _alive(
            kind=Kind.TIMED_OUT,
            code=1317,
            name="ER_QUERY_INTERRUPTED",
            messages=("Query execution was interrupted",),
            meaning="Somebody has ended the statement with KILL QUERY; it was undone, and the"
            " connection is fine.",
            advice="Find out who did, and why: perhaps it was slow, or held locks.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.TIMED_OUT,
            code=1969,
            name="ER_STATEMENT_TIMEOUT",
            messages=("Query execution was interrupted (max_statement_time exceeded)",),
            meaning="The statement took longer than MariaDB's max_statement_time; it was undone,"
            " and the connection is fine.",
            advice="Make it faster or smaller, or raise max_statement_time for it.",
            source=MEASURED,
        ),
    ),
    known(
        _alive(
            kind=Kind.TIMED_OUT,
            code=3024,
            name="ER_QUERY_TIMEOUT",
            messages=(
                "Query execution was interrupted, maximum statement execution time exceeded",
            ),
            meaning="The SELECT took longer than MySQL's max_execution_time; the connection is"
            " fine.",
            advice="Make it faster or smaller, or raise max_execution_time for it.",
            source="measured elsewhere: MySQL 9.7",
        ),
    ),
    # Read-only
    known(
        _read_only(
            code=1290,
            name="ER_OPTION_PREVENTS_STATEMENT",
            variant="--read-only",
            messages=(
                "server is running with the --read-only option so it cannot execute this statement",
            ),
            meaning="The server takes no changes: it is a replica, or was made one by a failover.",
            advice="Check that HOST leads to the primary. After a failover close the connection:"
            " the next one may lead to the new primary.",
        ),
        "read-only",  # the option, in every language; 1290 is about other options too
        "read_only",
    ),
    known(
        _read_only(
            code=1792,
            name="ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION",
            messages=("Cannot execute statement in a READ ONLY transaction",),
            meaning="The transaction is READ ONLY: the program began it so, or"
            " transaction_read_only is on for the session or the server.",
            advice="Begin it without READ ONLY. If the program did not, check that HOST leads to"
            " the primary.",
        ),
    ),
    known(
        _alive(
            kind=Kind.READ_ONLY,
            code=1836,
            name="ER_READ_ONLY_MODE",
            messages=("Running in read-only mode",),
            meaning="The server, or InnoDB in it, takes no changes.",
            advice="Check that HOST leads to the primary. After a failover close the connection:"
            " the next one may lead to the new primary.",
            source=MANUAL,
        ),
    ),
)


def code_of(error: BaseException) -> int | None:
    """Return the number of an error, of the driver's or Django's; None where it has none."""
    code = error.args[0] if error.args else None
    return code if isinstance(code, int) else None


def fault_of(error: BaseException, *, connecting: bool | None) -> Fault | None:
    """Return what an error means, None for an unknown one."""
    return first_fit(FAULTS, code_of(error), str(error), connecting=connecting)
