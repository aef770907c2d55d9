"""A run planned in this process, as --dry_run plans it."""

from __future__ import annotations

from collections.abc import Sequence

from library.options.resolve import resolve_options
from library.preflight.plan import RunPlan
from sd3_train_network import Sd3NetworkTrainer


def plan_of(words: Sequence[str]) -> RunPlan:
    """The plan of a command. UserError as the command has it."""
    options = resolve_options([*words, "--dry_run"])
    trainer = Sd3NetworkTrainer(options.args, options.problems)
    trainer.start()
    trainer.prepare()
    return trainer.plan
