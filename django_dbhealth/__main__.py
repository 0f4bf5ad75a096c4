"""``python -m django_dbhealth``: the dbhealth command, for a project that lacks the app."""

from __future__ import annotations

import sys

from django.conf import settings

from django_dbhealth.management.commands.dbhealth import Command

if __name__ == "__main__":
    settings.configure()  # nothing of a project's is needed, so nothing of it can be broken
    Command().run_from_argv(["python -m", "django_dbhealth", *sys.argv[1:]])
