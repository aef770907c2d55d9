"""Options of the LoRA that is trained."""

from __future__ import annotations

from library.options.option import Group, Option, finite, path, switch

GROUP = Group(
    "Network (LoRA)",
    (
        Option("--network_module", "The module that makes the LoRA: networks.lora_sd3 or lycoris.kohya. Required."),
        Option("--network_dim", "The LoRA's rank. Unset, it is 4.", int),
        Option(
            "--network_alpha",
            "The LoRA's alpha: what it adds is scaled by alpha over rank; 0 means the rank.",
            finite,
            1,
        ),
        Option(
            "--network_dropout",
            "The share of the LoRA's inner values that is dropped at each step. Unset, none.",
            finite,
        ),
        Option(
            "--network_args",
            "Arguments of the network as key=value, for example x_attn_dim=8 train_block_indices=0-11 use_dora=True.",
            str,
            nargs="*",
        ),
        switch("--network_train_unet_only", "Train the LoRA of the MMDiT alone."),
        switch("--network_train_text_encoder_only", "Train the LoRA of the text encoders alone."),
        Option("--network_weights", "A LoRA file to start from.", path),
        switch("--dim_from_weights", "Take ranks and alphas from --network_weights."),
        Option(
            "--scale_weight_norms",
            "After each step, scale down each layer's LoRA whose norm exceeds this, for example 1.0.",
            finite,
        ),
        Option("--base_weights", "LoRA files that are merged into the base model before training.", path, nargs="*"),
        Option(
            "--base_weights_multiplier",
            "The strengths of --base_weights, one each; 1.0 for those that are missing.",
            finite,
            nargs="*",
        ),
    ),
)
