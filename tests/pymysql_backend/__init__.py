"""Django's MySQL backend over PyMySQL, in one process with the one over mysqlclient.

`pymysql.install_as_MySQLdb()` is the users' way, and one for a whole process. Here Django's own
files are loaded a second time, under this package's name, while "MySQLdb" means PyMySQL.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import django.db.backends.mysql
import pymysql.constants
import pymysql.converters

if TYPE_CHECKING:
    from collections.abc import Iterator

__path__ = django.db.backends.mysql.__path__


@contextmanager
def in_disguise() -> Iterator[None]:
    """Let PyMySQL stand for MySQLdb in imports, and put back what stood there."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_mysqldb(name)}
    sys.modules["MySQLdb"] = pymysql
    sys.modules["MySQLdb.constants"] = pymysql.constants
    sys.modules["MySQLdb.converters"] = pymysql.converters
    try:
        yield
    finally:
        for name in filter(is_mysqldb, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(before)


def is_mysqldb(name: str) -> bool:
    return name.partition(".")[0] == "MySQLdb"


with in_disguise():
    importlib.import_module(f"{__name__}.base")
