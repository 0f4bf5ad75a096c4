"""What scripts/demo shows once everything is set up; run that instead of this file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import django
from django.db import connection
from django.db.utils import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from example_project import supplier  # noqa: E402
from tests.servers import MariaDBServer, ServerError  # noqa: E402

DAYS = 30
WAIT_TIMEOUT = 2
PAUSE = 4  # the server's timer may be late
# What the drivers and libraries say of a connection that the server dropped: docs, "explain".
GONE = {2006, 2013, 2026, 4031}
FRAME = re.compile(r'^  File "(.+?)", line (\d+), in (\S+)\n    (.+)$', re.MULTILINE)
MANAGE = ["python", "manage.py"]


class DiffersError(Exception):
    """Something did not happen as told."""


class CannotBeginError(Exception):
    """The database given cannot be used."""


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}\n{'-' * len(text)}")


def show_command(*command: str, **variables: str) -> None:
    words = [f"{name}={value}" for name, value in variables.items()]
    print("$", " ".join([*words, *MANAGE, *command]), flush=True)


def manage(
    *command: str, capture: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run manage.py as a user would, showing the command."""
    show_command(*command, **variables)
    pipe = subprocess.PIPE if capture else None
    return subprocess.run(
        [sys.executable, "manage.py", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHON_COLORS": "0", **variables},
        stdin=subprocess.DEVNULL,
        stderr=pipe,
        text=True,
        check=False,
    )


def expect(happened: bool, otherwise: str) -> None:
    if not happened:
        raise DiffersError(otherwise)


def saved() -> tuple[int, int]:
    """Return how many products and prices are in the database."""
    from example_project.models import Price, Product

    try:
        return Product.objects.count(), Price.objects.count()
    finally:
        connection.close()  # or it would be one more that the server drops


def main() -> int:
    begun = time.monotonic()
    try:
        with database() as (url, name):
            prepare(url)
            with tables(name):
                plain_command_dies()
                long_running_command_finishes()
                check_warns()
    except DiffersError as difference:
        print(f"\nNot as told: {difference}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except (CannotBeginError, ServerError) as reason:
        print(f"scripts/demo: {reason}", file=sys.stderr)
        return 2
    before = int(os.environ.get("DEMO_SECONDS_BEFORE", "0"))
    took = time.monotonic() - begun
    print(f"\nAs told, in {took + before:.0f} s ({before} s of them set-up).")
    return 0


@contextmanager
def database() -> Iterator[tuple[str, str]]:
    """Give a database URL and the name to show for it."""
    if url := os.environ.get("DATABASE_URL"):
        check_address(url)
        heading(f"1. Your server, with wait_timeout = {WAIT_TIMEOUT} s for the demo's sessions")
        yield with_wait_timeout(url), without_password(url)
        return
    heading(f"1. A private MariaDB with wait_timeout = {WAIT_TIMEOUT} s")
    with MariaDBServer(wait_timeout=WAIT_TIMEOUT) as server:
        server.create_database("shop")
        url = server.url("shop", transport="tcp")
        yield url, without_password(url)


def check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        complete = parts.path.strip("/") and (parts.hostname or parts.query) and parts.port != 0
    except ValueError as error:
        message = f"DATABASE_URL: {error}."
        raise CannotBeginError(message) from None
    if not complete:
        message = (
            "DATABASE_URL names no host or no database: mysql://USER:PASSWORD@HOST:PORT/DATABASE"
        )
        raise CannotBeginError(message)


def with_wait_timeout(url: str) -> str:
    """Add the init_command that gives this session the demo's idle timeout."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if "init_command" in options:
        print("The init_command of DATABASE_URL is replaced for the demo.")
    options["init_command"] = f"SET SESSION wait_timeout={WAIT_TIMEOUT}"
    return urlunsplit(parts._replace(query=urlencode(options, quote_via=quote)))


def without_password(url: str) -> str:
    parts = urlsplit(url)
    account = parts.username or ""
    if parts.password:
        account += ":***"
    at = "@" if account else ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{account}{at}{parts.hostname or ''}{port}{parts.path}"


def prepare(url: str) -> None:
    """Make the example project's settings ours, here and in the commands run from here."""
    for name in ("CONN_MAX_AGE", "DEBUG"):
        os.environ.pop(name, None)
    os.environ["DATABASE_URL"] = url
    os.environ["DJANGO_SETTINGS_MODULE"] = "example_project.settings"
    os.environ["PLAIN_DJANGO"] = "1"  # What counts and cleans up here is not what is shown.
    django.setup()
    del os.environ["PLAIN_DJANGO"]
    print(f"$ export DATABASE_URL={without_password(url)}")


@contextmanager
def tables(name: str) -> Iterator[None]:
    """Make the example project's tables; afterwards remove those that were not there before."""
    before = inspect(name)
    shop_tables = {"example_project_product", "example_project_price"}
    if shop_tables & before and saved_in(shop_tables & before):
        message = (
            f"{name} has rows in {' and '.join(sorted(shop_tables & before))} that are not the "
            "demo's; nothing was changed. Give it another database, or empty these tables."
        )
        raise CannotBeginError(message)
    try:
        applied = manage("migrate", "--verbosity", "0", "--skip-checks")
        expect(applied.returncode == 0, "migrate failed")
        yield
    finally:
        clean_up(before, shop_tables)


def inspect(name: str) -> set[str]:
    """Return the tables that the database has, having said what it is."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT VERSION(), @@SESSION.wait_timeout")
            version, wait_timeout = cursor.fetchone()
            print(f"{version} at {name}, wait_timeout {wait_timeout}")
            return set(connection.introspection.table_names(cursor))
    except DatabaseError as error:
        raise CannotBeginError(f"{name} cannot be used: {error}") from None
    finally:
        connection.close()


def saved_in(names: set[str]) -> bool:
    try:
        with connection.cursor() as cursor:
            for name in names:
                cursor.execute(f"SELECT 1 FROM {connection.ops.quote_name(name)} LIMIT 1")
                if cursor.fetchone():
                    return True
        return False
    finally:
        connection.close()


def clean_up(before: set[str], shop_tables: set[str]) -> None:
    """Drop the tables and the migration records that the demo made; empty those it found empty."""
    quote_name = connection.ops.quote_name
    try:
        with connection.cursor() as cursor:
            there = set(connection.introspection.table_names(cursor))
            for table in ("example_project_price", "example_project_product"):
                if table in before:
                    cursor.execute(f"DELETE FROM {quote_name(table)}")
                elif table in there:
                    cursor.execute(f"DROP TABLE {quote_name(table)}")
            if "django_migrations" in there - before:
                cursor.execute("DROP TABLE django_migrations")
            elif "django_migrations" in there and not shop_tables & before:
                cursor.execute("DELETE FROM django_migrations WHERE app = 'example_project'")
    finally:
        connection.close()


def plain_command_dies() -> None:
    heading(f"2. Plain Django: a query, {PAUSE} s of waiting for a supplier, a query")
    run = manage("refresh_prices_plain", "--pause", str(PAUSE), capture=True, PLAIN_DJANGO="1")
    show_traceback(run.stderr)
    _, prices = saved()
    print(f"Exit status {run.returncode}; {prices} prices saved.")
    error = re.search(r"^django\.db\.utils\.\w+: \((\d+), ", run.stderr, re.MULTILINE)
    expect(run.returncode != 0, "the plain command did not fail")
    expect(
        error is not None and int(error[1]) in GONE,
        f"the plain command did not fail of a lost connection ({sorted(GONE)})",
    )
    expect(prices == 0, f"the plain command saved {prices} prices; 0 were expected")


def show_traceback(stderr: str) -> None:
    """Print the project's own frames of the last traceback, and its last line."""
    last = stderr[stderr.rfind("Traceback (most recent call last):") :].rstrip()
    print("  Traceback (most recent call last):\n    ...")
    for path, line, function, source in FRAME.findall(last):
        file = Path(path)
        if file.is_relative_to(ROOT / "example_project"):
            print(f'    File "{file.relative_to(ROOT)}", line {line}, in {function}')
            print(f"      {source}")
    print("    ...")
    print(f"  {last.splitlines()[-1] if last else 'none'}")


def long_running_command_finishes() -> None:
    heading("3. The same work as a LongRunningCommand")
    run = manage("refresh_prices", "--pause", str(PAUSE))
    expected = sum(len(day.prices) for day in supplier.download(days=DAYS, pause=0))
    products, prices = saved()
    print(
        f"Exit status {run.returncode}; {prices} of {expected} prices saved ({products} products)."
    )
    expect(run.returncode == 0, f"refresh_prices ended with exit status {run.returncode}")
    expect(prices == expected, f"{prices} prices were saved; the input has {expected}")


def check_warns() -> None:
    heading("4. What would have said so: persistent connections that outlive the server's patience")
    run = manage("check", "--deploy", capture=True, CONN_MAX_AGE="600")
    print(run.stderr.rstrip())
    expect(run.returncode == 0, f"check --deploy ended with exit status {run.returncode}")
    expect(
        "django_dbhealth." in run.stderr and "CONN_MAX_AGE" in run.stderr and "600" in run.stderr,
        "check --deploy did not warn about CONN_MAX_AGE=600",
    )


if __name__ == "__main__":
    sys.exit(main())
