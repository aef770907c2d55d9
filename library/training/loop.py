"""The training loop: epochs of steps, and the callbacks between them. A step itself is library/training/step.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from library.data.batch import Batch
from library.training.train_progress import StepReport, TrainProgress


class Callback(Protocol):
    """What runs between steps: metrics, checkpoints, validation, previews."""

    def on_step_end(self, report: StepReport) -> None: ...

    def on_epoch_end(self, progress: TrainProgress) -> None:
        """progress.epoch counts the epoch that has just ended."""


class Step(Protocol):
    """One optimizer step: `library.training.step.TrainingStep`."""

    def __call__(self, progress: TrainProgress, batches: Iterable[Batch], samples: Sequence[int]) -> StepReport: ...


@dataclass(frozen=True)
class TrainingLoop:
    """Runs `step` until `max_steps` or until `should_stop` returns True."""

    step: Step
    accumulation: int  # micro-batches of one step
    max_steps: int
    callbacks: Sequence[Callback] = ()  # called in order
    should_stop: Callable[[], bool] = lambda: False

    def run(
        self,
        progress: TrainProgress,
        batches_of: Callable[[int, int], Iterable[Batch]],
        samples_of: Callable[[int], Sequence[int]],
    ) -> TrainProgress:
        """Train from `progress` on; return the progress at the end.

        batches_of(epoch, start): this process's micro-batches of an epoch from number `start` on. samples_of(epoch): the number of
        samples of each of the epoch's micro-batches, summed over all processes. An epoch's last step may have fewer micro-batches.
        """
        if progress.step >= self.max_steps and 0 < len(samples_of(progress.epoch)) <= progress.batch:
            progress = self._end_epoch(progress)  # of a run that was killed after its last step
        while progress.step < self.max_steps and not self.should_stop():
            samples = samples_of(progress.epoch)
            loader = iter(batches_of(progress.epoch, progress.batch))
            while progress.batch < len(samples) and progress.step < self.max_steps:
                group = samples[progress.batch : progress.batch + self.accumulation]
                report = self.step(progress, islice(loader, len(group)), group)
                progress = report.progress
                for callback in self.callbacks:
                    callback.on_step_end(report)
                if self.should_stop():
                    break
            if progress.batch >= len(samples):
                progress = self._end_epoch(progress)
        return progress

    def _end_epoch(self, progress: TrainProgress) -> TrainProgress:
        progress = replace(progress, epoch=progress.epoch + 1, batch=0)
        for callback in self.callbacks:
            callback.on_epoch_end(progress)
        return progress
