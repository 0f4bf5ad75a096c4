"""Settings for a command in a process of its own, on the database of DATABASE_URL."""

from __future__ import annotations

import environ

env = environ.Env()

SECRET_KEY = "only-for-tests"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_dbhealth", "tests.app"]
DATABASES = {"default": env.db_url("DATABASE_URL")}
DBHEALTH = {"GUARD": env.bool("GUARD", default=True)}
if env.bool("SHOW_LOG", default=False):
    LOGGING = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "LOG %(levelname)s %(message)s"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
        "loggers": {"django_dbhealth": {"handlers": ["console"], "level": "INFO"}},
    }
