"""Options that would promise something that training an SD3 LoRA can't keep."""

from __future__ import annotations

from library.options.option import Group, Kind, Option, path, switch

NVME = "weights are read again for every block of every step, for which a disk is too slow"
OFFLOAD_OPTIMIZER = (
    "a LoRA's optimizer state is small, and its step on the processor would hold up every other; "
    "--optimizer_type PagedAdamW8bit moves it to host memory when the device is full"
)

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
        Option(
            "--offload_optimizer_device",
            "Where DeepSpeed keeps the optimizer's state.",
            str,
            None,
            ("cpu", "nvme"),
            kind=Kind.REFUSED,
            reason=OFFLOAD_OPTIMIZER,
        ),
        Option(
            "--offload_optimizer_nvme_path",
            "The folder on an NVMe disk for the optimizer's state.",
            path,
            kind=Kind.REFUSED,
            reason=OFFLOAD_OPTIMIZER,
        ),
        Option(
            "--offload_param_nvme_path",
            "The folder on an NVMe disk for the parameters.",
            path,
            kind=Kind.REFUSED,
            reason=NVME,
        ),
        switch(
            "--fp16_master_weights_and_gradients",
            "Keep DeepSpeed's master weights in fp16.",
            Kind.REFUSED,
            "small updates would be lost in fp16; a LoRA's weights in float32 are small",
        ),
    ),
)
