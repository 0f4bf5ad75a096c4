"""psycopg 3 and psycopg2."""

from __future__ import annotations

import os
import time
from typing import Any

from django_dbhealth.vendors.base import Driver, Liveness, hung_up_after, readable

# libpq's PGTransactionStatusType; both drivers hand the numbers through.
IDLE, UNKNOWN = 0, 4
IN_TRANSACTION = (2, 3)  # whole, or failed

# A standby, or a server whose sessions are all read-only by its settings (manual: hot standby).
QUESTION = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool"


class _Psycopg(Driver):
    """What both have of libpq."""

    def session_id(self, handle: Any) -> int:
        return int(handle.info.backend_pid)

    def has_given_up(self, handle: Any, error: Exception) -> bool:
        return bool(handle.closed)

    def hasten_connect(self, parameters: dict[str, Any], seconds: int) -> None:
        if "PGCONNECT_TIMEOUT" not in os.environ and "service" not in parameters:
            super().hasten_connect(parameters, seconds)


class Psycopg(_Psycopg):
    """psycopg 3."""

    def descriptor(self, handle: Any) -> int | None:
        return None if handle.closed else int(handle.pgconn.socket)

    def end(self, handle: Any) -> None:
        handle.pgconn.finish()

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if not handle.closed and handle.pgconn.transaction_status in IN_TRANSACTION:
            return Liveness.IN_TRANSACTION
        return self.ask(handle, timeout=timeout)

    def ask(self, handle: Any, *, timeout: float) -> Liveness:
        from psycopg import Error
        from psycopg.pq import ExecStatus

        pgconn = handle.pgconn
        if handle.closed or pgconn.transaction_status == UNKNOWN:
            return Liveness.LOST
        if pgconn.transaction_status not in (IDLE, *IN_TRANSACTION) or pgconn.pipeline_status:
            return Liveness.BUSY
        if handle.lock.locked():  # not acquired: an interrupt before its release would be a hang
            return Liveness.BUSY
        liveness = Liveness.LOST
        try:
            results = _results_of(pgconn, b"", time.monotonic() + timeout)
            # Another one is the server's farewell; libpq then reads the end as well.
            if results and all(each.status == ExecStatus.EMPTY_QUERY for each in results):
                liveness = Liveness.ALIVE
        except Error:
            pass
        finally:
            if liveness is Liveness.LOST:  # also when a signal handler's exception came
                self.end(handle)
        return liveness

    def takes_writes(self, handle: Any, *, timeout: float) -> bool:
        from psycopg import Error

        takes = False
        try:
            results = _results_of(handle.pgconn, QUESTION.encode(), time.monotonic() + timeout)
            takes = bool(results and results[0].get_value(0, 0) == b"f")
        except Error:
            pass
        finally:
            if not takes:  # else a pool would hand it out again
                handle.pgconn.finish()
        return takes

    def has_begun(self, handle: Any) -> bool:
        return handle.pgconn.transaction_status in IN_TRANSACTION


def _results_of(pgconn: Any, query: bytes, deadline: float) -> list[Any] | None:
    """Run a query; None for one that was not answered in time.

    Notifications go where psycopg keeps them.
    """
    results: list[Any] = []
    pgconn.send_query(query)
    pgconn.flush()
    while True:
        pgconn.consume_input()
        while notification := pgconn.notifies():
            pgconn.notify_handler(notification)  # as psycopg's own fetching does
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                return results
            results.append(result)
        if not readable(pgconn.socket, max(0.0, deadline - time.monotonic())):
            return None


class Psycopg2(_Psycopg):
    """psycopg2."""

    def descriptor(self, handle: Any) -> int | None:
        return None if handle.closed else int(handle.fileno())

    def ping(self, handle: Any, *, timeout: float) -> Liveness:
        if handle.closed:
            return Liveness.LOST
        status = handle.get_transaction_status()
        if status in IN_TRANSACTION:
            return Liveness.IN_TRANSACTION
        if status != IDLE:
            return Liveness.LOST if status == UNKNOWN else Liveness.BUSY
        try:
            with hung_up_after(timeout, handle.fileno()), handle.cursor() as cursor:
                cursor.execute("SELECT 1")
            if not handle.autocommit:
                handle.rollback()
        except handle.Error:
            return Liveness.LOST
        except RuntimeError:  # no thread can be started, and so no bound set
            return Liveness.BUSY
        return Liveness.ALIVE

    def takes_writes(self, handle: Any, *, timeout: float) -> bool:
        try:
            with hung_up_after(timeout, handle.fileno()), handle.cursor() as cursor:
                cursor.execute(QUESTION)
                return bool(cursor.fetchone() == (False,))
        except (handle.Error, RuntimeError):
            return False

    def has_begun(self, handle: Any) -> bool:
        return handle.get_transaction_status() in IN_TRANSACTION
