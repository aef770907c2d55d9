"""Shared by the two caching tools: the trainer's own options and its own caching, without training."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.common.errors import UserError
from library.common.logging_setup import start_logging
from library.options.parser import build_parser
from library.options.resolve import resolve_options

if TYPE_CHECKING:
    from sd3_train_network import Sd3NetworkTrainer


def run_cache(
    tool: str,
    description: str | None,
    arguments: list[str] | None,
    switch: str,
    fill: Callable[[Sd3NetworkTrainer], None],
) -> int:
    """Fill a cache with the options of sd3_train_network.py. Those of the LoRA and its output may be left out.

    tool, description: the file's name and docstring, for --help.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        build_parser(tool, description or "").print_help()
        return 0
    with tempfile.TemporaryDirectory() as unused:
        defaults = {"--output_dir": unused, "--network_module": "networks.lora_sd3"}
        options_in_use = {word.split("=")[0] for word in words}
        for option, value in defaults.items():
            words += [] if option in options_in_use else [option, value]
        try:
            options = resolve_options([*words, switch])
            if options.args.output_config:
                raise UserError("--output_config is for sd3_train_network.py, which reads and writes the same files.")
            args = options.args
            start_logging(args.console_log_level, args.console_log_file, args.console_log_simple)
            from sd3_train_network import Sd3NetworkTrainer

            trainer = Sd3NetworkTrainer(options.args, options.problems)
            trainer.start()
            trainer.prepare()
            if options.args.dry_run or options.args.debug_dataset:
                trainer.show_plan()
            else:
                fill(trainer)
        except UserError as error:
            print(error.as_text(), file=sys.stderr)
            return 2
    return 0
