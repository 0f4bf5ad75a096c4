"""SQLite: embedded in the process, so there is no connection to lose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import Vendor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Driver


class SQLite(Vendor):
    """SQLite. It has no drivers here: its connections are left alone."""

    name = "sqlite"
    title = "SQLite"
    drivers: ClassVar[Mapping[str, Driver]] = {}
    has_server = False
    refuses_unknown_options = True
