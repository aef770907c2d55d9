"""The numbers of a run while it trains: progress bar, one line of JSON a step, trackers, curves for the report.

A step's numbers are copied to the host asynchronously and recorded when they have arrived: no step waits for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.progress import Progress
from library.flow.loss import RunningLoss, RunningLossState, TimestepLosses
from library.monitoring.async_scalars import AsyncScalars
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.metrics_file import Curves, MetricsFile
from library.monitoring.nonfinite import NonfiniteWatch
from library.monitoring.trackers import Trackers
from library.training.callback_settings import MetricsSettings
from library.training.schedulers import Schedule
from library.training.train_progress import StepReport, TrainProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
NORM_NAMES = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")


@dataclass(frozen=True)
class PendingStep:
    """What the host knows of a step whose numbers are on their way from the device."""

    progress: TrainProgress
    timesteps: Tensor  # [samples], on the CPU
    paths: list[str]
    rates: dict[str, float]  # learning rates by their names in the log
    seconds: float
    norm_count: int  # numbers of the norm report: 0, or as many as NORM_NAMES


class LossAverages:
    """The running loss and the losses by timestep, on the host. A component of the training state."""

    def __init__(self, steps_per_epoch: int, scalars: AsyncScalars):
        """scalars: bring the losses; they are flushed before the state is taken."""
        self.running = RunningLoss(max(1, steps_per_epoch))
        self.by_timestep = TimestepLosses()
        self._scalars = scalars

    def state_dict(self) -> dict[str, object]:
        self._scalars.flush()
        return {"average": self.running.state_dict(), "by_timestep": self.by_timestep.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.running.load_state_dict(cast("RunningLossState", state["average"]))
        self.by_timestep.load_state_dict(cast("dict[str, Tensor]", state["by_timestep"]))


class RunMetrics:
    """Callback: records the numbers of every step and epoch, and those that validation and previews bring.

    Use it as a context: leaving it records the last values and closes everything.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        accelerator: Accelerator,
        scalars: AsyncScalars,
        averages: LossAverages,
        schedule: Schedule,
        learning_rates: Callable[[], dict[str, float]],
        save_before_stop: Callable[[TrainProgress], None],
    ):
        """save_before_stop: saves the run before too many bad steps in a row end it with a UserError."""
        self.settings, self.accelerator = settings, accelerator
        self.scalars, self.averages, self.schedule = scalars, averages, schedule
        self.learning_rates, self.save_before_stop = learning_rates, save_before_stop
        self.nonfinite = NonfiniteWatch(settings.max_nonfinite_steps)
        self.file = MetricsFile(settings.file)
        self.curves = Curves()
        self.trackers: Trackers | None = None
        self.bar: Progress | None = None
        self.last_time = time.perf_counter()

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.scalars.flush()
        if self.bar is not None:
            self.bar.close()
        if self.trackers is not None:
            self.trackers.close()
        self.file.close()
        if error is None:
            self.nonfinite.check_end()

    def start(self, progress: TrainProgress) -> list[PreviewRecord]:
        """Open everything before the first step. Returns the previews that a resumed run has made before."""
        is_main = self.accelerator.is_main_process
        self.trackers = Trackers(self.accelerator, self.settings.tracking, self.settings.config)
        earlier = self.file.open(progress.step) if is_main else []
        for record in earlier:
            self.curves.add(record)
        self.bar = Progress(self.settings.max_steps, "Training", progress.step, shown=is_main)
        self.last_time = time.perf_counter()
        return [record for record in map(PreviewRecord.from_record, earlier) if record is not None]

    # --- what happens ----------------------------------------------------------------------------------------------

    def on_step_end(self, report: StepReport) -> None:
        """Push the step's numbers, and record those of earlier steps that have arrived."""
        try:
            self.push_step(report)
            self.scalars.poll()
        except UserError:  # only bad steps in a row: each was skipped, so the weights are those of the last good one
            self.save_before_stop(report.progress)
            raise
        if self.bar is not None:
            self.bar.advance()

    def push_step(self, report: StepReport) -> None:
        """Send a step's numbers to the host in one tensor: loss, gradient norm, nonfinite, norms, the loss of every sample."""
        norms = report.norm_report
        extra = [norms.keys_scaled, norms.average_norm, norms.maximum_norm] if norms is not None else []
        single = [report.loss, report.gradient_norm, report.nonfinite, *extra]
        values = torch.cat([*(value.float().reshape(1) for value in single), report.losses.float()])
        now = time.perf_counter()
        step = PendingStep(
            progress=report.progress,
            timesteps=report.timesteps,
            paths=report.paths,
            rates=self.learning_rates(),
            seconds=now - self.last_time,
            norm_count=len(extra),
        )
        self.last_time = now
        self.scalars.push(values, partial(self._record_step, step))

    def on_epoch_end(self, progress: TrainProgress) -> None:
        """Record the epoch's average. Without validation, schedules that watch the loss observe it here."""
        self.scalars.push(None, lambda _: self._record_epoch(progress))
        if self.schedule.watches_loss and not self.settings.has_validation:
            self.scalars.flush()
            mean = self.averages.running.mean().to(self.accelerator.device)
            self.schedule.observe(cast(Tensor, self.accelerator.reduce(mean, "mean")).item())

    def record_validation(self, progress: TrainProgress, kind: str, total: Tensor) -> None:
        """total: [sum of losses, count] over all ranks. kind: "step" or "epoch"."""
        loss, count = total.tolist()
        if count == 0:
            return
        self.scalars.flush()
        average = loss / count
        self.nonfinite.observe_loss(average)
        logger.info("Validation at step %d: loss %.5f", progress.step, average)
        values = {
            f"loss/validation/{kind}_average": average,
            f"loss/validation/{kind}_divergence": average - self.averages.running.mean().item(),
        }
        self._record(progress, values, x=progress.epoch if kind == "epoch" else progress.step)
        self.schedule.observe(average)
        self.restart_clock()

    def record_previews(self, progress: TrainProgress, records: list[PreviewRecord]) -> None:
        """Record the previews of all ranks, on rank 0."""
        for record in records:
            self.file.write(record.as_record())
        if self.trackers is not None and records and self.settings.tracking.names:
            images = [(record.index, record.prompt, record.image()) for record in records if record.path.exists()]
            self.trackers.images(images, progress.step, progress.epoch)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start the next step's time now: previews and validation are no part of it."""
        self.last_time = time.perf_counter()
        if self.bar is not None:
            self.bar.starts_now()

    # --- recording -------------------------------------------------------------------------------------------------

    def _record_step(self, step: PendingStep, numbers: list[float]) -> None:
        """numbers: as pushed by `push_step`."""
        loss, norm, nonfinite, *rest = numbers
        norms, losses = rest[: step.norm_count], torch.tensor(rest[step.norm_count :])
        self.averages.running.add(torch.tensor(loss))
        self.averages.by_timestep.add(step.timesteps, losses)
        average = self.averages.running.mean().item()
        values = {"loss/current": loss, "loss/average": average, **step.rates, **dict(zip(NORM_NAMES, norms))}
        own = {"gradient_norm": norm, "seconds": step.seconds, "memory_gib": memory_gib(self.scalars.device)}
        self._record(step.progress, values, step.progress.step, own)
        if self.bar is not None:
            self.bar.note(avr_loss=f"{average:.4f}", lr=f"{next(iter(step.rates.values()), 0.0):.2e}")
        self.nonfinite.observe_loss(loss)
        self.nonfinite.check(bool(nonfinite), step.progress.step, step.paths, step.timesteps)

    def _record_epoch(self, progress: TrainProgress) -> None:
        self._record(progress, {"loss/epoch_average": self.averages.running.mean().item()}, x=progress.epoch)

    def _record(
        self, progress: TrainProgress, values: dict[str, float], x: int, own: dict[str, float] | None = None
    ) -> None:
        """Write `values` to the file, the curves and the trackers, `own` to the first two."""
        epoch = progress.epoch + (progress.batch > 0)
        record = {"step": progress.step, "epoch": epoch, **values, **(own or {})}
        self.file.write(record)
        self.curves.add(record)
        if self.trackers is not None:
            self.trackers.scalars(values, x, progress.step, epoch)


def memory_gib(device: torch.device) -> float:
    """The peak of allocated memory on a GPU, else this process's resident memory, in GiB. Does not synchronize the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30
