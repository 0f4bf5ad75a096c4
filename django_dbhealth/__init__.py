"""Healthy database connections in long-running Django code.

The public names are loaded on first use, so that this package can be imported before the
settings are configured, and costs nothing until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .boundaries import (
        aclose_old_connections,
        close_old_connections,
        connection_boundary,
        connections_released,
    )
    from .chunks import chunked_iterator
    from .diagnosis import classify
    from .faults import Fault, Kind, Outcome
    from .management.base import LongRunningCommand
    from .registry import OpenConnection, open_connections

__all__ = [
    "Fault",
    "Kind",
    "LongRunningCommand",
    "OpenConnection",
    "Outcome",
    "aclose_old_connections",
    "chunked_iterator",
    "classify",
    "close_old_connections",
    "connection_boundary",
    "connections_released",
    "open_connections",
]

_MODULES = {
    "Fault": ".faults",
    "Kind": ".faults",
    "Outcome": ".faults",
    "classify": ".diagnosis",
    "LongRunningCommand": ".management.base",
    "OpenConnection": ".registry",
    "open_connections": ".registry",
    "aclose_old_connections": ".boundaries",
    "chunked_iterator": ".chunks",
    "close_old_connections": ".boundaries",
    "connection_boundary": ".boundaries",
    "connections_released": ".boundaries",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
