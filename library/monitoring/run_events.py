"""What happens around the steps of a run: logs, previews, validation, LoRA files and states, and the end of it all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.progress import progress_bar
from library.common.seeds import StepGenerators
from library.distributed.consensus import Agreement
from library.monitoring.contact_sheet import PreviewRecord, write_sheet
from library.monitoring.metrics import RunMetrics
from library.monitoring.previews import Previewer, moment
from library.monitoring.report.run import RunReport
from library.monitoring.report.writer import ReportWriter
from library.saving.metadata import FileMetadata
from library.saving.names import OutputNames, SaveRhythm, epochs_between_saves
from library.saving.run_facts import run_facts, save_facts
from library.saving.saver import BackgroundSaver, remove, told_if_unwritable, write_weights
from library.saving.state import SavedState, take_snapshot, write_state
from library.training.loop import StepReport
from library.training.signals import StopSignals
from library.training.train_progress import TrainProgress
from library.training.validation import validate
from networks.diffusers_layout import to_diffusers, unread_by_diffusers

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)
Old = Callable[[], list[Path]]
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RunEvents:
    """A callback of the training loop. Use it as a context: leaving it finishes all writing."""

    def __init__(self, trainer: NetworkTrainer, previewer: Previewer | None):
        args = trainer.args
        self.trainer, self.args, self.previewer = trainer, args, previewer
        self.main = trainer.accelerator.is_main_process
        self.names = OutputNames(Path(args.output_dir), args.output_name, args.save_model_as or "safetensors")
        every = epochs_between_saves(args.save_every_n_epochs, args.save_n_epoch_ratio, trainer.plan.length.epochs)
        self.rhythm = SaveRhythm(every, args.save_every_n_steps)
        self.previews: list[PreviewRecord] = []
        self.last_saved_at, self.last_saved_step = time.monotonic(), 0
        self.agreement = Agreement(trainer.accelerator.num_processes)
        self.stopping = False
        self.metadata = FileMetadata(run_facts(trainer, time.time())) if self.main else None
        if args.save_format != "kohya" and unread_by_diffusers(trainer.network.layers):
            logger.warning("diffusers reads no LoRA of T5: its part of the file is for ComfyUI alone.")

    def __enter__(self) -> RunEvents:
        with ExitStack() as stack:
            self.hub = stack.enter_context(self.trainer.hub) if self.trainer.hub is not None else None
            self.saver = stack.enter_context(BackgroundSaver())
            self.signals = stack.enter_context(StopSignals())
            self.metrics = stack.enter_context(RunMetrics(self.trainer, self.names))
            self._stack = stack.pop_all()
        self.page = RunReport(self.trainer, self.metrics, lambda: list(self.previews))
        wanted = self.main and self.args.report
        self.report = ReportWriter(self.names.folder / "report.html", self.page.make) if wanted else None
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            if self.report is not None:
                self.report.close(self._ending(error))

    def _ending(self, error: BaseException | None) -> str:
        if self.signals.received is not None:
            return "stopped"
        return "finished" if error is None else f"ended by {type(error).__name__}"

    def _tell_report(self, position: TrainProgress) -> None:
        self.page.position = position
        if self.report is not None:
            self.report.poke()

    # --- the run's beginning and end -------------------------------------------------------------------------------

    def begin(self) -> TrainProgress:
        """Load the state to resume from, if any, and make the previews that come before the first step."""
        state = self.trainer.state
        if state is None and self.args.resume:
            logger.info("--resume auto: there is no state in %s yet; starting anew.", self.names.folder)
        position = self._start_given(state, self._restore(state) if state else TrainProgress())
        self.previews = self.metrics.start(position)
        self._tell_report(position)
        if self.previewer and (self.args.sample_at_first and position.step == 0):
            self.make_previews(position, epoch=0 if self.args.sample_every_n_epochs else None)
        return position

    def finish(self, position: TrainProgress) -> Path:
        """Save the LoRA, and the state where that is wanted; a run that was told to stop saves both and exits."""
        stopped = self.should_stop() and position.step < self.trainer.plan.length.max_steps
        path = self.names.step(position.step) if stopped else self.names.final()
        self.save_weights(path, position)
        if stopped or self.args.save_state or self.args.save_state_on_train_end:
            self.save_state(self.names.state_step(position.step) if stopped else self.names.state_final(), position)
        if not stopped and self.main:
            self.saver.submit(self._save_encoders())
        self.saver.flush()
        if stopped:
            logger.warning("Stopped at step %d. To go on: the same command with --resume auto", position.step)
            raise SystemExit(self.signals.exit_code)
        return path

    # --- between steps ---------------------------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Whether a signal was received; of several processes, whether they have agreed that one of them did."""
        return self.stopping or (self.agreement.world_size == 1 and self.signals.received is not None)

    def on_step_end(self, report: StepReport) -> None:
        args, position = self.args, report.progress
        self._tell_report(position)
        try:
            self.metrics.step(report)
        except UserError:  # only bad steps in a row: each was skipped, so the weights are those of the last good one
            self.save_weights(self.names.step(position.step), position)
            self.save_state(self.names.state_step(position.step), position)
            raise
        self.stopping, minutes_are_up = self.agreement.any_rank(
            [self.signals.received is not None, self._minutes_are_up()]
        )
        if self.rhythm.step_is_due(position.step):
            self.save_at_step(position, args.save_state)
        elif minutes_are_up and position.step > self.last_saved_step + 1:
            self.save_at_step(position, with_state=True)
        if args.validate_every_n_steps and position.step % args.validate_every_n_steps == 0:
            self.validate(position, "step")
        every = None if args.sample_every_n_epochs else args.sample_every_n_steps
        if self.previewer and every and position.step % every == 0:
            self.make_previews(position, epoch=None)

    def on_epoch_end(self, position: TrainProgress) -> None:
        args, epoch = self.args, position.epoch
        self._tell_report(position)
        self.metrics.epoch(position)
        every = args.validate_every_n_epochs or (None if args.validate_every_n_steps else 1)
        if every and epoch % every == 0:
            self.validate(position, "epoch")
        if self.rhythm.epoch_is_due(epoch, self.trainer.plan.length.epochs):
            self.save_at_epoch(position)
        if self.previewer and args.sample_every_n_epochs and epoch % args.sample_every_n_epochs == 0:
            self.make_previews(position, epoch)

    # --- files -----------------------------------------------------------------------------------------------------

    def save_at_step(self, position: TrainProgress, with_state: bool) -> None:
        args, names, step = self.args, self.names, position.step

        def old(keep: int | None, states: bool) -> list[Path]:
            return names.old_steps(step, keep, states) if keep else []

        self.save_weights(names.step(step), position, lambda: old(args.save_last_n_steps, False))
        if with_state:
            keep = args.save_last_n_steps_state or args.save_last_n_steps
            self.save_state(names.state_step(step), position, lambda: old(keep, True))

    def save_at_epoch(self, position: TrainProgress) -> None:
        args, names, epoch = self.args, self.names, position.epoch
        every = self.rhythm.every_epochs or 1

        def old(keep: int | None, states: bool) -> list[Path]:
            return names.old_epochs(epoch, every * keep, states) if keep else []

        self.save_weights(names.epoch(epoch), position, lambda: old(args.save_last_n_epochs, False))
        if args.save_state:
            keep = args.save_last_n_epochs_state or args.save_last_n_epochs
            self.save_state(names.state_epoch(epoch), position, lambda: old(keep, True))

    def save_weights(self, path: Path, position: TrainProgress, old: Old = list) -> None:
        """Hand a copy of the LoRA to the saver. With an EMA its average is saved beside, or instead.

        old: which files may go, asked once the new one is on the disk.
        """
        self.last_saved_at, self.last_saved_step = time.monotonic(), position.step
        if self.metadata is None:
            return
        trainer, described = self.trainer, self.metadata
        dtype = SAVE_DTYPES.get(self.args.save_precision or "")
        final = path == self.names.final()
        metadata = described.at(save_facts(position, time.time()))
        files: list[tuple[Path, dict[str, Tensor]]] = []
        averages = trainer.ema.averages if trainer.ema else None
        with trainer.optimizer.evaluation_weights():
            if averages is None or self.args.ema_save == "beside":
                files.append((path, trainer.network.state_dict_for_saving(dtype)))
        if averages is not None:
            beside = path.with_name(f"{path.stem}-ema{path.suffix}")
            target = beside if self.args.ema_save == "beside" else path
            files.append((target, trainer.network.state_dict_for_saving(dtype, averages)))

        def write() -> None:
            wanted = [each for target, tensors in files for each in self._in_formats(target, tensors)]
            for target, tensors in wanted:
                write_weights(target, tensors, described.with_hashes(metadata, tensors, wait=final))
                self.upload(target)
            remove([p for p in old() if p not in {target for target, _ in wanted}])

        self.saver.submit(write)

    def _in_formats(self, path: Path, tensors: dict[str, Tensor]) -> list[tuple[Path, dict[str, Tensor]]]:
        """The files of --save_format; beside kohya's the other one has a name of its own."""
        wanted = self.args.save_format
        files = [(path, tensors)] if wanted != "diffusers" else []
        if wanted != "kohya":
            target = path if wanted == "diffusers" else path.with_name(f"{path.stem}-diffusers{path.suffix}")
            files.append((target, to_diffusers(tensors)))
        return files

    def _save_encoders(self) -> Callable[[], None]:
        """What writes the text encoders with the trained LoRA in them, where that is wanted."""
        trainer = self.trainer
        with self.evaluation_weights():
            lora = trainer.network.state_dict_for_saving()

        def write() -> None:
            with told_if_unwritable(self.names.final()):
                written = trainer.save_text_encoders(lora, self.names.final().with_suffix(""))
            for path in written:
                logger.info("Saved %s", path)
                self.upload(path)

        return write

    def save_state(self, folder: Path, position: TrainProgress, old: Old = list) -> None:
        """Hand a snapshot of the whole run to the saver; several processes write together."""
        trainer = self.trainer
        snapshot = take_snapshot(
            position,
            trainer.state_options(),
            trainer.network.state_dict(),
            self._components(),
        )
        if trainer.accelerator.num_processes > 1:
            self.saver.flush()
            with told_if_unwritable(folder):
                write_state(folder, snapshot, trainer.accelerator.process_index, trainer.accelerator.wait_for_everyone)
            if self.main:
                self.upload(folder)
                remove(old())
            return

        def write() -> None:
            with told_if_unwritable(folder):
                write_state(folder, snapshot)
            logger.info("Saved state %s", folder)
            self.upload(folder)
            remove([p for p in old() if p != folder])

        self.saver.submit(write)

    def upload(self, path: Path) -> None:
        """Send a saved file, or a state if that is wanted, to the Hub. Called from the saver's thread."""
        if self.hub is not None and (not path.is_dir() or self.args.save_state_to_huggingface):
            self.hub.submit(path)

    # --- validation and previews -----------------------------------------------------------------------------------

    def validate(self, position: TrainProgress, kind: str) -> None:
        """The loss on the held-out images at fixed timesteps and noise."""
        trainer = self.trainer
        if trainer.validation_loader is None or self.should_stop():
            return
        with trainer.doing("validating"), self.evaluation_weights():
            loss = validate(
                trainer.validation_loader.batches(0),
                trainer.validation_losses,
                trainer.validation_timesteps,
                trainer.validation_seed,
                self.args.max_validation_steps,
                StepGenerators(trainer.device),
                [trainer.network],
                self._validation_progress,
                (trainer.accelerator.process_index, trainer.accelerator.num_processes),
            )
        loss = trainer.accelerator.reduce(loss, "sum")  # [sum, count]
        self.metrics.validation(position, kind, loss)

    def _validation_progress(self, batches: Iterable[Any]) -> Iterator[Any]:
        plan = self.trainer.plan.validation
        total = 0 if plan is None else plan.batches_per_epoch
        return progress_bar(batches, "Validation", self.main, min(total, self.args.max_validation_steps or total))

    def make_previews(self, position: TrainProgress, epoch: int | None) -> None:
        if self.previewer is None or self.should_stop():  # who stops the run may not wait for pictures
            return
        with self.trainer.doing("drawing previews"), self.evaluation_weights(), self.trainer.join_uneven_inputs():
            multiplier = self.trainer.network.multiplier
            self.trainer.network.set_multiplier(1.0)
            previews = self.previewer.make(moment(position.step, epoch), [self.trainer.network])
            self.trainer.network.set_multiplier(multiplier)
        own = [PreviewRecord(position.step, epoch, p.index, p.prompt.prompt, p.path) for p in previews]
        records = sorted(self.trainer.gather(own), key=lambda record: record.index)
        self.previews += records
        if self.main:
            self.metrics.previews(position, records)
            path, shown = self.names.folder / f"{self.names.name or 'last'}_contact_sheet.png", list(self.previews)
            self.saver.submit(lambda: write_sheet(path, shown))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The weights as a user of the file would have them: averaged where an EMA or the optimizer averages."""
        trainer = self.trainer
        with trainer.optimizer.evaluation_weights():
            if trainer.ema is None:
                yield
            else:
                with trainer.ema.swapped():
                    yield

    # --- resume ----------------------------------------------------------------------------------------------------

    def _restore(self, state: SavedState) -> TrainProgress:
        trainer = self.trainer
        problems = trainer.resume_problems(state)  # once more: memory options may have been chosen since
        if problems:
            raise UserError(problems)
        missing = trainer.network.load_state_dict(state.weights(), strict=True)
        assert not missing.missing_keys
        for name, component in self._components().items():
            saved = state.component(name)
            if saved is None:
                raise UserError(f"--resume {state.folder}: {name}.pt is missing. Resume from another state.")
            component.load_state_dict(saved)
        logger.info("Resumed at step %d (epoch %d)", state.position.step, state.position.epoch + 1)
        return state.position

    def _start_given(self, state: SavedState | None, position: TrainProgress) -> TrainProgress:
        """Where --initial_step or --initial_epoch say that the run starts; a fresh schedule is brought there."""
        start = self.trainer.initial_progress()
        if start is None:
            return position
        if state is None:
            self.trainer.schedule.advance(start.step)
        else:
            logger.warning("The state is at step %d, but --initial_step or --initial_epoch wins.", position.step)
        logger.info("Starting at step %d (epoch %d)", start.step, start.epoch + 1)
        return start

    def _components(self) -> dict[str, Any]:
        trainer = self.trainer
        parts = {
            "optimizer": trainer.optimizer,
            "scheduler": trainer.schedule,
            "averages": self.metrics,
            "scaler": trainer.scaler,
            "ema": trainer.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _minutes_are_up(self) -> bool:
        minutes = self.args.save_every_n_minutes
        return bool(minutes) and time.monotonic() - self.last_saved_at >= 60 * minutes
