"""Settings for processes that never connect."""

from __future__ import annotations

SECRET_KEY = "only-for-tests"
INSTALLED_APPS = ["django_dbhealth"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "mysql": {"ENGINE": "django.db.backends.mysql", "NAME": "nowhere"},
}
