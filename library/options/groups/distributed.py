"""Options for several devices."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Several devices",
    (
        Option(
            "--ddp_timeout",
            "How many minutes processes wait for each other before they give up. Unset, it is PyTorch's default.",
            int,
        ),
        switch("--deepspeed", "Train with DeepSpeed."),
        Option("--zero_stage", "DeepSpeed's ZeRO stage: what is shared out over the devices.", int, 2, (0, 1, 2, 3)),
        Option(
            "--offload_optimizer_device", "Where DeepSpeed keeps the optimizer's state.", str, None, ("cpu", "nvme")
        ),
        Option("--offload_optimizer_nvme_path", "The folder on an NVMe disk for the optimizer's state.", path),
        Option("--offload_param_device", "Where DeepSpeed keeps the parameters.", str, None, ("cpu", "nvme")),
        Option("--offload_param_nvme_path", "The folder on an NVMe disk for the parameters.", path),
        switch("--zero3_init_flag", "With ZeRO stage 3: share out the weights as the models are made."),
        switch("--zero3_save_16bit_model", "With ZeRO stage 3: save 16-bit weights."),
        switch(
            "--fp16_master_weights_and_gradients",
            "Keep master weights and gradients in fp16, with ZeRO stage 2 and the optimizer on the CPU.",
        ),
    ),
)
