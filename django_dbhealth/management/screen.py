"""What a command shows: tables by rich on a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from contextlib import suppress
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.core.management.base import OutputWrapper

WIDE = 119  # characters of a line that has room for everything

# Also what would move the cursor or colour the terminal: the texts are other programs'.
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class Column(NamedTuple):
    """A column of a table. A flexible one is cut where the terminal is too narrow."""

    name: str
    is_number: bool = False
    is_flexible: bool = False
    needs_width: bool = False  # left out of a narrow terminal


class Screen:
    """Where a command writes. A pipe gets whole lines and never an escape code."""

    def __init__(self, output: OutputWrapper, *, color: bool) -> None:
        self._output = output
        is_terminal = output.isatty()
        self.width = shutil.get_terminal_size().columns - 1 if is_terminal else None  # of a line
        self._color = color and "NO_COLOR" not in os.environ
        self._has_rich = (is_terminal or color) and _writes_unicode(output) and _has_rich()

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line; on a terminal it is broken between words."""
        text = printable(text)
        if self.width:
            indent = " " * (len(text) - len(text.lstrip()) + 2)
            text = textwrap.fill(text, self.width, subsequent_indent=indent)
        if style and self._has_rich:
            text = self._rendered(_styled(text, style), no_wrap=True)
        self._write(text)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Write a table."""
        rows = [[printable(cell) for cell in row] for row in rows]
        if self.width and self.width < WIDE:
            kept = [index for index, column in enumerate(columns) if not column.needs_width]
            columns = [columns[index] for index in kept]
            rows = [[row[index] for index in kept] for row in rows]
        if self.width:
            rows = fitted(columns, rows, self.width)
        if self._has_rich:
            self._write(self._rendered(_rich_table(columns, rows)))
        else:
            self._write(aligned(columns, rows))

    def clear(self) -> None:
        """Begin a new page: on a terminal the old one goes, elsewhere it stays above."""
        self._output.write("\x1b[2J\x1b[H" if self.width else "", ending="" if self.width else "\n")

    def _write(self, text: str) -> None:
        encoding = getattr(self._output, "encoding", None) or "utf-8"
        self._output.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _rendered(self, renderable: Any, **options: Any) -> str:
        from rich.console import Console

        buffer = StringIO()
        console = Console(
            file=buffer,
            force_terminal=self._color,
            color_system="auto" if self._color else None,
            width=self.width or 160,
            highlight=False,
            emoji=False,
            markup=False,
        )
        console.print(renderable, **options)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def in_lines(text: str, output: OutputWrapper, *, used: int = 0) -> str:
    """Return a sentence as a terminal shows it best: no word is cut at its edge.

    ``used``: how many characters stand before it on its first line.
    """
    if not output.isatty():
        return text
    width = shutil.get_terminal_size().columns - 1
    return textwrap.fill(" " * used + text, width, subsequent_indent="  ").lstrip()


def printable(text: str) -> str:
    """Return a text of another program's as one line that does nothing to a terminal."""
    return _NOT_PRINTABLE.sub(" ", text)


GAP = 2  # between columns
NARROWEST = 8  # of a flexible column
CUT = "..."


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """Return the rows with the cells of flexible columns cut so that the table fits."""
    needed = [
        max(map(len, (column.name, *cells)))
        for column, cells in zip(columns, _transposed(columns, rows), strict=True)
    ]
    limit = max(needed)
    while limit > NARROWEST and _total(columns, needed, limit) > width:
        limit -= 1
    return [
        [
            _cut(cell, limit) if column.is_flexible else cell
            for column, cell in zip(columns, row, strict=True)
        ]
        for row in rows
    ]


def _transposed(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[row[index] for row in rows] for index in range(len(columns))]


def _total(columns: Sequence[Column], needed: Sequence[int], limit: int) -> int:
    widths = (
        min(each, limit) if column.is_flexible else each
        for column, each in zip(columns, needed, strict=True)
    )
    return sum(widths) + GAP * (len(columns) - 1)


def _cut(cell: str, limit: int) -> str:
    return cell if len(cell) <= limit else cell[: limit - len(CUT)] + CUT


def aligned(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as plain text; nothing in it is cut."""
    lines = [[column.name for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        (" " * GAP)
        .join(
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        .rstrip()
        for line in lines
    )


def _has_rich() -> bool:
    with suppress(ImportError):
        import rich  # noqa: F401

        return True
    return False


def _writes_unicode(output: OutputWrapper) -> bool:
    return (getattr(output, "encoding", None) or "").lower().startswith("utf")


def _styled(text: str, style: str) -> Any:
    from rich.text import Text

    return Text(text, style=style)


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(
            column.name,
            justify="right" if column.is_number else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
