"""``python -m django_dbhealth``: the dbhealth command, for a project that lacks the app."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from django_dbhealth.management.commands.dbhealth import Command

PROGRAM = "python -m"


def main(arguments: list[str]) -> None:
    """Run the command with the settings of DJANGO_SETTINGS_MODULE, or the DATABASE_URL."""
    command = Command()
    argv = [PROGRAM, "django_dbhealth", *arguments]
    options = command.create_parser(*argv[:2]).parse_args(arguments)
    if options.subcommand == "explain":
        settings.configure()  # nothing of a project's is needed, so nothing of it can be broken
    elif not (options.settings or os.environ.get("DJANGO_SETTINGS_MODULE")):
        settings.configure(DATABASES={"default": _database_of_environment()}, USE_TZ=True)
    command.run_from_argv(argv)


def _database_of_environment() -> dict[str, Any]:
    url = os.environ.get("DATABASE_URL")
    if not url:
        _end(
            "No database is named. Set DJANGO_SETTINGS_MODULE, or DATABASE_URL, or add "
            "--settings MODULE."
        )
    try:
        import environ
    except ImportError:
        _end("DATABASE_URL is read with django-environ: pip install django-environ")
    try:
        return dict(environ.Env.db_url_config(url))
    except (ImproperlyConfigured, ValueError):  # whose texts may have the password in them
        _end("DATABASE_URL is no URL of a database: mysql://USER:PASSWORD@HOST:PORT/DATABASE")


def _end(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
