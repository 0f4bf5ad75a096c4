"""Settings for a site in a process of its own: what differs stands in its environment, as JSON."""

from __future__ import annotations

import json
import os

SECRET_KEY = "only-for-tests"
USE_TZ = True
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.site"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_dbhealth", "tests.app"]
MIDDLEWARE = ["django_dbhealth.middleware.DatabaseUnavailableMiddleware"]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
DATABASES = json.loads(os.environ["DATABASES"])
DBHEALTH = json.loads(os.environ.get("DBHEALTH", "{}"))
