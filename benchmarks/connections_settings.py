"""A project as `startproject` makes it, with django_dbhealth: what Django's own start-up is."""

from __future__ import annotations

import environ

env = environ.Env()

SECRET_KEY = "only-for-benchmarks"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django_dbhealth",
    "tests.app",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
DATABASES = {"default": env.db_url("DATABASE_URL")}
