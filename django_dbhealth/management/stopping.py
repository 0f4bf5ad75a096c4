"""SIGTERM and SIGHUP while a command runs: what was begun is finished first, for a while."""

from __future__ import annotations

import _thread
import asyncio
import atexit
import logging
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

# SIGHUP: the terminal went away. Under nohup it is ignored, and stays so.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class StopRequested(KeyboardInterrupt):
    """A command was asked to stop; raised where it can stop, and once its time is over, anywhere.

    It is a ``KeyboardInterrupt``: ``except Exception`` does not hold it up.
    """

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signum = signum


class StopSignals:
    """The stop signals' handlers, for as long as the ``with`` block lasts.

    While a unit of work is under way (a step, an item) a signal waits for its end, for at most
    ``grace()`` seconds; a second one does not wait. Where nothing is under way it acts at once.
    """

    def __init__(self, grace: Callable[[], float]) -> None:
        self.requested: signal.Signals | None = None
        self._grace = grace
        self._interrupt: Callable[[], None] = self.checkpoint
        self._keyboard_interrupt = False
        self._previous: dict[signal.Signals, Any] = {}
        self._main_thread = threading.main_thread().ident or 0
        self._process = os.getpid()
        self._units: list[tuple[str, object]] = []  # and whose each is, see _owner()
        self._waiting: list[object] = []

    @classmethod
    def active(cls) -> StopSignals | None:
        """Return the one that a command of this thread is inside of."""
        return _active if threading.current_thread() is threading.main_thread() else None

    def __enter__(self) -> Self:
        global _active  # noqa: PLW0603 (signals are the process's, too)
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                # A handler that somebody set, or "ignore", is left as it is.
                if signal.getsignal(signum) is signal.SIG_DFL:
                    self._previous[signum] = signal.signal(signum, self._on_signal)
            _active = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _active  # noqa: PLW0603
        if _active is self:  # not that of another thread's command
            _active = None
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def checkpoint(self) -> None:
        """Raise StopRequested if a signal has come, KeyboardInterrupt if it was Ctrl-C."""
        if self._keyboard_interrupt:
            raise KeyboardInterrupt
        if self.requested is not None:
            raise StopRequested(self.requested)

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """Let the block be finished before a signal takes effect."""
        unit = (name, _owner())
        self._units.append(unit)
        try:
            yield
        finally:
            self._units.remove(unit)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal take effect at once in the block: it only waits."""
        owner = _owner()
        self._waiting.append(owner)
        try:
            if not self._is_working():
                self.checkpoint()
            yield
        finally:
            self._waiting.remove(owner)

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Stop the block's work by ``interrupt`` instead of an exception in the main thread.

        Ctrl-C too, the first time, as ``asyncio.run()`` does it: the work waits for this thread.
        """
        previous, self._interrupt = self._interrupt, interrupt
        ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if ours:
            signal.signal(signal.SIGINT, self._on_keyboard)
        try:
            yield
        finally:
            self._interrupt = previous
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _is_working(self) -> bool:
        """Return whether a unit is under way that does not just wait."""
        return any(owner not in self._waiting for _, owner in self._units)

    def _on_keyboard(self, _signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._keyboard_interrupt = True
        self._interrupt()

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked inherits the handler
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        again = self.requested is not None
        self.requested = self.requested or signal.Signals(signum)
        if again or not self._is_working():
            if not again:
                _say(f"{self.requested.name}: stopping.")
            self._interrupt()
            return
        # Not threading.Thread: its lock may be the one that this handler interrupted.
        _thread.start_new_thread(self._interrupt_after_grace, ())
        # Last: a signal that comes before the handler's end is heard when a time.sleep() is over.
        _say(f"{self.requested.name}: finishing {self._units[-1][0]}, at most {self._grace():g} s.")

    def _interrupt_after_grace(self) -> None:
        time.sleep(self._grace())
        if self._previous and self.requested is not None:
            # To the main thread itself: only then is what it is sleeping in interrupted.
            signal.pthread_kill(self._main_thread, self.requested)


def sleep(seconds: float) -> None:
    """Sleep, awake to signals.

    One that comes just before ``time.sleep()`` blocks has its handler run when that returns, so it
    blocks for a second at most.
    """
    until = time.monotonic() + seconds
    time.sleep(min(seconds, 1.0))
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))


# The one whose handlers are set. A command called by a command uses its caller's.
_active: StopSignals | None = None


def _owner() -> object:
    """Return whose work this is: the current task's, or in code without tasks the thread's."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _say(line: str) -> None:
    """Write to standard error from a signal handler: a stream might be in mid-write.

    Not to descriptor 2, which is a database's socket if the process was started without it.
    """
    with suppress(AttributeError, OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode())


def end_by_signal(signum: signal.Signals) -> NoReturn:
    """End the process as the signal's default action does: a shell's ``$?`` is 128 + the number.

    What an ordinary end of the process would do is done first: exit functions, logs, streams.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)
    # Still here: process 1 of a container, whose default action the kernel leaves out.
    os._exit(128 + signum)
