"""Options of the timesteps and of the loss."""

from __future__ import annotations

from library.options.option import Group, Option, finite, switch

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")

GROUP = Group(
    "Timesteps and loss",
    (
        Option(
            "--weighting_scheme",
            "How timesteps are drawn and how the loss is weighed by them. sigma_sqrt is the plain velocity loss; uniform, logit_normal and mode take the loss on the clean image.",
            str,
            "uniform",
            WEIGHTING_SCHEMES,
        ),
        Option(
            "--timestep_sampling",
            "How timesteps are drawn, apart from the loss. Unset, it is what --weighting_scheme says.",
            str,
            None,
            ("uniform", "logit_normal", "mode", "cosmap"),
        ),
        Option(
            "--loss_weighting",
            "How the loss is weighed, apart from the timesteps: on the clean image (x0), on the velocity, or by a formula. Unset, it is what --weighting_scheme says. The SD3 paper's recipe is logit_normal with velocity.",
            str,
            None,
            ("x0", "velocity", "sigma_sqrt", "cosmap"),
        ),
        Option(
            "--logit_mean",
            "The mean of the logit-normal density of timesteps. Above 0 there are more noisy ones.",
            finite,
            0.0,
        ),
        Option("--logit_std", "The standard deviation of the logit-normal density of timesteps.", finite, 1.0),
        Option("--mode_scale", "The scale of the mode density of timesteps.", finite, 1.29),
        Option("--training_shift", "Shifts the timesteps: above 1 there are more noisy ones.", finite, 1.0),
        switch("--resolution_shift", "Shift the timesteps by each image's resolution as well, as the SD3 paper does."),
        Option("--min_timestep", "The lowest timestep that is trained, from 0 to 999. Unset, it is 0.", int),
        Option(
            "--max_timestep", "The upper end of the timesteps that are trained, from 1 to 1000. Unset, it is 1000.", int
        ),
        Option(
            "--loss_type",
            "The loss of one value: squared (l2), absolute (l1), or a mixture of them (huber, smooth_l1).",
            str,
            "l2",
            ("l1", "l2", "huber", "smooth_l1"),
        ),
        Option(
            "--huber_schedule",
            "How the threshold of huber and smooth_l1 depends on the timestep.",
            str,
            "snr",
            ("constant", "exponential", "snr"),
        ),
        Option(
            "--huber_c",
            "The threshold of huber and smooth_l1: below it the loss is squared, above it absolute.",
            finite,
            0.1,
        ),
        Option("--huber_scale", "A factor on that threshold.", finite, 1.0),
    ),
)
