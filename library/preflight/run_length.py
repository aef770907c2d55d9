"""How long a run is, and where it starts, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from library.training.train_progress import TrainProgress


@dataclass(frozen=True)
class LengthSettings:
    """The options that decide how long a run is. Epochs are counted from 1 as on the command line."""

    accumulation: int  # batches of one process in an optimizer step
    max_train_steps: int
    max_train_epochs: int | None = None  # wins over max_train_steps
    initial_step: int | None = None
    initial_epoch: int | None = None
    skip_until_initial_step: bool = False

    @property
    def sets_start(self) -> bool:
        """Whether an option puts the first step elsewhere than at 0, or at the step of the state to resume from."""
        return self.initial_step is not None or self.initial_epoch is not None


@dataclass(frozen=True)
class RunLength:
    """How long the run is, in optimizer steps."""

    steps_per_epoch: int
    max_steps: int
    epochs: int


def run_length(settings: LengthSettings, batches_per_epoch: int) -> RunLength:
    """batches_per_epoch: of one process. An epoch's last optimizer step may be made of fewer of them."""
    steps_per_epoch = -(-batches_per_epoch // settings.accumulation) or 1
    epochs = settings.max_train_epochs
    max_steps = epochs * steps_per_epoch if epochs else settings.max_train_steps
    return RunLength(steps_per_epoch, max_steps, -(-max_steps // steps_per_epoch))


def initial_progress(settings: LengthSettings, length: RunLength) -> TrainProgress | None:
    """Where --initial_step or --initial_epoch put the first step; None where neither is set.

    Training begins with the first batch of that step's epoch, or with --skip_until_initial_step at the step's own batch.
    """
    if not settings.sets_start:
        return None
    first_of_epoch = ((settings.initial_epoch or 1) - 1) * length.steps_per_epoch
    step = first_of_epoch if settings.initial_step is None else settings.initial_step
    epoch, steps_in_epoch = divmod(step, length.steps_per_epoch)
    batch = steps_in_epoch * settings.accumulation if settings.skip_until_initial_step else 0
    return TrainProgress(epoch, batch, step)


def start_problems(settings: LengthSettings, length: RunLength) -> list[str]:
    """Problems with a start at the end of the run or beyond it."""
    start = initial_progress(settings, length)
    if start is None or start.step < length.max_steps:
        return []
    from_epoch = settings.initial_step is None
    name, value = ("initial_epoch", settings.initial_epoch) if from_epoch else ("initial_step", settings.initial_step)
    return [
        f"--{name} {value} starts at step {start.step}, but the run ends at step {length.max_steps}. "
        "Lower it, or raise --max_train_steps or --max_train_epochs."
    ]
