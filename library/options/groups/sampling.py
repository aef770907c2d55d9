"""Options of the preview images."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

SAMPLERS = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
)
WORKING_SAMPLERS = ("euler", "k_euler", "heun", "dpmsolver++")

GROUP = Group(
    "Previews",
    (
        Option("--sample_prompts", "A file of prompts (.txt, .toml or .json) to draw previews of.", path),
        Option("--sample_every_n_steps", "Draw previews every N steps.", int),
        Option(
            "--sample_every_n_epochs",
            "Draw previews at the end of every Nth epoch. It wins over --sample_every_n_steps.",
            int,
        ),
        switch("--sample_at_first", "Draw previews before the first step, too."),
        Option(
            "--sample_sampler",
            "The sampler of previews: euler (k_euler), heun or dpmsolver++. The other names are for older models; Euler is used in their place.",
            str,
            "ddim",
            SAMPLERS,
        ),
    ),
)
