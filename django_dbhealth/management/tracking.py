"""``track()``: a loop that shows how far it is, and that can be stopped between two items."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import reset_queries
from django.db.models import QuerySet
from django.utils.asyncio import async_unsafe

from django_dbhealth.chunks import ChunkedIterator, chunked_iterator

from .progress import Meter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .base import LongRunningCommand

T = TypeVar("T")


class Track(Generic[T]):
    """A loop of a ``LongRunningCommand``; made by its ``track()``."""

    def __init__(
        self,
        command: LongRunningCommand,
        iterable: Iterable[T] | AsyncIterable[T],
        description: str,
        total: float | None,
    ) -> None:
        self._command = command
        self._iterable = iterable
        self._description = description
        self._total = total

    def __iter__(self) -> Iterator[T]:
        if not isinstance(self._iterable, Iterable):
            raise TypeError(_cannot_loop(self._iterable, "for", "async for"))
        items, total = _counted(self._iterable, self._total)
        with self._shown(total) as done:
            for item in items:
                with self._unit():
                    yield item
                done()
                if settings.DEBUG:
                    reset_queries()
                self._command._stop.checkpoint()

    async def __aiter__(self) -> AsyncIterator[T]:
        if not isinstance(self._iterable, AsyncIterable):
            raise TypeError(_cannot_loop(self._iterable, "async for", "for"))
        items, total = await sync_to_async(_counted)(self._iterable, self._total)
        with self._shown(total) as done:
            async for item in items:
                with self._unit():
                    yield item
                done()
                if settings.DEBUG:
                    await sync_to_async(reset_queries)()
                self._command._stop.checkpoint()

    @contextmanager
    def _shown(self, total: float | None) -> Iterator[Callable[[], None]]:
        """Show the loop during the block, which calls what it is given after each item."""
        meter = Meter(self._description, total)
        self._command._stop.checkpoint()
        with self._command._progress.shown(meter) as update:

            def done() -> None:
                meter.done += 1
                update()

            yield done

    def _unit(self) -> Any:
        return self._command._stop.unit(f"the current item of {self._description!r}")


def _cannot_loop(iterable: Any, statement: str, other: str) -> str:
    return (
        f"track() cannot loop over {type(iterable).__name__} with `{statement}`: write `{other}`."
    )


def _counted(items: Any, total: float | None) -> tuple[Any, float | None]:
    """Return what yields the items, and how many they are."""
    if isinstance(items, ChunkedIterator) or _is_unread(items):
        items = _up_to_now(items)
    if total is None:
        total = _number_of(items)
    return items, total


def _is_unread(items: Any) -> bool:
    return isinstance(items, QuerySet) and items._result_cache is None


@async_unsafe("You cannot track() rows with `for` in an async context - use `async for`.")
def _up_to_now(rows: Any) -> Any:
    """Return what reads the rows in pieces, if they can be read so.

    It ends at the last key that there is now: a loop may add rows to its own table.
    """
    try:
        pieces = chunked_iterator(rows) if isinstance(rows, QuerySet) else rows
    except ValueError:
        return rows
    return pieces._up_to_now()


def _number_of(items: Any) -> int | None:
    if isinstance(items, ChunkedIterator):
        return items.count()
    return len(items) if isinstance(items, Sized) else None
