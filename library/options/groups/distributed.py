"""Options for several devices."""

from __future__ import annotations

from library.options.option import Group, Option

GROUP = Group(
    "Several devices",
    (
        Option(
            "--ddp_timeout",
            "How many minutes processes wait for each other before they give up. Unset, it is PyTorch's default.",
            int,
        ),
    ),
)
