"""Callback: draws previews when they are due, and puts all of the run's previews on one contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from torch import nn

from library.monitoring.contact_sheet import PreviewRecord, write_sheet
from library.monitoring.metrics import RunMetrics
from library.monitoring.previews import Preview
from library.saving.saver import BackgroundSaver
from library.training.callback_settings import PreviewSchedule, step_tag
from library.training.train_progress import StepReport, TrainProgress
from networks.network import Network


class PreviewMaker(Protocol):
    """Draws this rank's share of the previews; see Previewer."""

    def make(self, tag: str, modules: Sequence[nn.Module]) -> list[Preview]: ...


class Previews:
    """Draws previews with the averaged weights at full strength, whatever the training batch's multiplier."""

    def __init__(
        self,
        schedule: PreviewSchedule,
        previewer: PreviewMaker,
        network: Network,
        metrics: RunMetrics,
        saver: BackgroundSaver,
        gather: Callable[[list[PreviewRecord]], list[PreviewRecord]],
        should_stop: Callable[[], bool],
        records: list[PreviewRecord],
        contexts: Sequence[Callable[[], AbstractContextManager[None]]] = (),
    ):
        """records: previews of the whole run, to which new ones are added. contexts: entered in order around drawing."""
        self.schedule, self.previewer, self.network = schedule, previewer, network
        self.metrics, self.saver, self.gather = metrics, saver, gather
        self.should_stop, self.records, self.contexts = should_stop, records, contexts

    def start(self, progress: TrainProgress) -> None:
        """Draw the previews that come before the first step."""
        if self.schedule.at_first and progress.step == 0:
            self.make(progress, epoch=0 if self.schedule.every_epochs else None)

    def on_step_end(self, report: StepReport) -> None:
        if not self._is_last(report.progress) and self.schedule.step_is_due(report.progress.step):
            self.make(report.progress, epoch=None)

    def on_epoch_end(self, progress: TrainProgress) -> None:
        if not self._is_last(progress) and self.schedule.epoch_is_due(progress.epoch):
            self.make(progress, progress.epoch)

    def finish(self, progress: TrainProgress) -> None:
        """Draw what is due after the last step, unless it was drawn before. Call it once the final LoRA is saved."""
        ends_epoch = progress.batch == 0 and self.schedule.epoch_is_due(progress.epoch)
        if not ends_epoch and not self.schedule.step_is_due(progress.step):
            return
        own = [record for record in self.records if record.step == progress.step]
        if not self.gather(own):  # rank 0 alone knows what an earlier process has drawn
            self.make(progress, progress.epoch if ends_epoch else None)

    def _is_last(self, progress: TrainProgress) -> bool:
        return progress.step >= self.metrics.settings.max_steps

    def make(self, progress: TrainProgress, epoch: int | None) -> None:
        """Draw all previews now; a run that is stopping does not wait for them. epoch: in their names in place of the step."""
        if self.should_stop():
            return
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            multiplier = self.network.multiplier
            self.network.set_multiplier(1.0)
            previews = self.previewer.make(step_tag(progress.step, epoch), [self.network])
            self.network.set_multiplier(multiplier)
        own = [PreviewRecord(progress.step, epoch, p.index, p.prompt.prompt, p.path) for p in previews]
        records = sorted(self.gather(own), key=lambda record: record.index)
        self.records += records
        if self.metrics.accelerator.is_main_process:
            self.metrics.record_previews(progress, records)
            shown = list(self.records)
            self.saver.submit(lambda: write_sheet(self.schedule.sheet, shown))
