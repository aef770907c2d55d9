"""Options of training states: how a run goes on where it stopped."""

from __future__ import annotations

from library.options.option import Group, Option, switch

GROUP = Group(
    "States and resuming",
    (
        switch(
            "--save_state",
            "With every saved LoRA, and at the end, save all that is needed to go on exactly: optimizer, schedule, random states, position.",
        ),
        switch("--save_state_on_train_end", "Save the state at the end of training."),
        Option(
            "--save_last_n_epochs_state",
            "Keep the states of the last N saved epochs only. Unset, it is --save_last_n_epochs.",
            int,
        ),
        Option(
            "--save_last_n_steps_state",
            "Keep the step states of the last N steps only. Unset, it is --save_last_n_steps.",
            int,
        ),
        Option(
            "--resume",
            "Go on from this state folder; auto takes the newest whole state in --output_dir, or starts anew.",
        ),
        Option(
            "--initial_epoch",
            "Start with this epoch, counted from 1, as if those before it had been trained: steps, schedule and file names count from there.",
            int,
        ),
        Option(
            "--initial_step",
            "Start after this many steps, as if they had been trained: steps, schedule and file names count from there. It wins over the place of a state.",
            int,
        ),
        switch(
            "--skip_until_initial_step",
            "Pass over the data of the steps before the first one, as if they had been trained.",
        ),
    ),
)
