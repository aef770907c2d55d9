#!/usr/bin/env python3
"""Train LoRA for Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large. See docs/sd3_train_network.md, or --help."""

from __future__ import annotations

import sys
from library.options.errors import UserError
from library.options.resolve import resolve_options


def main(arguments: list[str] | None = None) -> int:
    """0: trained. 2: the user is to mend something, which has been said. Anything else is a bug and shows its traceback."""
    try:
        options = resolve_options(sys.argv[1:] if arguments is None else arguments)
        from library.sd3_trainer import Sd3NetworkTrainer

        Sd3NetworkTrainer(options.args, options.problems).train()
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
