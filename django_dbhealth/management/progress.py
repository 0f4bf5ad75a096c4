"""How far a loop has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


LINE_EVERY = 30.0  # seconds
REDRAW_EVERY = 0.1  # seconds; rich's own default is ten times a second too


class Meter:
    """The count of one loop."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.started = time.monotonic()

    def line(self) -> str:
        """Return for example ``products: 120 of 480 (25 %), 40 a second``."""
        seconds = time.monotonic() - self.started
        share = f" of {self.total:g} ({self.done / self.total:.0%})" if self.total else ""
        pace = f", {self.done / seconds:.3g} a second" if seconds >= 1 else ""
        return f"{self.description}: {self.done}{share}{pace}"


class Progress:
    """The loops of one command. Nested loops share one display."""

    def __init__(
        self,
        write_line: Callable[[str], None],
        *,
        bar: bool,
        outputs: Iterable[Any] = (),  # OutputWrapper; django-stubs does not know its _out
    ) -> None:
        self._write_line = write_line
        self._outputs = outputs
        self._bar = bar
        self._display: RichProgress | None = None

    @contextmanager
    def shown(self, meter: Meter) -> Iterator[Callable[[], None]]:
        """Show the meter during the block, which calls what it is given after each item."""
        display = self._display or (_rich_display() if self._bar else None)
        if display is None:
            yield from self._lines(meter)
        elif self._display is None:
            self._display = display
            try:
                with self._above(display):
                    yield from _task(display, meter)
            finally:
                self._display = None
        else:
            yield from _inner_task(display, meter)

    @contextmanager
    def _above(self, display: RichProgress) -> Iterator[None]:
        """Draw the bar during the block, and have the command's own lines printed above it.

        For that rich replaces sys.stdout and sys.stderr where they are the terminal.
        """
        streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
        own = [(output, output._out) for output in self._outputs if output._out in streams]
        with suppress(OSError):
            display.start()
        for output, stream in own:
            output._out = getattr(sys, streams[stream])
        try:
            yield
        finally:
            for output, stream in own:
                output._out = stream
            with suppress(OSError):
                display.stop()

    def _lines(self, meter: Meter) -> Iterator[Callable[[], None]]:
        due = meter.started + LINE_EVERY

        def update() -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + LINE_EVERY
                self._write_line(meter.line())

        yield update
        self._write_line(meter.line())


def _task(display: RichProgress, meter: Meter) -> Iterator[Callable[[], None]]:
    """Show the outermost loop from its beginning to its end."""
    task = display.add_task(meter.description, total=meter.total)
    yield _throttled(lambda: _redraw(display, task, meter))
    _redraw(display, task, meter)


def _inner_task(display: RichProgress, meter: Meter) -> Iterator[Callable[[], None]]:
    """Show an inner loop while it runs, if it runs for long: there may be thousands."""
    task: TaskID | None = None

    def draw() -> None:
        nonlocal task
        if task is None:
            task = display.add_task(meter.description, total=meter.total)
        _redraw(display, task, meter)

    try:
        yield _throttled(draw)
    finally:
        if task is not None:
            display.remove_task(task)


def _throttled(draw: Callable[[], None]) -> Callable[[], None]:
    due = time.monotonic() + REDRAW_EVERY

    def update() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + REDRAW_EVERY
            draw()

    return update


def _redraw(display: RichProgress, task: TaskID, meter: Meter) -> None:
    """Draw, unless the terminal is gone: then the work goes on without."""
    with suppress(OSError):
        display.update(task, completed=meter.done, refresh=True)


def _rich_display() -> RichProgress | None:
    """Return a progress bar on standard error, None without rich (the extra ``cli``).

    It draws when an item is done, not from a thread of its own: a command may fork. What the
    command prints goes above the bar if it goes to the terminal, and into its file if not.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
