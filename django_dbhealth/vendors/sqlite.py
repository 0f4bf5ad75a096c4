"""SQLite: embedded in the process, so there is no connection to lose."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, ClassVar

from .base import Vendor
from .server import ServerState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from django.db.backends.base.base import BaseDatabaseWrapper

    from .base import Driver


class SQLite(Vendor):
    """SQLite. It has no drivers here: its connections are left alone."""

    name = "sqlite"
    title = "SQLite"
    drivers: ClassVar[Mapping[str, Driver]] = {}
    has_server = False
    refuses_unknown_options = True

    def server_state(self, connection: BaseDatabaseWrapper) -> ServerState:
        return ServerState(
            product=self.title,
            version=sqlite3.sqlite_version,
            unseen=("There is nothing to ask: SQLite is part of this process.",),
        )
