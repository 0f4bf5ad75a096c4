"""The bare query for MariaDB's sessions, for benchmarks/connections.py to compare with."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand
from django.db import connection


class Command(BaseCommand):
    requires_system_checks: tuple[str, ...] = ()

    def handle(self, *args: Any, **options: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT * FROM information_schema.processlist")
            self.stdout.write(str(len(cursor.fetchall())))
