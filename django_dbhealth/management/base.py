"""``LongRunningCommand``: a management command that outlives the server's idle timeout."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

from asgiref.sync import async_to_sync, iscoroutinefunction
from django.core.management.base import BaseCommand, CommandError
from django.utils.asyncio import async_unsafe

from django_dbhealth.boundaries import connection_boundary, connections_released
from django_dbhealth.connecting import patient

from .output import PatientOutput
from .progress import Progress
from .stopping import StopRequested, StopSignals, end_by_signal, sleep
from .tracking import Track

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Coroutine, Iterable

    from django.core.management.base import CommandParser

T = TypeVar("T")

logger = logging.getLogger("django_dbhealth.command")

WITHOUT_TRACEBACK = (CommandError, StopRequested)


class LongRunningCommand(BaseCommand):
    """A management command made of slow steps, between which it holds no connection.

    ``handle()`` may be a coroutine function; the ORM then works in the thread that called it.
    """

    # Seconds that SIGTERM leaves to the current step or item. Docker sends SIGKILL after ten.
    stop_grace: float = 10.0

    # Seconds for which a refused connection is tried again: the server is down, or has no free
    # slot. None: CONNECT_RETRY_TIMEOUT, or 60 where that is 0.
    connect_retry_timeout: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stdout = PatientOutput.over(self.stdout)
        self.stderr = PatientOutput.over(self.stderr)
        self._stop = StopSignals(lambda: self.stop_grace)
        self._progress = Progress(self._report, bar=False)
        self._verbosity = 1
        if iscoroutinefunction(self.handle):
            self.handle = self._in_event_loop(self.handle)  # type: ignore[method-assign]

    # What a command's handle() uses

    def step(self, name: str) -> Step:
        """Give the connections back, do the step, and give them back again.

        Use it with ``with`` or ``async with``. On a terminal the name and the duration are
        printed, elsewhere they are logged to ``django_dbhealth.command`` at INFO. An error is told
        in which step it happened. Raises ``TransactionManagementError`` inside the command's own
        ``atomic()``; a transaction of the command's caller is left alone.
        """
        return Step(self, name)

    def track(
        self,
        iterable: Iterable[T] | AsyncIterable[T],
        description: str,
        total: float | None = None,
    ) -> Track[T]:
        """Yield the items and show how many are done: a bar on a terminal, else a log line.

        Use it with ``for``, in an ``async def handle`` with ``async for`` where the items come from
        a queryset, a ``chunked_iterator()`` or another async iterable. ``total`` is the number of
        items, where ``iterable`` cannot tell it. A queryset is read with ``chunked_iterator()``,
        in the order of its primary key, up to the last key that there is at the beginning; one that
        this refuses is read as always. No connection is touched in between. A request to stop takes
        effect between two items.
        """
        return Track(self, iterable, description, total)

    @async_unsafe("You cannot call sleep() from an async context - use `await self.asleep()`.")
    def sleep(self, seconds: float) -> None:
        """Give the connections back and sleep. A request to stop ends it, and the command."""
        with Sleep(), self._stop.waiting():
            sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Do what ``sleep()`` does, in an ``async def handle``."""
        async with Sleep():
            with self._stop.waiting():
                await asyncio.sleep(seconds)

    # How it is run

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        # Not in add_arguments(): a subclass overrides that, and need not call super().
        parser = super().create_parser(prog_name, subcommand, **kwargs)
        with suppress(argparse.ArgumentError):  # it has one of its own
            parser.add_argument("--no-progress", action="store_true", help="Show no progress bar.")
        return parser

    def run_from_argv(self, argv: list[str]) -> None:
        try:
            with self._stop:
                super().run_from_argv(argv)
        except StopRequested as stop:
            message = f"Stopped by {stop.signum.name}. What was committed stays committed."
            self.stderr.write(message)
            logger.info(message)
            end_by_signal(stop.signum)
        finally:
            self.stdout.flush()

    def execute(self, *args: Any, **options: Any) -> str | None:
        self._verbosity = options["verbosity"]
        self._stop = StopSignals.active() or self._stop
        error_output = options.get("stderr") or self.stderr
        bar = not options.get("no_progress") and error_output.isatty()
        self._progress = (
            Progress(self._report, bar=bar, outputs=(self.stdout, self.stderr))
            if self._verbosity > 0
            else Progress(lambda line: None, bar=False)
        )
        with patient(self.connect_retry_timeout, self._wait), connection_boundary():
            return super().execute(*args, **options)

    def _wait(self, seconds: float) -> None:
        """Sleep until a refused connection is tried again, or until a request to stop."""
        self._stop.checkpoint()
        with self._stop.waiting():
            sleep(seconds)

    def _in_event_loop(
        self, handle: Callable[..., Coroutine[Any, Any, str | None]]
    ) -> Callable[..., str | None]:
        """Return a plain function that runs the coroutine function, and cancels it to stop it."""

        def call(*args: Any, **options: Any) -> str | None:
            cancel: Callable[[], Any] = bool  # nothing runs yet

            async def run() -> str | None:
                nonlocal cancel
                loop, task = asyncio.get_running_loop(), asyncio.current_task()
                assert task is not None
                cancel = functools.partial(loop.call_soon_threadsafe, task.cancel)
                try:
                    return await handle(*args, **options)
                except asyncio.CancelledError:
                    self._stop.checkpoint()
                    raise

            with self._stop.interrupting(lambda: cancel()):  # noqa: PLW0108 (it changes)
                return async_to_sync(run)()

        return call

    def _report(self, line: str) -> None:
        """Tell how far the work has come: whoever looks on, else the log."""
        if self._verbosity > 0 and self.stdout.isatty():
            self.stdout.write(line)
        else:
            logger.info(line)

    def _report_failure(self, line: str, *, has_traceback: bool) -> None:
        if not self.stderr.isatty():
            logger.warning(line)
        elif not has_traceback:  # which carries the line as a note
            self.stderr.write(line)


class Sleep(connections_released):
    """What ``sleep()`` does with the connections."""

    def _described(self) -> str:
        return "sleep()"


class Step(connections_released):
    """One step of a ``LongRunningCommand``; made by its ``step()``."""

    def __init__(self, command: LongRunningCommand, name: str) -> None:
        super().__init__()
        self._command = command
        self._name = name

    def __enter__(self) -> Self:
        self._command._stop.checkpoint()
        super().__enter__()
        self._started()
        return self

    async def __aenter__(self) -> Self:
        self._command._stop.checkpoint()
        await super().__aenter__()
        self._started()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._unit:
            super().__exit__(*exc_info)
        self._ended(exc_info[1])

    async def __aexit__(self, *exc_info: object) -> None:
        with self._unit:
            await super().__aexit__(*exc_info)
        self._ended(exc_info[1])

    def _started(self) -> None:
        self._began = time.monotonic()
        self._unit = ExitStack()
        self._unit.enter_context(self._command._stop.unit(f"the step {self._name!r}"))
        if self._command.stdout.isatty():
            self._command._report(f"{self._name} …")

    def _ended(self, error: Any) -> None:
        seconds = time.monotonic() - self._began
        if error is None:
            self._command._report(f"{self._name}: done in {seconds:.1f} s")
            self._command._stop.checkpoint()
            return
        verb = "stopped" if isinstance(error, StopRequested) else "failed"
        line = f"The step {self._name!r} {verb} after {seconds:.1f} s."
        error.add_note(line)
        self._command._report_failure(line, has_traceback=not isinstance(error, WITHOUT_TRACEBACK))

    def _described(self) -> str:
        return f"The step {self._name!r}"
