"""Options of the optimizer and of the learning rates."""

from __future__ import annotations

from library.options.option import Group, Option, finite, switch

GROUP = Group(
    "Optimizer",
    (
        Option(
            "--optimizer_type",
            "The optimizer: a name such as AdamW, AdamW8bit, Lion, Adafactor or Prodigy, or the dotted path of a class. An empty one is AdamW.",
            str,
            "",
        ),
        Option(
            "--optimizer_args",
            "Arguments of the optimizer as key=value, for example weight_decay=0.01 betas=0.9,0.99.",
            str,
            nargs="*",
        ),
        Option("--learning_rate", "The learning rate of whatever has none of its own.", finite, 2e-6),
        Option("--unet_lr", "The learning rate of the MMDiT's LoRA. Unset, it is --learning_rate.", finite),
        Option(
            "--text_encoder_lr",
            "The learning rates of the text encoders' LoRA: one for all, or one each for CLIP-L, CLIP-G and T5. Unset, --learning_rate.",
            finite,
            nargs="*",
        ),
        switch("--use_8bit_adam", "The same as --optimizer_type AdamW8bit."),
        switch("--use_lion_optimizer", "The same as --optimizer_type Lion."),
    ),
)
