"""Options of the run itself: its length, its precision, its seed."""

from __future__ import annotations

from library.options.option import Group, Option, finite, switch

GROUP = Group(
    "Training",
    (
        Option("--max_train_steps", "How many optimizer steps to train.", int, 1600),
        Option("--max_train_epochs", "How many epochs to train. It wins over --max_train_steps.", int),
        Option(
            "--gradient_accumulation_steps",
            "How many batches make one optimizer step: their gradients are averaged.",
            int,
            1,
        ),
        Option(
            "--max_grad_norm",
            "The gradient is scaled down to this norm where it is larger; 0 turns this off.",
            finite,
            1.0,
        ),
        Option(
            "--seed",
            "The seed of everything random: the same seed gives the same run. Unset, one is drawn and told.",
            int,
        ),
        Option(
            "--mixed_precision",
            "The number format that the models compute in: no (float32), fp16 or bf16.",
            str,
            "no",
            ("no", "fp16", "bf16"),
        ),
        switch("--full_fp16", "Keep the LoRA's weights and gradients in fp16, too. It needs --mixed_precision fp16."),
        switch("--full_bf16", "Keep the LoRA's weights and gradients in bf16, too. It needs --mixed_precision bf16."),
        switch("--no_half_vae", "Run the VAE in float32, whatever the mixed precision."),
        Option(
            "--ema_decay",
            "Keep a running average of the LoRA's weights with this decay, for example 0.999. Unset, none is kept.",
            finite,
        ),
        Option(
            "--ema_save",
            "Where the averaged weights are saved: in a file beside the LoRA, or instead of it.",
            str,
            "beside",
            ("beside", "instead"),
        ),
        Option(
            "--max_nonfinite_steps",
            "After this many steps in a row whose loss or gradient is not finite, the run saves and stops. Each such step is skipped.",
            int,
            10,
        ),
    ),
)
