"""What happens to connections, for logs and metrics.

The sender is the connection's class, which is derived from the ENGINE's. Every signal has the
arguments ``alias``, ``reason`` (in plain words), ``idle_seconds`` (since the last statement that
succeeded, or a probe that was answered) and ``duration`` (seconds). An exception of a receiver is
logged by Django and goes no further.

``connection_lost``: it was found lost; ``duration`` is what finding it out took.
``connection_healed``: another took its place, nothing was lost; ``duration`` is the whole delay.
``connection_refused``: none could be opened; ``duration`` is the time since the first try.
"""

from __future__ import annotations

from django.dispatch import Signal

connection_lost = Signal()
connection_healed = Signal()
connection_refused = Signal()
