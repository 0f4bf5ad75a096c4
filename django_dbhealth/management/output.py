"""Output that survives its reader: a terminal that was closed, a pipe that nobody reads."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from django.core.management.base import OutputWrapper

if TYPE_CHECKING:
    from collections.abc import Callable

READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe, a terminal

logger = logging.getLogger("django_dbhealth.command")


class PatientOutput(OutputWrapper):
    """Django's OutputWrapper; once nobody reads it any more it is quiet instead of an error."""

    _out: Any  # a stream, or None in a process that was started without it
    is_given_up = False  # nobody reads it any more

    @classmethod
    def over(cls, output: OutputWrapper) -> Self:
        """Return a patient one with the stream and the style of another."""
        patient = cls(cast("TextIO", output._out), output.ending)
        patient.style_func = output.style_func
        return patient

    def write(  # type: ignore[override]  # django-stubs says the same of Django's
        self,
        msg: str = "",
        style_func: Callable[[str], str] | None = None,
        ending: str | None = None,
    ) -> None:
        if self._out is None:
            return
        try:
            super().write(msg, style_func, ending)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Send what is still buffered, and all that follows, nowhere.

        Only where the reader is gone: a full disk, for one, stays an error.

        The descriptor is replaced, not the stream: Python flushes that once more when it ends.
        """
        if error.errno not in READER_GONE:
            raise error
        self.is_given_up = True
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self._out.fileno())
        os.close(descriptor)
        logger.warning("Nobody reads the output any more (%s); the work goes on.", error)
