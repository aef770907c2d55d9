"""What an optimizer keeps for each trained byte, found by letting it step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.memory.estimator.tracker import StorageTracker
from library.training.optimizers import build_optimizer

PARAMETERS, SIZE = 8, (64, 1024)  # large enough for the 8-bit optimizers to use 8 bits


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes as a share of the trained weights' bytes."""

    kept: float
    step: float  # more, for a moment


def optimizer_cost(
    name: str, learning_rate: float, arguments: Sequence[str] | None, dtype: torch.dtype
) -> OptimizerCost:
    """Take two steps with the optimizer on small parameters of `dtype`, on the CPU."""
    parameters = [torch.nn.Parameter(torch.zeros(SIZE, dtype=dtype)) for _ in range(PARAMETERS)]
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    optimizer = build_optimizer(name, [{"params": parameters, "lr": learning_rate}], learning_rate, arguments)
    optimizer.train()
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    tracker = StorageTracker()
    tracker.watch([*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    start = tracker.live
    with tracker:
        optimizer.optimizer.step()
        kept = tracker.live - start
        tracker.restart()
        optimizer.optimizer.step()
    return OptimizerCost(kept / size, (tracker.peak - tracker.live) / size)
