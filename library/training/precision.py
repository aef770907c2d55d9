"""Number formats: what the frozen model computes in, what is trained in, and the loss scale that float16 needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype  # of the frozen models and their activations
    trained_dtype: torch.dtype  # of the LoRA weights and their gradients
    scale_loss: bool  # float16 gradients underflow without loss scaling
    warnings: tuple[str, ...] = ()

    @property
    def mixed_precision(self) -> str:
        """What the device really does: "no", "fp16" or "bf16"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def choose_precision(mixed_precision: str, full_fp16: bool, full_bf16: bool, device: torch.device) -> Precision:
    """What `--mixed_precision` (no, fp16, bf16) comes to on `device`.

    float16 on a CPU is emulated and far too slow, so it becomes bfloat16, and full_fp16 becomes full_bf16. bfloat16 on a GPU
    without it becomes float16.
    """
    warnings = []
    effective = mixed_precision
    if effective == "fp16" and device.type == "cpu":
        warnings.append("mixed_precision fp16 is not usable on a CPU; bf16 is used instead.")
        effective = "bf16"
    if effective == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.append("This GPU has no bfloat16; mixed_precision fp16 is used instead.")
        effective = "fp16"
    dtype = DTYPES[effective]
    trained_dtype = dtype if (full_fp16 or full_bf16) else torch.float32
    return Precision(dtype, trained_dtype, dtype == torch.float16, tuple(warnings))


class LossScaler:
    """Keeps float16 gradients from underflowing: the loss is multiplied by a scale that adapts to overflows.

    The words and the rule are torch.amp.GradScaler's: halve after an overflow, double after `growth_interval` steps without one.
    GradScaler itself refuses float16 parameters (--full_fp16), and looks for overflows among one optimizer's own parameters, where a
    sharded optimizer has a part of them on each process. Here the flag is the caller's: a gradient norm over everything.
    """

    def __init__(self, device: torch.device | str, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.growth_interval = growth_interval
        self.factor = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.factor

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, once, before clipping. It is a power of two: float32 rounds nothing."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.factor)

    def update(self, nonfinite: Tensor) -> None:
        """Adapt the scale after a step; `nonfinite`: bool scalar on the device."""
        good = torch.where(nonfinite, 0, self.good_steps + 1)
        grow = good >= self.growth_interval
        self.factor = torch.where(nonfinite, self.factor / 2, torch.where(grow, self.factor * 2, self.factor))
        self.good_steps = torch.where(grow, 0, good).to(torch.int32)

    def state_dict(self) -> dict[str, Tensor]:
        return {"factor": self.factor.clone(), "good_steps": self.good_steps.clone()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.factor = cast(Tensor, state["factor"]).to(self.factor)
        self.good_steps = cast(Tensor, state["good_steps"]).to(self.good_steps)
