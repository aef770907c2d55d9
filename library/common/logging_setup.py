"""Where log lines go: to the console, past a progress bar, or to a file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from library.common.errors import UserError


def process_rank() -> int:
    """This process's rank among all, as accelerate's launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def start_logging(level: str | None = None, file: str | None = None, simple: bool = False) -> None:
    """Log to the console, or to `file`. Rank 0 logs everything from `level` (INFO) on; other ranks log warnings only, to the console.

    simple: messages without time and level.
    """
    rank = process_rank()
    number = int(getattr(logging, level or "INFO"))  # getLevelNamesMapping is of Python 3.11
    layout = "%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler = log_file(file) if file and rank == 0 else ConsoleHandler()
    logging.basicConfig(
        level=number if rank == 0 else max(number, logging.WARNING),
        format=layout if rank == 0 else f"[process {rank}] {layout}",
        datefmt="%H:%M:%S",
        handlers=[handler],
        force=True,
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels


def log_file(path: str) -> logging.FileHandler:
    """A handler that writes to a new file. UserError where it can't be written."""
    try:
        return logging.FileHandler(path, "w", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--console_log_file {path} can't be written: {reason}. Name a file in a folder that exists."
        ) from None


class ConsoleHandler(logging.Handler):
    """Warnings and errors to stderr, everything else to stdout; progress bars are drawn again below the line."""

    def __init__(self, all_to_stderr: bool = False):
        """all_to_stderr: for programs whose stdout is their result."""
        super().__init__()
        self.lowest = logging.NOTSET if all_to_stderr else logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= self.lowest else sys.stdout
        try:
            text = self.format(record) + "\n"
            with progress_bars_hidden(stream):
                write_text(stream, text)
                stream.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def progress_bars_hidden(stream: TextIO) -> Iterator[None]:
    """Inside it, no progress bar is on the line to which `stream` writes."""
    tqdm = sys.modules.get("tqdm")  # before its import there is no bar
    if tqdm is None:
        yield
        return
    with tqdm.tqdm.external_write_mode(file=stream):
        yield


def write_text(stream: TextIO, text: str) -> None:
    """Write text with escapes in place of what the stream's encoding lacks, as stderr does by itself."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
