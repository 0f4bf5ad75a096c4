"""A process that holds guarded connections: `python -m tests.holder COUNT`.

It prints the sessions' numbers. A line on standard input is a query on each connection, after which
it prints them again; "sleep N" keeps connection N busy for a minute; "close" closes all.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import django
from django.db import connections

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBER = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
SLEEP = {"mysql": "SELECT SLEEP(60)", "postgresql": "SELECT pg_sleep(60)"}


def query(alias: str, statements: dict[str, str]) -> int:
    with connections[alias].cursor() as cursor:
        cursor.execute(statements[connections[alias].vendor])
        return int(cursor.fetchone()[0])


def main(count: int) -> None:
    aliases: Sequence[str] = [f"number{number}" for number in range(count)]
    for alias in aliases:
        connections.settings[alias] = connections.settings["default"]
    while True:
        print(*(query(alias, NUMBER) for alias in aliases), flush=True)
        line = sys.stdin.readline()
        if line.startswith("sleep "):
            query(aliases[int(line.removeprefix("sleep "))], SLEEP)
        if line.strip() == "close":
            connections.close_all()
            print("closed", flush=True)
            line = sys.stdin.readline()
        if not line:
            return


if __name__ == "__main__":
    django.setup()
    main(int(sys.argv[1]))
