"""The settings of Django's own tests, those of test_sqlite.py, on the databases given."""

from __future__ import annotations

import json
import os

from test_sqlite import *  # noqa: F403 - a module beside runtests.py

DATABASES = json.loads(os.environ["DJANGO_SUITE_DATABASES"])
TEST_RUNNER = "django_suite.runner.RecordingRunner"
