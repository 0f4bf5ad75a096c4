"""One room per database: what is particular to a server or a driver stands here, nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .mysql import MySQL
from .postgresql import PostgreSQL
from .sqlite import SQLite

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from .base import Driver, Vendor

VENDORS: dict[str, Vendor] = {vendor.name: vendor for vendor in (MySQL(), PostgreSQL(), SQLite())}


def vendor_named(name: str) -> Vendor | None:
    """Return the vendor that Django's ``connection.vendor`` names, None for a foreign one."""
    return VENDORS.get(name)


def vendor_for_engine(engine: str) -> Vendor | None:
    """Return the vendor behind a DATABASES ENGINE, also one derived from Django's.

    The engine's module is imported, nothing is connected. None where it cannot be.
    """
    from django.core.exceptions import ImproperlyConfigured
    from django.db.utils import load_backend

    try:
        wrapper = load_backend(engine).DatabaseWrapper
    except (ImportError, ImproperlyConfigured, AttributeError):
        return None
    return vendor_named(wrapper.vendor)


def driver_of(connection: BaseDatabaseWrapper) -> Driver | None:
    """Return the driver of a Django connection, None for one that is not known here."""
    vendor = vendor_named(connection.vendor)
    return vendor.driver_of(connection) if vendor else None


def driver_behind(kind: type) -> tuple[Vendor, Driver] | None:
    """Return the driver whose class this is, a connection's or an error's."""
    packages = {each.__module__.partition(".")[0] for each in kind.__mro__}  # and its bases'
    for vendor in VENDORS.values():
        for module, driver in vendor.drivers.items():
            if module in packages:
                return vendor, driver
    return None
