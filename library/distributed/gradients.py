"""Gradients and weights that processes exchange: both go through one flat buffer, in one call each.

A step accumulates gradients over its micro-batches on each process alone, weighted so that their mean over the processes is the mean
over all samples (library/training/step.py). `GradientReducer.reduce` then takes that mean, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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
    def reduce(self) -> None:
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
    def broadcast_parameters(self, owners: Sequence[int]) -> None:
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
