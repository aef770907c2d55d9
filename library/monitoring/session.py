"""The training loop with all that surrounds it: metrics, saves, validation, previews, report, signals. Open this package here.

Each of them is a callback of the loop, in a file of its own; this one puts them together and shows the order in which they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from library.common.errors import UserError
from library.common.seeds import StepGenerators
from library.data.batch import Batch
from library.data.dataset import DatasetIndex
from library.data.loader import Loader
from library.data.prompts import PreviewPrompt
from library.distributed.consensus import Agreement, gather
from library.monitoring.async_scalars import AsyncScalars
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.interruption import Interruption
from library.monitoring.metrics import LossAverages, RunMetrics
from library.monitoring.preview_callback import Previews
from library.monitoring.previews import Previewer
from library.monitoring.report.html_page import RunDescription
from library.monitoring.report.run_report import RunReport, versions
from library.monitoring.validation import Validation
from library.saving.checkpoints import Checkpoints, EpochCheckpoints, SaveEncoders, SavingSettings, StepCheckpoints
from library.saving.hub import HubUploader
from library.saving.lora_files import LoraFileSettings, LoraFileWriter, TrainedWeights
from library.saving.metadata import FamilyFacts, FileMetadata, RunFacts
from library.saving.restore import StartSettings, starting_progress
from library.saving.saver import BackgroundSaver
from library.saving.state import Stateful
from library.saving.state_writer import StateWriter
from library.training.adapted_model import AdaptedModel
from library.training.callback_settings import CallbackSettings
from library.training.loop import Callback, TrainingLoop
from library.training.optimization import Optimization
from library.training.optimizers import logged_rates
from library.training.signals import StopSignals
from library.training.step import BatchLosses, TrainingStep
from library.training.stop_control import StopControl
from library.training.train_progress import TrainProgress
from networks.network import Network

if TYPE_CHECKING:
    from accelerate import Accelerator

C = TypeVar("C")  # what the model family conditions its denoiser on
Components = Mapping[str, Stateful]
"""What a training state holds beside the weights, by the names of its files."""


@dataclass(frozen=True)
class SessionSettings:
    callbacks: CallbackSettings
    saving: SavingSettings
    lora_files: LoraFileSettings
    start: StartSettings
    uploads_states: bool = False


@dataclass(frozen=True)
class SessionData:
    """What a run trains and validates on."""

    index: DatasetIndex
    loader: Loader
    samples_of: Callable[[int], Sequence[int]]  # of an epoch: samples of each micro-batch, summed over the processes
    validation_loader: Loader | None
    prompts: Sequence[PreviewPrompt]
    prompt_texts: Mapping[str, Mapping[str, Tensor]]  # by text: the outputs of encoders that do not run in training

    def failure(self) -> UserError | None:
        """Why this process cannot read its batches any more; None: it can."""
        return self.loader.failure or (self.validation_loader.failure if self.validation_loader else None)


@dataclass(frozen=True)
class TrainingSession(Generic[C]):
    """Runs the loop once. The fields are what the callbacks work with."""

    settings: SessionSettings
    data: SessionData
    accelerator: Accelerator
    model: AdaptedModel[C]
    network: Network
    optimization: Optimization
    step: TrainingStep[C]
    family: FamilyFacts
    facts: RunFacts
    hub: HubUploader | None
    doing: Callable[[str], AbstractContextManager[None]]  # reports a full memory with what was being done
    join_uneven_inputs: Callable[[], AbstractContextManager[None]]
    save_encoders: SaveEncoders

    def run(self) -> Path:
        """Train from the start, or from where a state left off, to the end; return the LoRA's path."""
        settings, max_steps = self.settings.callbacks, self.settings.callbacks.max_steps
        scalars = AsyncScalars(self.accelerator.device, lockstep=self.accelerator.num_processes > 1)
        averages = LossAverages(settings.metrics.steps_per_epoch, scalars)
        components = self._components(averages)
        saver, signals = BackgroundSaver(), StopSignals()
        records: list[PreviewRecord] = []
        checkpoints = self._checkpoints(saver, components)
        metrics = self._metrics(scalars, averages, checkpoints)
        stop = StopControl(
            signals, Agreement(self.accelerator.num_processes), checkpoints.minutes_are_up, self.data.failure
        )
        report = self._report(metrics, records, lambda: signals.received is not None)
        validation, previews = self._validation(metrics, stop), self._previews(metrics, stop, saver, records)
        in_order: list[Callback | None] = [
            report,
            metrics,
            stop,
            StepCheckpoints(checkpoints, stop.should_save, stop.save_is_requested),
            validation,
            EpochCheckpoints(checkpoints),
            previews,
        ]
        with ExitStack() as stack:
            for context in (report, self.hub, saver, signals, metrics):  # closed in reverse order
                if context is not None:
                    stack.enter_context(context)
            progress = starting_progress(self.settings.start, self.network, self.optimization.schedule, components)
            records += metrics.start(progress)
            if report is not None:
                report.start(progress)
            if previews is not None:
                previews.start(progress)
            callbacks = [callback for callback in in_order if callback is not None]
            interruption = Interruption(self.data.failure, checkpoints, progress)
            loop = TrainingLoop(
                self.step, settings.accumulation, max_steps, [interruption, *callbacks], stop.should_stop
            )
            with interruption:
                progress = loop.run(progress, self.data.loader.batches, self.data.samples_of)
            if stop.should_stop() and progress.step < max_steps:
                checkpoints.save_stopped(progress)
                checkpoints.flush()
                self.accelerator.wait_for_everyone()  # a launcher that sees one process fail ends the others
                interruption.raise_if_failed(progress)
                stop.exit(progress.step)
            return self._finish(progress, checkpoints, validation, previews)

    def _finish(
        self,
        progress: TrainProgress,
        checkpoints: Checkpoints,
        validation: Validation | None,
        previews: Previews | None,
    ) -> Path:
        """Save the final LoRA; then do what takes long, so that a run that is killed meanwhile has it."""
        path = checkpoints.save_final(progress, self.save_encoders)
        checkpoints.flush()
        if validation is not None:
            validation.finish(progress)
        checkpoints.save_final_state(progress)  # the schedule has seen the validation loss
        checkpoints.flush()
        if previews is not None:
            previews.finish(progress)
            checkpoints.flush()
        return path

    def _components(self, averages: LossAverages) -> Components:
        trained = self.optimization
        parts: dict[str, Stateful | None] = {
            "optimizer": trained.optimizer,
            "scheduler": trained.schedule,
            "averages": averages,
            "scaler": trained.scaler,
            "ema": trained.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _weights(self) -> TrainedWeights:
        return TrainedWeights(self.network, self.optimization.optimizer, self.optimization.ema)

    def _checkpoints(self, saver: BackgroundSaver, components: Components) -> Checkpoints:
        settings = self.settings
        metadata = FileMetadata(self.facts) if self.accelerator.is_main_process else None
        files = LoraFileWriter(self._weights, settings.lora_files, metadata, saver, self.hub)
        hub = self.hub if settings.uploads_states else None
        states = StateWriter(self.network, components, lambda: settings.start.options, saver, self.accelerator, hub)
        return Checkpoints(settings.saving, files, states, self.facts.family.parts)

    def _metrics(self, scalars: AsyncScalars, averages: LossAverages, checkpoints: Checkpoints) -> RunMetrics:
        trained = self.optimization
        rates = partial(logged_rates, trained.optimizer.optimizer, trained.group_names)
        return RunMetrics(
            self.settings.callbacks.metrics,
            self.accelerator,
            scalars,
            averages,
            trained.schedule,
            rates,
            checkpoints.save_stopped,
        )

    def _validation(self, metrics: RunMetrics, stop: StopControl) -> Validation | None:
        if self.data.validation_loader is None:
            return None

        def losses(batch: Batch, generators: StepGenerators, timestep: int) -> BatchLosses:
            return self.step.losses(batch, generators, timestep)

        contexts = (partial(self.doing, "validating"), self._weights.evaluation)
        parts = (self.data.validation_loader, losses, self.network, self.accelerator)
        return Validation(self.settings.callbacks.validation, *parts, metrics, stop.should_stop, contexts)

    def _previews(
        self, metrics: RunMetrics, stop: StopControl, saver: BackgroundSaver, records: list[PreviewRecord]
    ) -> Previews | None:
        model, data, schedule = self.model, self.data, self.settings.callbacks.preview_schedule
        if schedule is None or not data.prompts:
            return None
        previewer = Previewer(
            data.prompts,
            self.settings.callbacks.previews,
            lambda prompt, text: model.conditioner.of_prompt(prompt, text, data.prompt_texts[text]),
            model.predict,
            model.codec.decode,
            self.accelerator.device,
            model.conditioner.join,
        )
        contexts = (partial(self.doing, "drawing previews"), self._weights.evaluation, self.join_uneven_inputs)
        collect = partial(gather, self.accelerator)
        network = self.network
        return Previews(schedule, previewer, network, metrics, saver, collect, stop.should_stop, records, contexts)

    def _report(
        self, metrics: RunMetrics, records: Sequence[PreviewRecord], interrupted: Callable[[], bool]
    ) -> RunReport | None:
        settings, trained = self.settings.callbacks.report, self.optimization
        if settings is None or not self.accelerator.is_main_process:
            return None
        parameters = sum(parameter.numel() for parameter in trained.parameters)
        network = f"{settings.network}, {parameters:,} parameters"
        description = RunDescription(
            title=settings.title,
            max_steps=self.settings.callbacks.max_steps,
            epochs=self.settings.callbacks.epochs,
            about=[self.family.title, self.family.base_file.name, network, trained.optimizer.name_for_metadata],
            options=settings.changed,
            other_options=settings.defaults,
            versions=versions(self.accelerator.device),
            resume_command=settings.resume_command,
            again_command=settings.again_command,
        )

        def has_state() -> bool:
            return any(settings.path.parent.glob(settings.states))

        return RunReport(settings.path, description, self.data.index, metrics, records, interrupted, has_state)
