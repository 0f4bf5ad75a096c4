"""``python -m django_dbhealth``: the dbhealth command, for a project that lacks the app."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import handle_default_options

from django_dbhealth.management.commands.dbhealth import Command

PROGRAM = "python -m"


def main(arguments: list[str]) -> None:
    """Run the command with the settings of DJANGO_SETTINGS_MODULE, or the DATABASE_URL."""
    command = Command()
    # Wrong usage ends with a sentence and 2. django-stubs does not know it.
    command._called_from_command_line = True  # type: ignore[attr-defined]
    argv = [PROGRAM, "django_dbhealth", *arguments]
    options = command.create_parser(*argv[:2]).parse_args(arguments)
    handle_default_options(options)
    if options.subcommand == "explain":
        settings.configure()  # nothing of a project's is needed, so nothing of it can be broken
    elif os.environ.get("DJANGO_SETTINGS_MODULE"):
        _import_settings()
    else:
        settings.configure(DATABASES={"default": _database_of_environment()}, USE_TZ=True)
    apps.populate([])  # a project's apps may use the database when they are loaded
    command.run_from_argv(argv)


def _import_settings() -> None:
    try:
        settings.DATABASES  # noqa: B018
    except (ImportError, ImproperlyConfigured) as error:
        _end(f"The settings cannot be used. {type(error).__name__}: {error}")


def _database_of_environment() -> dict[str, Any]:
    url = os.environ.get("DATABASE_URL")
    if not url:
        _end(
            "No database is named. Set DJANGO_SETTINGS_MODULE, or DATABASE_URL, or add "
            "--settings MODULE."
        )
    try:
        import environ  # type: ignore[import-untyped]
    except ImportError:
        _end("DATABASE_URL is read with django-environ: pip install django-environ")
    try:
        with warnings.catch_warnings(action="ignore"):  # they, and errors, may show the password
            database = dict(environ.Env.db_url_config(url))
    except (ImproperlyConfigured, ValueError):
        database = {}
    if not database.get("ENGINE"):
        _end("DATABASE_URL is no URL of a database: mysql://USER:PASSWORD@HOST:PORT/DATABASE")
    return database


def _end(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
