"""Options of logs, trackers and the report."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Logging and report",
    (
        Option(
            "--console_log_level",
            "The least severe messages that are shown. Unset, it is INFO.",
            str,
            None,
            ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        ),
        Option("--console_log_file", "Write the messages to this file instead of the console.", path),
        switch("--console_log_simple", "Plain messages without colours and columns."),
        Option("--logging_dir", "The folder for training logs; each run gets a subfolder with its time.", path),
        Option(
            "--log_with",
            "The tracker: tensorboard, wandb or all. Unset, it is tensorboard where --logging_dir is given.",
            str,
            None,
            ("tensorboard", "wandb", "all"),
        ),
        Option("--log_prefix", "Text that is put before the time in the log folder's name."),
        Option("--log_tracker_name", "The tracker's name for the project. Unset, it is network_train."),
        Option("--log_tracker_config", "A TOML file with arguments for the tracker.", path),
        switch("--log_config", "Send the options, without secrets, to the trackers."),
        Option("--wandb_run_name", "The run's name in Weights & Biases."),
        Option(
            "--wandb_api_key", "The key to log in to Weights & Biases with. It is never written anywhere.", secret=True
        ),
        switch(
            "--report",
            "Keep a report.html in --output_dir: curves, previews, dataset and options in one file.",
            default=True,
        ),
        Option("--no_report", "Write no report.", bool, True, turns_off="report"),
    ),
)
