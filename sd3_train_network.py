#!/usr/bin/env python3
"""Train LoRA for Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large. See docs/sd3_train_network.md, or --help."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from library.common.errors import UserError
from library.options.config_file import write_config
from library.options.resolve import resolve_options


def main(arguments: list[str] | None = None) -> int:
    """0: done. 2: there is something for the user to mend, which has been said. 130: Ctrl-C. Else it is a bug and shows its traceback.

    A run that is told to stop in training saves everything and raises SystemExit with 130 or 143.
    """
    try:
        options = resolve_options(arguments)
        if options.args.output_config:
            print(f"Options written to {write_config(options.as_given)}")
            return 0
        start_logging(options.args)
        for warning in options.warnings if process_rank() == 0 else ():
            logging.getLogger(__name__).warning(warning)
        from library.sd3_trainer import Sd3NetworkTrainer  # torch is loaded only when the command line is in order

        Sd3NetworkTrainer(options.args, options.problems).train()
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in training it is caught, and everything is saved
        print("Stopped before training: nothing was lost, and caches that are written stay.", file=sys.stderr)
        return 130
    return 0


def process_rank() -> int:
    """This process's number among all, as accelerate's launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def start_logging(args: argparse.Namespace) -> None:
    """Log to the console, or to --console_log_file. Of several processes the first one tells all, the others their warnings."""
    rank = process_rank()
    level = logging.getLevelName(args.console_log_level or "INFO")
    plain = "%(message)s" if args.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    file = args.console_log_file if rank == 0 else None
    logging.basicConfig(
        level=level if rank == 0 else max(level, logging.WARNING),
        format=plain if rank == 0 else f"[process {rank}] {plain}",
        datefmt="%H:%M:%S",
        filename=file,
        filemode="w" if file else "a",
        force=True,
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels


if __name__ == "__main__":
    sys.exit(main())
