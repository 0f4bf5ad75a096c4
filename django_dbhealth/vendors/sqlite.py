"""SQLite: embedded in the process, so there is no connection to lose."""

from __future__ import annotations

from .base import Vendor


class SQLite(Vendor):
    """SQLite. It has no drivers here: its connections are left alone."""

    name = "sqlite"
    drivers = {}
    has_server = False
    refuses_unknown_options = True
