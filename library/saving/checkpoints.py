"""The saves of a run: when one is due, what it is called, which older ones it replaces.

Two callbacks of the training loop decide when: `StepCheckpoints` and `EpochCheckpoints`. Validation runs between them, so
that a state saved at the end of an epoch knows the loss that validation has reported to the schedule.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.common.tensor_io import CHANGED, Part
from library.saving.lora_files import LoraFileWriter
from library.saving.names import OutputNames, SaveSchedule
from library.saving.saver import translate_write_errors
from library.saving.state_writer import StateWriter
from library.training.train_progress import StepReport, TrainProgress

logger = logging.getLogger(__name__)
SaveEncoders = Callable[[dict[str, Tensor], Path], list[Path]]
"""(tensors of the LoRA, path without its ending) -> paths of the text encoders that were written."""


@dataclass(frozen=True)
class SavingSettings:
    """What is saved and how long it is kept. keep_…: how many epochs or steps back; None: all."""

    names: OutputNames
    schedule: SaveSchedule
    epochs: int  # of the run
    save_state: bool = False  # with every file
    save_state_at_end: bool = False
    keep_epochs: int | None = None
    keep_epoch_states: int | None = None
    keep_steps: int | None = None
    keep_step_states: int | None = None

    @property
    def saves_final_state(self) -> bool:
        return self.save_state or self.save_state_at_end


class Checkpoints:
    """Saves LoRA files and states under their names. All ranks call it; rank 0 writes the files."""

    def __init__(
        self, settings: SavingSettings, files: LoraFileWriter, states: StateWriter, models: Sequence[Part] = ()
    ):
        """models: a warning says which of their files have changed since the run began."""
        self.settings, self.files, self.states = settings, files, states
        self._unchanged = list(models)
        self.names = settings.names
        self.last_saved_at, self.last_saved_step = time.monotonic(), 0

    def minutes_are_up(self) -> bool:
        """Whether --save_every_n_minutes have passed since the last save."""
        minutes = self.settings.schedule.every_minutes
        return bool(minutes) and time.monotonic() - self.last_saved_at >= 60 * (minutes or 0)

    def save_stopped(self, progress: TrainProgress) -> None:
        """Save LoRA and state of a run that ends before its time."""
        self._save_weights(self.names.step(progress.step), progress)
        self.states.save(self.names.state_step(progress.step), progress)

    def save_step(self, progress: TrainProgress, with_state: bool) -> None:
        settings, names, step = self.settings, self.names, progress.step

        def obsolete(keep: int | None, states: bool) -> list[Path]:
            return names.old_steps(step, keep, states) if keep else []

        self._save_weights(names.step(step), progress, obsolete=lambda: obsolete(settings.keep_steps, False))
        if with_state:
            keep = settings.keep_step_states or settings.keep_steps
            self.states.save(names.state_step(step), progress, lambda: obsolete(keep, True))

    def save_epoch(self, progress: TrainProgress) -> None:
        settings, names, epoch = self.settings, self.names, progress.epoch
        every = settings.schedule.every_epochs or 1

        def obsolete(keep: int | None, states: bool) -> list[Path]:
            return names.old_epochs(epoch, every * keep, states) if keep else []

        self._save_weights(names.epoch(epoch), progress, obsolete=lambda: obsolete(settings.keep_epochs, False))
        if settings.save_state:
            keep = settings.keep_epoch_states or settings.keep_epochs
            self.states.save(names.state_epoch(epoch), progress, lambda: obsolete(keep, True))

    def save_final(self, progress: TrainProgress, save_encoders: SaveEncoders) -> Path:
        """Save the finished LoRA, and the text encoders where they are asked for. Returns the LoRA's path."""
        path = self.names.final()
        self._save_weights(path, progress, final=True)
        if self.files.metadata is not None:
            self._save_encoders(path, save_encoders)
        return path

    def save_final_state(self, progress: TrainProgress) -> None:
        """Save the state of the finished run where it is asked for."""
        if self.settings.saves_final_state:
            self.states.save(self.names.state_final(), progress)

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self.files.saver.flush()

    def _save_weights(
        self,
        path: Path,
        progress: TrainProgress,
        final: bool = False,
        obsolete: Callable[[], list[Path]] = list,
    ) -> None:
        self.last_saved_at, self.last_saved_step = time.monotonic(), progress.step
        self._check_models()
        self.files.check_finite(path, progress)
        self.files.save(path, progress, final, obsolete)

    def _check_models(self) -> None:
        """Warn once of each model file that was changed while the run uses it."""
        changed = [part for part in self._unchanged if part.has_changed()]
        self._unchanged = [part for part in self._unchanged if part not in changed]
        for path in dict.fromkeys(part.path for part in changed):
            logger.warning("%s", CHANGED.format(path))

    def _save_encoders(self, path: Path, save_encoders: SaveEncoders) -> None:
        """Have the text encoders written with the trained LoRA in them."""
        with self.files.weights.evaluation():
            lora = self.files.weights.network.state_dict_for_saving()

        def write() -> None:
            with translate_write_errors(path):
                written = save_encoders(lora, path.with_suffix(""))
            for encoder in written:
                logger.info("Saved %s", encoder)
                self.files.upload(encoder)

        self.files.saver.submit(write)


class StepCheckpoints:
    """Callback: saves after every n-th step, by the clock, and on request."""

    def __init__(self, checkpoints: Checkpoints, minutes_are_up: Callable[[], bool], is_requested: Callable[[], bool]):
        """minutes_are_up, is_requested: what all ranks have agreed on after this step."""
        self.checkpoints, self.minutes_are_up, self.is_requested = checkpoints, minutes_are_up, is_requested

    def on_step_end(self, report: StepReport) -> None:
        settings, progress = self.checkpoints.settings, report.progress
        if self.is_requested():
            self.checkpoints.save_step(progress, with_state=True)
        elif settings.schedule.step_is_due(progress.step):
            self.checkpoints.save_step(progress, settings.save_state)
        elif self.minutes_are_up() and progress.step > self.checkpoints.last_saved_step + 1:
            self.checkpoints.save_step(progress, with_state=True)

    def on_epoch_end(self, progress: TrainProgress) -> None:
        pass


class EpochCheckpoints:
    """Callback: saves after every n-th epoch."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_step_end(self, report: StepReport) -> None:
        pass

    def on_epoch_end(self, progress: TrainProgress) -> None:
        settings = self.checkpoints.settings
        if settings.schedule.epoch_is_due(progress.epoch, settings.epochs):
            self.checkpoints.save_epoch(progress)
