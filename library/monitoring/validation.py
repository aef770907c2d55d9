"""Callback: measures the loss on held-out images when it is due, and records it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from library.common.progress import progress_bar
from library.common.seeds import StepGenerators
from library.data.batch import Batch
from library.data.loader import Loader
from library.monitoring.metrics import RunMetrics
from library.training.callback_settings import ValidationSettings
from library.training.step import BatchLosses
from library.training.train_progress import StepReport, TrainProgress
from library.training.validation import validate

if TYPE_CHECKING:
    from accelerate import Accelerator

ValidationLosses = Callable[[Batch, StepGenerators, int], BatchLosses]
"""(batch, generators, timestep) -> the batch's losses."""


class Validation:
    """Every held-out batch at fixed timesteps with fixed noise, the same at every validation."""

    def __init__(
        self,
        settings: ValidationSettings,
        loader: Loader,
        losses: ValidationLosses,
        network: nn.Module,
        accelerator: Accelerator,
        metrics: RunMetrics,
        should_stop: Callable[[], bool],
        contexts: Sequence[Callable[[], AbstractContextManager[None]]] = (),
    ):
        """contexts: entered in order around the forward passes: averaged weights, say. network: put in eval mode."""
        self.settings, self.loader, self.losses, self.network = settings, loader, losses, network
        self.accelerator, self.metrics = accelerator, metrics
        self.should_stop, self.contexts = should_stop, contexts

    def on_step_end(self, report: StepReport) -> None:
        if not self._is_last(report.progress) and self.settings.step_is_due(report.progress.step):
            self.run(report.progress, "step")

    def on_epoch_end(self, progress: TrainProgress) -> None:
        if not self._is_last(progress) and self.settings.epoch_is_due(progress.epoch):
            self.run(progress, "epoch")

    def finish(self, progress: TrainProgress) -> None:
        """Do what is due after the last step. Call it once the final LoRA is saved."""
        if self.settings.step_is_due(progress.step):
            self.run(progress, "step")
        if progress.batch == 0 and self.settings.epoch_is_due(progress.epoch):
            self.run(progress, "epoch")

    def _is_last(self, progress: TrainProgress) -> bool:
        return progress.step >= self.metrics.settings.max_steps

    def run(self, progress: TrainProgress, kind: str) -> None:
        """Validate and record the loss. A run that is stopping does not wait for it. kind: "step" or "epoch"."""
        if self.should_stop():
            return
        settings, accelerator = self.settings, self.accelerator
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            total = validate(
                self.loader.batches(0),
                self.losses,
                settings.timesteps,
                settings.seed,
                settings.max_batches,
                StepGenerators(accelerator.device),
                [self.network],
                self._with_progress_bar,
                (accelerator.process_index, accelerator.num_processes),
            )
        total = cast(Tensor, accelerator.reduce(total, "sum"))  # [sum, count]
        self.metrics.record_validation(progress, kind, total)

    def _with_progress_bar(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        settings = self.settings
        count = min(settings.batches, settings.max_batches or settings.batches)
        return progress_bar(batches, "Validation", self.accelerator.is_main_process, count)
