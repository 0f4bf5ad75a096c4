from __future__ import annotations

from django.apps import AppConfig


class DbHealthConfig(AppConfig):
    """Watches the connections, registers the checks."""

    name = "django_dbhealth"
    verbose_name = "Database health"

    def ready(self) -> None:
        from .boundaries import note_opened_connections
        from .checks import register_checks
        from .handler import install_guard

        install_guard()
        note_opened_connections()
        register_checks()
