"""Options that would promise something that training an SD3 LoRA can't keep."""

from __future__ import annotations

from library.options.option import Group, Kind, Option, switch

GROUP = Group(
    "Refused",
    (
        switch(
            "--v_parameterization",
            "Train v-prediction.",
            Kind.REFUSED,
            "Stable Diffusion 3 predicts the flow's velocity, and a LoRA trained for another target would not fit it; leave the option out",
        ),
        switch(
            "--weighted_captions",
            "Weigh words by brackets, as in (word:1.2).",
            Kind.REFUSED,
            "the three text encoders of Stable Diffusion 3 have no common meaning for such weights; take the brackets out of the captions and leave the option out",
        ),
        switch(
            "--fused_backward_pass",
            "Step each parameter during the backward pass.",
            Kind.REFUSED,
            "it saves memory for full fine-tuning alone: a LoRA's gradients are small; use --gradient_checkpointing or --blocks_to_swap",
        ),
        Option(
            "--dataset_class",
            "A dataset class of your own, as a dotted import path.",
            kind=Kind.REFUSED,
            reason="buckets, caches and exact resuming rest on the data that --dataset_config describes, and a class of unknown behaviour could keep none of them; write a dataset file",
        ),
        switch(
            "--deepspeed",
            "Train with DeepSpeed.",
            Kind.REFUSED,
            "it shares out optimizer states and gradients, which are small for a LoRA, and takes the training loop over; several devices work with accelerate launch alone, and --fp8_base_unet and --blocks_to_swap spare the memory of the frozen weights",
        ),
    ),
)
