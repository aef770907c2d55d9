"""The loop, to be read aloud: batch, conditioning, noise, prediction, loss, backward, clip, step, then what is due.

Nothing in it waits for the device: losses and norms travel as tensors to whoever reports them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.common.seeds import StepGenerators, fold_seed
from library.distributed.gradients import GradientReducer, LossScaler, clip_gradients, step_if_finite
from library.training.ema import WeightEma
from library.training.optimizers import OptimizerBundle
from library.training.schedulers import Schedule
from library.training.step import StepResult
from library.training.train_progress import TrainProgress


@dataclass(frozen=True)
class LoopSettings:
    accumulation: int
    max_steps: int
    max_grad_norm: float
    seed: int
    rank: int = 0


class NormReport(Protocol):
    """What clipping the weights' norms did, as 0-dim tensors on the device."""

    @property
    def keys_scaled(self) -> Tensor: ...

    @property
    def average_norm(self) -> Tensor: ...

    @property
    def maximum_norm(self) -> Tensor: ...


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; tensors are on the device and have not been waited for."""

    progress: TrainProgress  # after the step
    loss: Tensor  # 0-dim: mean over the step's samples on this process
    gradient_norm: Tensor  # 0-dim, before clipping
    nonfinite: Tensor  # 0-dim bool: the step was skipped
    losses: Tensor  # [samples]
    timesteps: Tensor  # [samples], on the CPU
    paths: list[str]
    norm_report: NormReport | None = None  # what `LoopParts.post_step_hook` returned


@dataclass(frozen=True)
class LoopParts:
    """What the loop drives."""

    losses: Callable[[Any, StepGenerators], StepResult]  # of one micro-batch
    parameters: list[nn.Parameter]
    optimizer: OptimizerBundle
    schedule: Schedule
    reducer: GradientReducer
    device: torch.device
    scaler: LossScaler | None = None
    ema: WeightEma | None = None
    post_step_hook: Callable[[], NormReport] | None = None  # clips the norms of the weights


class Callback(Protocol):
    """What runs between steps: metrics, checkpoints, validation, previews."""

    def on_step_end(self, report: StepReport) -> None: ...

    def on_epoch_end(self, progress: TrainProgress) -> None:
        """progress.epoch counts the epoch that has just ended."""


@dataclass
class TrainingLoop:
    settings: LoopSettings
    parts: LoopParts
    callbacks: Sequence[Callback] = ()  # called in order
    should_stop: Callable[[], bool] = lambda: False
    draws: StepGenerators = field(init=False)

    def __post_init__(self) -> None:
        self.draws = StepGenerators(self.parts.device)

    def run(
        self,
        progress: TrainProgress,
        batches_of: Callable[[int, int], Iterable[Any]],
        samples_of: Callable[[int], Sequence[int]],
    ) -> TrainProgress:
        """Train from `progress` to the last step, or until `should_stop` returns True.

        batches_of(epoch, start): this process's micro-batches of an epoch from number `start` on, each with `.loss_weights`
        and `.paths`. samples_of(epoch): how many samples each of them has, summed over all processes.
        """
        while progress.step < self.settings.max_steps and not self.should_stop():
            samples = samples_of(progress.epoch)
            loader = iter(batches_of(progress.epoch, progress.batch))
            while progress.batch < len(samples) and progress.step < self.settings.max_steps:
                group = samples[progress.batch : progress.batch + self.settings.accumulation]
                report = self.optimizer_step(progress, islice(loader, len(group)), sum(group))
                progress = report.progress
                for callback in self.callbacks:
                    callback.on_step_end(report)
                if self.should_stop():
                    break
            if progress.batch >= len(samples):
                progress = replace(progress, epoch=progress.epoch + 1, batch=0)
                for callback in self.callbacks:
                    callback.on_epoch_end(progress)
        return progress

    def optimizer_step(self, progress: TrainProgress, batches: Iterator[Any], total_samples: int) -> StepReport:
        """Accumulate the gradients of some micro-batches and step. The loss is the mean over all samples of all processes."""
        parts = self.parts
        losses, timesteps, paths = [], [], []
        batch_number = progress.batch
        for batch in batches:
            # Numbered over all processes: two of them draw what one would with twice the accumulation.
            number = batch_number * self._processes() + self.settings.rank
            self.draws.seed(fold_seed(self.settings.seed, progress.epoch, number))
            result = parts.losses(batch, self.draws)
            loss = result.losses.sum() * (
                self._processes() / total_samples
            )  # the reducer takes the mean over processes
            (parts.scaler.scale(loss) if parts.scaler else loss).backward()
            losses.append(result.losses.detach())
            timesteps.append(result.timesteps)
            paths += batch.paths
            batch_number += 1
        parts.reducer.all_reduce()
        if parts.scaler:
            parts.scaler.unscale(parts.parameters)
        norm = clip_gradients(parts.parameters, self.settings.max_grad_norm)
        nonfinite = ~torch.isfinite(norm)
        step_if_finite(parts.optimizer.optimizer, nonfinite)
        if parts.scaler:
            parts.scaler.update(nonfinite)
        parts.schedule.step()
        parts.optimizer.optimizer.zero_grad(set_to_none=True)
        for parameter in parts.parameters:  # those too that another process steps
            parameter.grad = None
        norm_report = parts.post_step_hook() if parts.post_step_hook else None
        if parts.ema:
            parts.ema.update()
        all_losses = torch.cat(losses)
        progress = replace(progress, batch=batch_number, step=progress.step + 1)
        return StepReport(
            progress, all_losses.mean(), norm, nonfinite, all_losses, torch.cat(timesteps), paths, norm_report
        )

    def _processes(self) -> int:
        return self.parts.reducer.world_size
