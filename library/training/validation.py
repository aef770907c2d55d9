"""Validation: the loss on held-out images at fixed timesteps with fixed noise, comparable from step to step and run to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from library.common.seeds import StepGenerators, fold_seed, preserve_rng_state
from library.training.step import StepResult


def validate(
    batches: Iterable[Any],
    losses: Callable[[Any, StepGenerators, int], StepResult],
    timesteps: Sequence[int],
    seed: int,
    max_batches: int | None,
    draws: StepGenerators,
    modules: Sequence[nn.Module],
    wrap: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """The sum of the losses and their count, [2] float32 on the device; every batch at every timestep.

    losses(batch, draws, timestep): of one batch. The noise depends on seed, batch and timestep alone. modules: put in eval
    mode meanwhile; training's random states are left as they were. wrap: puts a progress bar around the batches.
    share: (r, n) where `batches` are the batches r, r + n, … of all; they draw what they would draw in a single process.
    """
    total = torch.zeros(2, device=draws.device.device)
    with preserve_rng_state(modules):
        for place, batch in enumerate(wrap(islice(batches, max_batches))):
            number = share[0] + place * share[1]
            for timestep in timesteps:
                draws.seed(fold_seed(seed, "validation", number, timestep))
                found = losses(batch, draws, timestep).losses
                counted = batch.loss_weights.to(found.device) > 0  # a filler counts nothing
                total += torch.stack([found[counted].sum(), counted.sum().float()])
    return total
