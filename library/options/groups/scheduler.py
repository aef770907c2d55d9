"""Options of the learning rate's course."""

from __future__ import annotations

from library.options.option import Group, Option, finite, int_or_float

GROUP = Group(
    "Learning rate schedule",
    (
        Option(
            "--lr_scheduler",
            "The schedule: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, piecewise_constant and others of transformers.",
            str,
            "constant",
        ),
        Option(
            "--lr_scheduler_type",
            "A scheduler class of your own, as a dotted import path. It wins over --lr_scheduler.",
            str,
            "",
        ),
        Option("--lr_scheduler_args", "Arguments of the schedule as key=value.", str, nargs="*"),
        Option(
            "--lr_warmup_steps",
            "Over how many steps the learning rate rises from zero; a number below 1 or with % is a share of all steps.",
            int_or_float,
            0,
        ),
        Option(
            "--lr_decay_steps",
            "Over how many steps it falls at the end, for warmup_stable_decay; a number below 1 or with % is a share of all steps.",
            int_or_float,
            0,
        ),
        Option("--lr_scheduler_num_cycles", "How many cycles the schedules with restarts have.", int, 1),
        Option("--lr_scheduler_power", "The exponent of the polynomial schedule.", finite, 1),
        Option("--lr_scheduler_timescale", "The time scale of inverse_sqrt, in steps. Unset, it is the warm-up.", int),
        Option(
            "--lr_scheduler_min_lr_ratio",
            "The lowest learning rate, as a share of the full one, for schedules that have such a floor.",
            finite,
        ),
    ),
)
