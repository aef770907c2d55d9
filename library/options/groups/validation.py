"""Options of the validation loss."""

from __future__ import annotations

from library.options.option import Group, Option, finite

GROUP = Group(
    "Validation",
    (
        Option(
            "--validation_split",
            "The share of the images that is kept from training to validate on, from 0 to 1.",
            finite,
            0.0,
        ),
        Option("--validation_seed", "The seed of that split and of the validation's noise. Unset, it is --seed.", int),
        Option("--validate_every_n_steps", "Validate every N steps.", int),
        Option("--validate_every_n_epochs", "Validate at the end of every Nth epoch. Unset, every epoch.", int),
        Option("--max_validation_steps", "The most batches that one validation takes. Unset, all.", int),
    ),
)
