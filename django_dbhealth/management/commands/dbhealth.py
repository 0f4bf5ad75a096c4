"""``manage.py dbhealth``: what the servers say, and what the databases' errors mean."""

from __future__ import annotations

import copy
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS

from django_dbhealth.asking import Target, vendor_of_alias
from django_dbhealth.conf import closest
from django_dbhealth.health import aliases
from django_dbhealth.management.output import PatientOutput
from django_dbhealth.management.screen import Screen, in_lines
from django_dbhealth.management.subcommands import connections as listing
from django_dbhealth.management.subcommands import explain, report, terminate, wait
from django_dbhealth.management.subcommands.base import Run, seconds

if TYPE_CHECKING:
    from argparse import ArgumentParser, _ActionsContainer

    from django.core.management.base import CommandParser

SUBCOMMANDS: dict[str, Any] = {
    "report": report,
    "connections": listing,
    "terminate": terminate,
    "wait": wait,
    "explain": explain,
}
SLOT_TIMEOUT = 10.0  # seconds
INTERRUPTED = 130  # what a shell makes of SIGINT


class Command(BaseCommand):
    help = "Asks the databases' servers how they are. See dbhealth SUBCOMMAND --help."
    requires_system_checks: tuple[str, ...] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        inherited = [action for action in parser._actions if action.dest != "help"]
        add_format(parser)
        add_targets(parser)
        parser.set_defaults(module=report)
        subcommands = parser.add_subparsers(
            title="subcommands", dest="subcommand", metavar="SUBCOMMAND"
        )
        for name, module in SUBCOMMANDS.items():
            subparser = subcommands.add_parser(
                name,
                help=module.HELP,
                description=module.DESCRIPTION,
                formatter_class=RawDescriptionHelpFormatter,
            )
            module.add_arguments(subparser)
            subparser.set_defaults(module=module)
            add_format(subparser, default=SUPPRESS)
            if module is not explain:
                add_targets(subparser, is_again=True)
            add_again(subparser, inherited)

    def run_from_argv(self, argv: list[str]) -> None:
        try:
            super().run_from_argv(argv)
        except KeyboardInterrupt:
            self.stderr.write()
            sys.exit(INTERRUPTED)

    def handle(self, *args: Any, module: Any, **options: Any) -> None:
        output = PatientOutput.over(self.stdout)
        run = Run(
            out=output,
            err=PatientOutput.over(self.stderr),
            screen=Screen(output, color=_wants_color(output, options)),
            as_json=options["format"] == "json",
            targets=() if module is explain else self._targets(**options),
        )
        try:
            module.run(run, **options)
        finally:
            output.flush()
        if run.failures:
            used = len(f"{CommandError.__name__}: ")
            lines = [in_lines(each, self.stderr, used=used) for each in run.failures]
            raise CommandError("\n".join(lines))

    def _targets(
        self,
        *,
        database: list[str],
        more_databases: list[str] | None = None,
        using_alias: str | None,
        wait: float,
        **options: Any,
    ) -> list[Target]:
        asked = [*database, *(more_databases or [])]
        try:
            known = aliases()
        except ImproperlyConfigured as error:
            raise CommandError(str(error), returncode=2) from None
        if not known:
            raise CommandError("DATABASES names no database.", returncode=2)
        default = [DEFAULT_DB_ALIAS] if using_alias else known
        targets = [
            Target(alias=alias, through=using_alias or alias, slot_timeout=wait, tell=self._tell)
            for alias in dict.fromkeys(asked or default)
        ]
        for target in targets:
            _check_alias(target.alias, known)
            _check_alias(target.through, known)
            _check_same_vendor(target)
        return targets

    def _tell(self, sentence: str) -> None:
        self.stderr.write(in_lines(sentence, self.stderr))


# Options. What stands before the subcommand, and is not said again, holds after it too.


def add_format(parser: ArgumentParser, default: str = "text") -> None:
    parser.add_argument(
        "--format", choices=("text", "json"), default=default, help="(default: text)"
    )


def add_targets(parser: ArgumentParser, *, is_again: bool = False) -> None:
    parser.add_argument(
        "--database",
        action="append",
        default=SUPPRESS if is_again else [],
        dest="more_databases" if is_again else "database",
        metavar="ALIAS",
        help="an alias of DATABASES, may be given several times (default: all)",
    )
    parser.add_argument(
        "--using-alias",
        default=SUPPRESS if is_again else None,
        metavar="ALIAS",
        help="ask through this alias instead, which leads to the same server with an account that "
        f"has a slot left (--database is then {DEFAULT_DB_ALIAS!r} if it is not given)",
    )
    parser.add_argument(
        "--wait",
        type=seconds,
        default=SUPPRESS if is_again else SLOT_TIMEOUT,
        metavar="SECONDS",
        help=f"for how long to wait for a free slot (default: {SLOT_TIMEOUT:g})",
    )


def add_again(parser: ArgumentParser, actions: list[Any]) -> None:
    """Add options of the whole command to a subcommand's."""
    group: _ActionsContainer = parser.add_argument_group("of every command")
    for action in actions:
        again = copy.copy(action)
        again.default = SUPPRESS
        group._add_action(again)


# What is asked


def _wants_color(output: PatientOutput, options: dict[str, Any]) -> bool:
    if options["no_color"]:
        return False
    return bool(options["force_color"]) or output.isatty()


def _check_alias(alias: str, known: list[str]) -> None:
    if alias in known:
        return
    near = closest(alias, known)
    guess = f"Did you mean {near!r}? " if near else ""
    raise CommandError(
        f"DATABASES has no alias {alias!r}. {guess}The aliases are: {', '.join(known)}.",
        returncode=2,
    )


def _check_same_vendor(target: Target) -> None:
    through, asked = vendor_of_alias(target.through), target.vendor
    if through is not asked and target.through != target.alias:
        raise CommandError(
            f"{target.through!r} and {target.alias!r} are on different kinds of servers, so the "
            "one cannot be asked through the other.",
            returncode=2,
        )
