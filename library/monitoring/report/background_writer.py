"""Writes the report beside training: in a thread, at most every half minute, and once more at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from library.common.files import write_text

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 30.0


class ReportWriter:
    """Calls `make(status)` for the page's text and writes it. A report that fails is a warning: training goes on."""

    def __init__(self, path: Path, make: Callable[[str], str], seconds_between: float = SECONDS_BETWEEN):
        self.path, self.make, self.seconds_between = path, make, seconds_between
        self._requested, self._closing = threading.Event(), False
        self._requested_at = -float("inf")
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Request a new report. Does nothing where the last request is younger than `seconds_between`."""
        now = time.monotonic()
        if now - self._requested_at >= self.seconds_between:
            self._requested_at = now
            self._requested.set()

    def close(self, status: str) -> None:
        """Write the last report, which says how the run ended."""
        self._closing = True
        self._requested.set()
        self._thread.join()
        self._write(status)

    def _work(self) -> None:
        while True:
            self._requested.wait()
            self._requested.clear()
            if self._closing:
                return
            self._write("training")

    def _write(self, status: str) -> None:
        try:
            write_text(self.path, self.make(status))
        except Exception as error:  # whatever it is, hours of training are worth more
            logger.warning("The report %s could not be written: %s: %s", self.path, type(error).__name__, error)
