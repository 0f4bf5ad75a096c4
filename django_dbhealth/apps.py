from __future__ import annotations

from typing import Any

from django.apps import AppConfig


class DbHealthConfig(AppConfig):
    """Watches the connections, registers the checks."""

    name = "django_dbhealth"
    verbose_name = "Database health"

    def __init__(self, *args: Any) -> None:
        from .forks import forget_connections_after_fork
        from .threads import close_at_thread_end, close_what_ended_threads_left

        super().__init__(*args)
        # Not in ready(): until then other apps may open connections, in threads of theirs too.
        forget_connections_after_fork()
        close_at_thread_end()
        close_what_ended_threads_left()

    def ready(self) -> None:
        from .boundaries import note_opened_connections
        from .checks import register_checks
        from .handler import install_guard
        from .live_checks import register_live_checks

        install_guard()
        note_opened_connections()
        register_checks()
        register_live_checks()
