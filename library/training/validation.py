"""Validation: the loss on held-out images at fixed timesteps with fixed noise, comparable from step to step and run to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from library.common.seeds import StepGenerators, fold_seed, preserve_rng_state
from library.data.batch import Batch
from library.training.step import BatchLosses


def validate(
    batches: Iterable[Batch],
    losses: Callable[[Batch, StepGenerators, int], BatchLosses],
    timesteps: Sequence[int],
    seed: int,
    max_batches: int | None,
    generators: StepGenerators,
    modules: Sequence[nn.Module],
    wrap: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """The sum of the losses and their count, [2] float32 on the device; every batch at every timestep.

    losses(batch, generators, timestep): of one batch. The noise depends on seed, batch and timestep alone. modules: put in eval
    mode meanwhile; training's random states are left as they were. wrap: puts a progress bar around the batches.
    share: (r, n) where `batches` are the batches r, r + n, … of all; they draw what they would draw in a single process.
    """
    total = torch.zeros(2, device=generators.device.device)
    with preserve_rng_state(modules):
        for index, batch in enumerate(wrap(islice(batches, max_batches))):
            number = share[0] + index * share[1]
            for timestep in timesteps:
                generators.seed(fold_seed(seed, "validation", number, timestep))
                values = losses(batch, generators, timestep).losses
                counted = batch.loss_weights.to(values.device) > 0  # padding does not count
                total += torch.stack([values[counted].sum(), counted.sum().float()])
    return total
