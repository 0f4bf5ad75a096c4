"""``manage.py dbhealth``: what the databases' errors mean."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError

from django_dbhealth.explanations import find, nearest

if TYPE_CHECKING:
    from django.core.management.base import CommandParser

EXPLAIN_HELP = """\
Says what an error of MySQL, MariaDB, PostgreSQL or one of their drivers means, whether its
statement ran, and what to do. Only errors that concern connections are listed. No
database is asked.

The error is given by its number, its SQLSTATE, its name in the manual, or its text or a part of it:

  dbhealth explain 2006
  dbhealth explain 57P05
  dbhealth explain ER_USER_LIMIT_REACHED
  dbhealth explain Lost connection
  dbhealth explain "(1226, \\"User 'shop' has exceeded the 'max_user_connections' resource\\")"

Exit status: 0 it is known, 2 it is not (the nearest ones are named).
"""


class Command(BaseCommand):
    help = "Explains errors of databases. See dbhealth SUBCOMMAND --help."
    requires_system_checks: tuple[str, ...] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        subcommands = parser.add_subparsers(
            title="subcommands", dest="subcommand", metavar="SUBCOMMAND", required=True
        )
        explain = subcommands.add_parser(
            "explain",
            help="what an error means, whether its statement ran, and what to do",
            description=EXPLAIN_HELP,
            formatter_class=RawDescriptionHelpFormatter,
        )
        explain.add_argument(
            "error", nargs="+", metavar="ERROR", help="its code, its name or its text"
        )
        explain.add_argument(
            "--format", choices=("text", "json"), default="text", help="(default: text)"
        )
        explain.set_defaults(run=self.explain)

    def handle(self, *args: Any, **options: Any) -> None:
        options["run"](**options)

    def explain(self, *, error: list[str], format: str, **options: Any) -> None:  # noqa: A002
        query = " ".join(error)
        found = find(query)
        if format == "json":
            self.stdout.write(json.dumps([each.as_dict() for each in found], indent=2))
        elif found:
            self.stdout.write("\n\n".join(map(str, found)))
        if not found:
            raise CommandError(_unknown(query), returncode=2)


def _unknown(query: str) -> str:
    near = "".join(f"\n  {each}" for each in nearest(query))
    more = f" The nearest:{near}" if near else ""
    return f"{query!r} is not known: only errors that concern connections are listed here.{more}"
