"""When to try a refused connection again: arithmetic that takes ``now``, no clock, no sleep."""

from __future__ import annotations

import random

FIRST_DELAY = 0.1  # seconds: a closed connection holds its slot for some milliseconds
LONGEST_DELAY = 5.0  # seconds: a server that is back should not wait for its clients


class Backoff:
    """Delays that double, each shortened at random by up to a half, until the time is over.

    Without the jitter all that were refused at one moment would come back at one moment.
    """

    def __init__(self, *, now: float, timeout: float) -> None:
        self._give_up_at = now + timeout
        self._delay = FIRST_DELAY

    def next_delay(self, now: float) -> float | None:
        """Return the seconds to wait before the next try, None when the time is over.

        The last try is made at the end of the time.
        """
        if now >= self._give_up_at:
            return None
        delay = self._delay * random.uniform(0.5, 1.0)  # noqa: S311
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        return min(delay, self._give_up_at - now)
