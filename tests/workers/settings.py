"""Settings of the workers, each of which is a process of its own."""

from __future__ import annotations

import environ

env = environ.Env()

SECRET_KEY = "only-for-tests"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_dbhealth", "tests.app", "django_tasks_db"]
if env.bool("PLAIN_DJANGO"):
    INSTALLED_APPS.remove("django_dbhealth")
DATABASES = {"default": {**env.db_url("DATABASE_URL"), "CONN_MAX_AGE": 600}}
DBHEALTH = {"SERVER_IDLE_TIMEOUT": 2, "CONNECT_RETRY_TIMEOUT": 30}
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend", "QUEUES": []}}
