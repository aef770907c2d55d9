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
        self._wanted, self._closing = threading.Event(), False
        self._asked_at = -float("inf")
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Something has changed; costs nothing where the report is young."""
        now = time.monotonic()
        if now - self._asked_at >= self.seconds_between:
            self._asked_at = now
            self._wanted.set()

    def close(self, status: str) -> None:
        """Write the last one, which tells how the run ended."""
        self._closing = True
        self._wanted.set()
        self._thread.join()
        self._write(status)

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing:
                return
            self._write("training")

    def _write(self, status: str) -> None:
        try:
            write_text(self.path, self.make(status))
        except Exception as error:  # whatever it is, hours of training are worth more
            logger.warning("The report %s could not be written: %s: %s", self.path, type(error).__name__, error)
