"""A small bureau de change: it sells foreign currencies at the European Central Bank's rates."""

from __future__ import annotations
