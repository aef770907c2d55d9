"""Which number format the frozen model computes in, and what to say when the device cannot do what was asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype  # of the frozen models and their activations
    trained_dtype: torch.dtype  # of the LoRA weights and their gradients
    scale_loss: bool  # float16 gradients underflow without loss scaling
    warnings: tuple[str, ...] = ()


def choose_precision(mixed_precision: str, full_fp16: bool, full_bf16: bool, device: torch.device) -> Precision:
    """What `--mixed_precision` (no, fp16, bf16) comes to on `device`.

    float16 on a CPU is emulated and far too slow, so it becomes bfloat16, and full_fp16 becomes full_bf16. bfloat16 on a GPU
    without it becomes float16.
    """
    warnings = []
    wanted = mixed_precision
    if wanted == "fp16" and device.type == "cpu":
        warnings.append("mixed_precision fp16 is not usable on a CPU; bf16 is used instead.")
        wanted = "bf16"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.append("This GPU has no bfloat16; mixed_precision fp16 is used instead.")
        wanted = "fp16"
    dtype = DTYPES[wanted]
    trained_dtype = dtype if (full_fp16 or full_bf16) else torch.float32
    return Precision(dtype, trained_dtype, dtype == torch.float16, tuple(warnings))
