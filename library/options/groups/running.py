"""Options that say what the program does: train, look, or write its options down."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Running",
    (
        Option(
            "--config_file", "A TOML file with values for any of these options. The command line wins over it.", path
        ),
        switch(
            "--output_config",
            "Write the options that differ from their defaults to --config_file, without secrets, and end.",
        ),
        switch(
            "--dry_run",
            "Check everything, print the dataset, the steps and the memory, and end before any weights are read.",
        ),
        switch(
            "--debug_dataset",
            "Show what training will see, as sheets of the cropped images with their captions, and end.",
        ),
    ),
)
