"""Options that trade time for memory, and those that make steps faster."""

from __future__ import annotations

from library.options.option import Group, Option, finite, int_or_auto, switch

DYNAMO_BACKENDS = (
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensort",
    "ipex",
    "tvm",
)
T5_DTYPES = ("float32", "fp32", "float16", "fp16", "bfloat16", "bf16", "fp8", "int8", "nf4")

GROUP = Group(
    "Memory and speed",
    (
        Option(
            "--memory_plan",
            "auto: estimate what the run needs, choose the fastest of the options below that fits the device, and print the table.",
            str,
            None,
            ("auto",),
        ),
        Option(
            "--vram",
            "The device memory in GB that --memory_plan and --blocks_to_swap auto reckon with, instead of what the device has.",
            finite,
        ),
        Option(
            "--blocks_to_swap",
            "How many transformer blocks stay in host memory and visit the device when they are needed; auto takes the fewest that fit. Above the model's limit (its blocks less two) it is lowered.",
            int_or_auto,
        ),
        switch(
            "--gradient_checkpointing",
            "Recompute each block's activations in the backward pass instead of keeping them: far less memory, a third to a half more time.",
        ),
        Option("--gradient_checkpointing_blocks", "Do so in this many blocks only.", int),
        switch(
            "--selective_checkpointing",
            "Let checkpointed blocks keep what attention returned and recompute the rest: a little more memory, a little less time.",
        ),
        switch(
            "--lean_activations",
            "Let blocks that are not checkpointed keep what products and attention return, and recompute norms, modulation and GELU: about 60 % of the activations' memory, some percent more time, the same result to the bit.",
        ),
        switch(
            "--cpu_offload_checkpointing",
            "Move the activations that checkpointing keeps to host memory. It can't be combined with --blocks_to_swap.",
        ),
        switch("--fp8_base", "Keep the frozen weights of the MMDiT and of the text encoders in 8-bit floats."),
        switch("--fp8_base_unet", "Keep the frozen weights of the MMDiT alone in 8-bit floats."),
        switch(
            "--fp8_matmul",
            "With --fp8_base or --fp8_base_unet: multiply in 8-bit floats too, each token scaled by itself. Faster on Ada, Hopper and newer GPUs, and less exact: the model's prediction moves by some percent.",
        ),
        Option(
            "--base_quantization",
            "Keep the frozen weights of the MMDiT in 8-bit integers or in 4-bit NormalFloat.",
            str,
            None,
            ("int8", "nf4"),
        ),
        Option("--t5xxl_device", "The device that T5 runs on, for example cpu. Unset, it is the training device."),
        Option(
            "--t5xxl_dtype",
            "The number format of T5's weights. Unset, it is that of --mixed_precision.",
            str,
            None,
            T5_DTYPES,
        ),
        switch(
            "--torch_compile",
            "Compile the transformer block with torch.compile. The first steps take longer, the others less.",
        ),
        Option("--dynamo_backend", "The backend of --torch_compile.", str, "inductor", DYNAMO_BACKENDS),
        switch(
            "--lowram",
            "Spare the host's memory: the MMDiT goes to the device as it is read, and base weights are merged there. With --blocks_to_swap, or shared out over processes, it still passes through the host.",
        ),
        switch(
            "--highvram",
            "Keep the device memory of encoders that are done with, and between previews the VAE: quicker on large cards.",
        ),
    ),
)
