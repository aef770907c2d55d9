"""A progress bar where there is a terminal, and a line every so often where there is none."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts towards a total. `note` shows values beside the count."""

    def __init__(self, total: int, title: str, start: int = 0, shown: bool = True):
        """shown: False on all processes but the first."""
        self.total, self.title, self.count, self.shown = total, title, start, shown
        self.started, self.first = time.monotonic(), start
        self.last_line = self.started
        self.values: dict[str, object] = {}
        self.bar: tqdm[object] | None = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=title, smoothing=0.05, dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        self.count += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and (self._line_is_due() or self.count == self.total):
            self.last_line = time.monotonic()
            logger.info(self.line())

    def starts_now(self) -> None:
        """Before the first advance: what took time until now was no part of the work."""
        if self.count == self.first:
            self.started = self.last_line = time.monotonic()
            if self.bar is not None:
                self.bar.unpause()

    def note(self, **values: object) -> None:
        self.values = values
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)

    def line(self) -> str:
        """title 12/100 (12 %), 0.85 s each, 1:15 left, loss=0.123"""
        done = self.count - self.first
        each = (time.monotonic() - self.started) / max(1, done)
        shown = "".join(f", {name}={value}" for name, value in self.values.items())
        share = 100 * self.count // max(1, self.total)
        return f"{self.title} {self.count}/{self.total} ({share} %), {each:.2f} s each, {clock(each * (self.total - self.count))} left{shown}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line_is_due(self) -> bool:
        return time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES


def clock(seconds: float) -> str:
    """1:05 or 2:01:05"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_bar(items: Iterable[T], title: str, shown: bool = True, total: int | None = None) -> Iterator[T]:
    """The items, with progress shown where there are several. total: how many, where `items` does not know it."""
    if total is None:
        items = list(items)
        total = len(items)
    progress = Progress(total, title, shown=shown and total > 1)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.close()
