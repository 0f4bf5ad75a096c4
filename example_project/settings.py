"""Settings of the example project. Look for "Edit 1", "Edit 2" and "Edit 3": they are all that
django-dbhealth asks of a project.

Read from the environment:

DATABASE_URL    Which database; an SQLite file beside manage.py until told otherwise.
                mysql://shop:secret@127.0.0.1:3306/shop?init_command=SET%20SESSION%20wait_timeout%3D2
CONN_MAX_AGE    Seconds for which requests may reuse a connection; Django's default is 0.
DEBUG           true or false; false until told otherwise.
PLAIN_DJANGO    1 leaves django_dbhealth out of INSTALLED_APPS: the same project without its care.

For a site there is one line more, in MIDDLEWARE, and two in urls.py.
"""

from __future__ import annotations

from pathlib import Path

import environ

env = environ.Env()

BASE_DIR = Path(__file__).resolve().parent.parent

# Nothing is signed here: a real project reads its own key from the environment.
SECRET_KEY = env.str("SECRET_KEY", default="the example project signs nothing with this key")
DEBUG = env.bool("DEBUG", default=False)
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]

# Edit 1: add the app, first.
INSTALLED_APPS = [
    "django_dbhealth",
    "example_project",
]
if env.bool("PLAIN_DJANGO", default=False):
    INSTALLED_APPS.remove("django_dbhealth")

DATABASES = {
    "default": env.db_url("DATABASE_URL", default=f"sqlite:///{BASE_DIR / 'db.sqlite3'}"),
}
if "CONN_MAX_AGE" in env.ENVIRON:
    DATABASES["default"]["CONN_MAX_AGE"] = env.int("CONN_MAX_AGE")

# Edit 2: say after how many seconds your host drops an idle connection. 300 is what is assumed
# of MySQL and MariaDB when nothing is said; ask your host, or SELECT @@SESSION.wait_timeout.
DBHEALTH = {
    "SERVER_IDLE_TIMEOUT": 300 if DATABASES["default"]["ENGINE"].endswith("mysql") else None,
}

# Edit 3 is in management/commands/refresh_prices.py: LongRunningCommand instead of BaseCommand.

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "example_project.urls"
WSGI_APPLICATION = "example_project.wsgi.application"
MIDDLEWARE = [
    "django_dbhealth.middleware.DatabaseUnavailableMiddleware",
]
TEMPLATES = [
    {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True},
]
TIME_ZONE = "UTC"
USE_TZ = True

# It is served on this machine only: `check --deploy` need not speak of HTTPS and cookies.
SILENCED_SYSTEM_CHECKS = [
    "security.W001",
    "security.W002",
    "security.W003",
    "security.W004",
    "security.W008",
    "security.W009",
]

# Where there is no terminal (cron, systemd, Docker) steps and progress go to this logger.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"django_dbhealth": {"handlers": ["console"], "level": "INFO"}},
}
