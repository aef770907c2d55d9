"""Where log lines go: the console, or a file."""

from __future__ import annotations

import logging
import os

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
    target = file if rank == 0 else None
    try:
        logging.basicConfig(
            level=number if rank == 0 else max(number, logging.WARNING),
            format=layout if rank == 0 else f"[process {rank}] {layout}",
            datefmt="%H:%M:%S",
            filename=target,
            filemode="w" if target else "a",
            force=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--console_log_file {file} can't be written: {reason}. Name a file in a folder that exists."
        ) from None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels
