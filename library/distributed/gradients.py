"""What happens to gradients between backward and the optimiser step, without waiting for the device.

The order of a step, over the trained parameters:

    scaler.scale(loss / accumulation_steps).backward()   every micro-batch (the scaler for float16 alone)
    reducer.all_reduce()                                 several processes: one flat buffer, one call
    scaler.unscale(parameters)
    norm = clip_gradients(parameters, max_grad_norm)
    step_if_finite(optimizer, nonfinite := ~torch.isfinite(norm))
    scaler.update(nonfinite)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most `max_norm` (0: leave them); return the norm before.

    The norm is a float32 scalar on the device, inf or NaN when any gradient is: `~torch.isfinite(norm)` is the test.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_if_finite(optimizer: Optimizer, nonfinite: Tensor) -> None:
    """optimizer.step(), skipped when `nonfinite` (a bool scalar on the device) is true.

    torch's fused optimizers skip on the device, through the attributes that torch.amp.GradScaler sets for them; for any
    other the flag has to be read, which waits for the backward pass.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        switch: Any = optimizer
        switch.grad_scale, switch.found_inf = None, nonfinite.float()
        try:
            optimizer.step()
        finally:
            del switch.grad_scale, switch.found_inf
    elif not bool(nonfinite):
        optimizer.step()


class GradientReducer:
    """Averages gradients over all processes in one flat float32 buffer, allocated once.

    Every parameter has a gradient afterwards, zero where no process had one: optimizers count steps by parameter, and
    would drift apart between processes otherwise.
    """

    def __init__(self, parameters: Sequence[Tensor], world_size: int) -> None:
        """parameters: the same on every process, in the same order, all on one device."""
        self.parameters = list(parameters)
        self.world_size = world_size
        if world_size > 1:
            sizes = [parameter.numel() for parameter in self.parameters]
            self.buffer = torch.zeros(sum(sizes), device=self.parameters[0].device)
            pieces = self.buffer.split(sizes)
            self.views = [piece.view_as(each) for piece, each in zip(pieces, self.parameters, strict=True)]

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Replace every gradient by its mean over the processes. Does nothing in a single process."""
        if self.world_size == 1:
            return
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        torch._foreach_copy_(self.views, gradients)
        self.buffer.div_(self.world_size)
        dist.all_reduce(self.buffer)
        torch._foreach_copy_(gradients, self.views)

    @torch.no_grad()
    def hand_on(self, owners: Sequence[int]) -> None:
        """Replace every parameter by the value that its owner has. owners: of each parameter, in rising order."""
        torch._foreach_copy_(self.views, self.parameters)
        sent, start = [], 0
        for owner in range(self.world_size):
            size = sum(each.numel() for each, its in zip(self.parameters, owners, strict=True) if its == owner)
            if size:
                sent.append(dist.broadcast(self.buffer[start : start + size], owner, async_op=True))
            start += size
        for work in sent:
            work.wait()
        torch._foreach_copy_(self.parameters, self.views)


class LossScaler:
    """Keeps float16 gradients from underflowing: the loss is multiplied by a scale that adapts to overflows.

    The rule is torch.amp.GradScaler's: halve after an overflow, double after `growth_interval` steps without one. Unlike it,
    nothing is read back from the device, and float16 parameters (full_fp16) are served too.
    """

    def __init__(self, device: torch.device | str, initial: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.growth_interval = growth_interval
        self.factor = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.factor

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
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

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.factor = state["factor"].to(self.factor)
        self.good_steps = state["good_steps"].to(self.good_steps)
