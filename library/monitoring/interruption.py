"""What ends a run in training through no fault of its options: it is saved, and says how to resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from library.common.errors import ReadError, RunInterrupted, UserError
from library.training.train_progress import StepReport, TrainProgress


class Saves(Protocol):
    """`library.saving.checkpoints.Checkpoints`."""

    def save_stopped(self, progress: TrainProgress) -> None: ...

    def flush(self) -> None: ...


class Interruption:
    """A context around the training loop, and its first callback. Saves where a file or a data worker is lost."""

    def __init__(self, failure: Callable[[], UserError | None], saves: Saves, progress: TrainProgress):
        """failure: why this rank cannot read its batches any more. progress: where the run starts."""
        self.failure, self.saves = failure, saves
        self.first_step, self.progress = progress.step, progress

    def on_step_end(self, report: StepReport) -> None:
        self.progress = report.progress

    def on_epoch_end(self, progress: TrainProgress) -> None:
        self.progress = progress

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Save after a ReadError, if there is anything to save, and raise RunInterrupted instead."""
        if isinstance(error, ReadError) and self.progress.step > self.first_step:
            self.saves.save_stopped(self.progress)
            self.saves.flush()
            raise interrupted(error, self.progress) from error

    def raise_if_failed(self, progress: TrainProgress) -> None:
        """Raise RunInterrupted if this rank is why all have stopped. Everything has been saved."""
        error = self.failure()
        if error is not None:
            raise interrupted(error, progress) from error


def interrupted(error: UserError, progress: TrainProgress) -> RunInterrupted:
    """`error`, with what was saved and how to resume."""
    stopped = (
        f"Training has stopped at step {progress.step}, and LoRA and state are saved. "
        "When the cause is removed, resume with the same command and --resume auto."
    )
    return RunInterrupted([*error.problems, stopped])
