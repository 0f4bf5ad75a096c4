"""mysqlclient and PyMySQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_dbhealth.faults import Kind
from django_dbhealth.vendors.base import Driver, Liveness, hang_up, holds, hung_up_after

from .faults import CLIENT_CODES, fault_of

if TYPE_CHECKING:
    from collections.abc import Mapping

# MySQL's super_read_only sets the first too; a reader of Aurora has only the second. MariaDB 12 has
# several words for yes.
QUESTION = "SELECT @@read_only, @@innodb_read_only"
NO = (0, "0", b"0", "OFF", b"OFF")

# Bytes: a packet's header and an OK (manual: OK_Packet). For the rest of one that comes in parts
# the library would wait without an end.
SHORTEST_ANSWER = 4 + 7

# Without the second SET NAMES, which both drivers send in connect(), would wait for ever.
TIMEOUTS = ("connect_timeout", "read_timeout")


class _MySQL(Driver):
    """What both have in common."""

    timeouts = TIMEOUTS

    def commit_each_statement(self, handle: Any) -> None:
        handle.autocommit(True)


class MySQLClient(_MySQL):
    """mysqlclient, whichever client library it was built with."""

    cursors_need_handle = True

    def descriptor(self, handle: Any) -> int | None:
        try:
            return int(handle.fileno())
        except handle.Error:
            return None

    def session_id(self, handle: Any) -> int:
        return int(handle.thread_id())

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        # handle.ping() waits for ever on a server that hangs, so the question is sent and the
        # answer awaited here. DO 1 returns no rows and is not seen by any statement after it.
        descriptor = None
        try:
            descriptor = handle.fileno()
            handle.send_query(b"DO 1")
            if not holds(descriptor, SHORTEST_ANSWER, timeout):
                hang_up(descriptor)
                return Liveness.LOST
            handle.read_query_result()
        except handle.ProgrammingError:
            # 2014: an unbuffered result is being read; or another thread is using the handle.
            return Liveness.BUSY
        except handle.Error as error:
            # No hang_up(): the library has closed the socket, whose number may be another's now.
            # An hourly quota, for one, is an answer too.
            return Liveness.ALIVE if _is_alive(error) else Liveness.LOST
        except BaseException:  # of a signal handler: the answer is still to come
            if descriptor is not None:
                hang_up(descriptor)
            raise
        return Liveness.ALIVE

    def takes_writes(self, handle: Any, *, timeout: float) -> bool:
        try:
            with hung_up_after(timeout, handle.fileno()):
                handle.query(QUESTION.encode())
                (answers,) = handle.store_result().fetch_row()
        except (handle.Error, RuntimeError):
            return False
        return all(answer in NO for answer in answers)

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        # The library's own errors. What the server says before it hangs up (4031, 1927, 1053)
        # leaves the socket open; the next statement then says 2006.
        fault = fault_of(error, connecting=False)
        return fault is not None and fault.kind is Kind.LOST and fault.code in CLIENT_CODES

    def is_reading(self, handle: Any, *, new_references: int) -> bool:
        # Whatever is called meanwhile says 2014, and so does the reader then, at its last row.
        # The number of affected rows is -1 as long as a SELECT's result is not stored (manual,
        # mysql_affected_rows()), and again once its cursor is closed. While a result is read,
        # cursor and result hold the handle.
        return new_references >= 2 and handle.field_count() > 0 and handle.affected_rows() == -1

    def hasten_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        # The driver would turn autocommit off, and Django on again: two round trips for nothing.
        # Left as it is, Django turns it on where the status of SET NAMES, which the driver sends
        # at each connect, says that it is off (a server's init_connect). PyMySQL does not look
        # at that status.
        parameters.setdefault("autocommit", None)
        if "read_default_file" not in parameters:  # it may have a connect-timeout of its own
            super().hasten_connect(parameters, seconds)


def _is_alive(error: Exception) -> bool:
    """Return whether a probe's error is an answer, a spent quota's for one. Unknown: it is none."""
    fault = fault_of(error, connecting=False)
    return fault is not None and fault.connection_usable


class PyMySQL(_MySQL):
    """PyMySQL. It has no public way to reach its socket or to bound one call."""

    def descriptor(self, handle: Any) -> int | None:
        return int(handle._sock.fileno()) if handle.open else None

    def session_id(self, handle: Any) -> int:
        return int(handle.thread_id())

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if not handle.open:
            return Liveness.LOST
        result = handle._result
        if result is not None and (result.unbuffered_active or result.has_next):
            # PyMySQL would read the rows to their end and throw them away.
            return Liveness.BUSY
        read_timeout = handle._read_timeout
        handle._read_timeout = timeout
        try:
            handle.ping(reconnect=False)
        except handle.Error as error:
            return Liveness.ALIVE if _is_alive(error) else Liveness.LOST
        except OSError:
            return Liveness.LOST
        finally:
            handle._read_timeout = read_timeout
        return Liveness.ALIVE

    def takes_writes(self, handle: Any, *, timeout: float) -> bool:
        read_timeout = handle._read_timeout
        handle._read_timeout = timeout
        try:
            with handle.cursor() as cursor:
                cursor.execute(QUESTION)
                answers = cursor.fetchone()
        except (handle.Error, OSError):
            return False
        finally:
            handle._read_timeout = read_timeout
        return all(answer in NO for answer in answers)

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        return not handle.open

    def hasten_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        super().hasten_connect(parameters, seconds)
        # Its connect_timeout ends when the socket is connected, before the server's first word.
        parameters.setdefault("read_timeout", seconds)

    def lift_bound(self, handle: Any, options: Mapping[str, Any]) -> None:
        handle._read_timeout = options.get("read_timeout")
