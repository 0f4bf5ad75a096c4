"""A fault in plain words, and finding the one that somebody asks for."""

from __future__ import annotations

import difflib
import re
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

from .faults import Fault, KnownFault, Outcome
from .vendors import VENDORS

if TYPE_CHECKING:
    from collections.abc import Iterator


WIDTH = 88  # characters of a line: wider ones are hard to read


class Explanation(NamedTuple):
    """A fault, and whose it is."""

    database: str
    fault: Fault

    def in_words(self, width: int | None = None) -> str:
        """Return it as text, in lines of so many characters where that is less than ``WIDTH``."""
        fault = self.fault
        usable = "usable" if fault.connection_usable else "not usable"
        retry = "yes" if fault.safe_to_retry else "no"
        lines = (
            fault.meaning,
            f"What to do: {fault.advice}",
            f"The statement: {_OUTCOMES[fault.outcome]}.",
            f"The connection: {usable}. Safe to retry: {retry}. Kind: {fault.kind.value}.",
            f"Source: {fault.source}.",
            f"See {fault.anchor}",
        )
        width = min(width or WIDTH, WIDTH)
        indented = (_indented(line, width) for line in lines)
        return "\n".join([f"{fault.title} ({self.database})", *indented])

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        fault = self.fault
        return {
            "database": self.database,
            "code": fault.code,
            "name": fault.name,
            "variant": fault.variant,
            "kind": fault.kind.value,
            "outcome": fault.outcome.value,
            "connection_usable": fault.connection_usable,
            "safe_to_retry": fault.safe_to_retry,
            "meaning": fault.meaning,
            "advice": fault.advice,
            "messages": list(fault.messages),
            "source": fault.source,
            "docs": fault.anchor,
        }


def _indented(line: str, width: int) -> str:
    return textwrap.fill(
        line,
        width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


_OUTCOMES = {
    Outcome.NOT_EXECUTED: "it was not executed, or has changed nothing",
    Outcome.ROLLED_BACK: "it was rolled back, with its whole transaction",
    Outcome.UNKNOWN: "unknown, it may have run",
}


def explanations() -> list[Explanation]:
    """Return all faults, database by database, in the order of their tables."""
    found = (Explanation(title, known.fault) for title, known in _rows())
    return list(dict.fromkeys(found))


def find(query: str) -> list[Explanation]:
    """Return the faults with this code or name, or that a message, or a part of one, may be."""
    words = query.strip().lower()
    if not words:
        return []
    return (
        [each for each in explanations() if words in _names(each.fault)]
        or _with_code_in(query)
        or [each for each in explanations() if _reads_like(each.fault, words)]
    )


def nearest(query: str) -> list[str]:
    """Return the faults whose code, name or message is most like what was asked for."""
    titles = {
        text: each.fault.title
        for each in reversed(explanations())  # of two with one text the first one stays
        for text in _names(each.fault)
    }
    close = difflib.get_close_matches(query.strip().lower(), titles, n=5, cutoff=0.7)
    return list(dict.fromkeys(titles[text] for text in close))


def _rows() -> Iterator[tuple[str, KnownFault]]:
    for vendor in VENDORS.values():
        for known in vendor.faults:
            yield vendor.title, known


def _names(fault: Fault) -> list[str]:
    names = (str(fault.code), fault.name, fault.title, *fault.messages)
    return [name.lower() for name in names]


def _with_code_in(message: str) -> list[Explanation]:
    """Return the faults whose code stands in a message, those whose text does before others."""
    tokens = set(re.findall(r"\w{4,}", message.upper()))
    rows = [row for row in _rows() if str(row[1].fault.code) in tokens]
    told = [row for row in rows if any(text and text in message for text in row[1].texts)]
    return list(dict.fromkeys(Explanation(title, known.fault) for title, known in told or rows))


def _reads_like(fault: Fault, words: str) -> bool:
    texts = [text.lower() for text in (fault.name, *fault.messages)]
    return any(words in text or text in words for text in texts)
