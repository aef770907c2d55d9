"""Options for several devices. accelerate's launcher starts the processes; see docs/distributed.md."""

from __future__ import annotations

from library.options.option import Group, Option, switch

GROUP = Group(
    "Several devices",
    (
        Option(
            "--ddp_timeout",
            "How many minutes processes wait for each other before they give up. Unset, it is PyTorch's default.",
            int,
        ),
        switch(
            "--deepspeed",
            "Share the memory of training out over the processes, as DeepSpeed's ZeRO does; --zero_stage says what. PyTorch does it: the package deepspeed is not needed.",
        ),
        Option(
            "--zero_stage",
            "What --deepspeed shares out. 0: nothing; 1 and 2: the optimizer's state; 3: the frozen weights of the MMDiT too.",
            int,
            2,
            (0, 1, 2, 3),
        ),
        Option(
            "--offload_param_device",
            "Where each process keeps its share of the weights with ZeRO stage 3: cpu is host memory. nvme is refused: a disk is too slow. Unset, it is the device.",
            str,
            None,
            ("cpu", "nvme"),
        ),
    ),
)
