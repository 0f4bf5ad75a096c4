"""The suite's settings. The servers are started by the fixtures; their addresses are known now."""

from __future__ import annotations

from tests.servers import MariaDBServer, PostgreSQLServer
from tests.servers.base import shared
from tests.servers.keeper import RUN

SECRET_KEY = "only-for-tests"
USE_TZ = True
ROOT_URLCONF = "tests.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["django_dbhealth", "tests.app"]

DATABASES = {
    "default": shared(MariaDBServer).django(),
    "postgresql": shared(PostgreSQLServer).django(),
    "sqlite": {"ENGINE": "django.db.backends.sqlite3", "NAME": RUN / "db.sqlite3"},
}
