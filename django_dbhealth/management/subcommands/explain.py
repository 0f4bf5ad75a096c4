"""``dbhealth explain``: what an error means. No database is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.management.base import CommandError

from django_dbhealth.explanations import find, nearest

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from .base import Run

HELP = "what an error means, whether its statement ran, and what to do"
DESCRIPTION = """\
Says what an error of MySQL, MariaDB, PostgreSQL or one of their drivers means,
whether its statement ran, and what to do. Only errors that concern connections
are listed. No database is asked.

The error is given by its number, its SQLSTATE, its name in the manual, or its
text or a part of it:

  dbhealth explain 2006
  dbhealth explain 57P05
  dbhealth explain ER_USER_LIMIT_REACHED
  dbhealth explain Lost connection
  dbhealth explain "(1226, \\"User 'shop' has exceeded the 'max_user_connections' resource\\")"

Exit status: 0 it is known, 2 it is not (the nearest ones are named).
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("error", nargs="+", metavar="ERROR", help="its code, its name or its text")


def run(run: Run, *, error: list[str], **options: Any) -> None:
    """Say what is known of the error."""
    query = " ".join(error)
    found = find(query)
    if run.as_json:
        run.print_json([each.as_dict() for each in found])
    elif found:
        run.out.write("\n\n".join(each.in_words(run.screen.width) for each in found))
    if not found:
        raise CommandError(_unknown(query), returncode=2)


def _unknown(query: str) -> str:
    near = "".join(f"\n  {each}" for each in nearest(query))
    more = f" The nearest:{near}" if near else ""
    return f"{query!r} is not known: only errors that concern connections are listed here.{more}"
