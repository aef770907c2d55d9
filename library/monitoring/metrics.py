"""What a run tells while it trains: the progress bar, a line of JSON a step, trackers, curves for the report.

A step's numbers travel to the host behind the step and are told when they have arrived: nothing waits for them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.progress import Progress
from library.flow.loss import RunningLoss, TimestepLosses
from library.monitoring.async_scalars import LateValues
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.metrics_file import Curves, MetricsFile
from library.monitoring.trackers import Trackers
from library.options.values import shared_options
from library.saving.names import OutputNames
from library.training.loop import StepReport
from library.training.optimizers import logged_rates
from library.training.train_progress import TrainProgress

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)
NORM_NAMES = ("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm")


class RunMetrics:
    """Collects and tells. Use it as a context: leaving it tells the last values and closes everything."""

    def __init__(self, trainer: NetworkTrainer, names: OutputNames):
        self.trainer, self.args = trainer, trainer.args
        self.main = trainer.accelerator.is_main_process
        self.average = RunningLoss(max(1, trainer.plan.length.steps_per_epoch))
        self.by_timestep = TimestepLosses()
        self.late = LateValues(trainer.device, together=trainer.accelerator.num_processes > 1)
        self.file = MetricsFile(names.folder / f"{names.name or 'last'}.metrics.jsonl")
        self.curves = Curves()
        self.nonfinite_in_a_row = 0
        self.skipped = 0
        self.trackers: Trackers | None = None
        self.progress: Progress | None = None

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.late.tell_all()
        if self.progress is not None:
            self.progress.close()
        if self.trackers is not None:
            self.trackers.close()
        self.file.close()

    def start(self, position: TrainProgress) -> list[PreviewRecord]:
        """The first step is about to be made. Returns the previews that a resumed run has made before."""
        config = shared_options(self.args) if self.args.log_config else None
        self.trackers = Trackers(self.trainer.accelerator, self.trainer.tracking, config)
        earlier = self.file.open(position.step) if self.main else []
        for record in earlier:
            self.curves.add(record)
        self.progress = Progress(self.trainer.plan.length.max_steps, "Training", position.step, shown=self.main)
        self.last_time = time.perf_counter()
        return [record for record in map(PreviewRecord.from_record, earlier) if record is not None]

    # --- what happens ----------------------------------------------------------------------------------------------

    def step(self, report: StepReport) -> None:
        """Send a step's numbers on their way, and tell those that have arrived."""
        norms = report.norm_report
        extra = [norms.keys_scaled, norms.average_norm, norms.maximum_norm] if norms is not None else []
        single = [report.loss, report.gradient_norm, report.nonfinite, *extra]
        values = torch.cat([*(value.float().reshape(1) for value in single), report.losses.float()])
        rates = logged_rates(self.trainer.optimizer.optimizer, self.trainer.group_names)
        now = time.perf_counter()
        rest = replace(report, losses=values, gradient_norm=values, nonfinite=values, loss=values, norm_report=None)
        self.late.send(values, partial(self._tell_step, rest, len(extra), rates, now - self.last_time))
        self.last_time = now
        self.late.tell_arrived()
        assert self.progress is not None
        self.progress.advance()

    def epoch(self, position: TrainProgress) -> None:
        """An epoch is over. Schedules that watch the loss are told it here where there is no validation."""
        self.late.send(None, lambda _: self._tell_epoch(position))
        if self.trainer.schedule.watches_loss and self.trainer.validation_loader is None:
            self.late.tell_all()
            mean = self.average.mean().to(self.trainer.device)
            self.trainer.schedule.observe(self.trainer.accelerator.reduce(mean, "mean").item())

    def validation(self, position: TrainProgress, kind: str, total: Tensor) -> None:
        """total: [sum of losses, count] over all processes. kind: "step" or "epoch"."""
        loss, count = total.tolist()
        if count == 0:
            return
        self.late.tell_all()
        average = loss / count
        logger.info("Validation at step %d: loss %.5f", position.step, average)
        values = {
            f"loss/validation/{kind}_average": average,
            f"loss/validation/{kind}_divergence": average - self.average.mean().item(),
        }
        self._record(position, values, x=position.epoch if kind == "epoch" else position.step)
        self.trainer.schedule.observe(average)
        self.pause_is_over()

    def previews(self, position: TrainProgress, records: list[PreviewRecord]) -> None:
        """Previews of all processes, on the main one."""
        for record in records:
            self.file.write(record.as_record())
        if self.trackers is not None and records and self.trainer.tracking.names:
            images = [(record.index, record.prompt, record.image()) for record in records if record.path.exists()]
            self.trackers.images(images, position.step, position.epoch)
        self.pause_is_over()

    def pause_is_over(self) -> None:
        """The next step's time begins now: previews and validation are no part of it."""
        self.last_time = time.perf_counter()
        if self.progress is not None:
            self.progress.starts_now()

    def state_dict(self) -> dict[str, Any]:
        self.late.tell_all()
        return {"average": self.average.state_dict(), "by_timestep": self.by_timestep.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.by_timestep.load_state_dict(state["by_timestep"])

    # --- telling ---------------------------------------------------------------------------------------------------

    def _tell_step(
        self, report: StepReport, extra: int, rates: dict[str, float], seconds: float, numbers: list[float]
    ) -> None:
        """numbers: loss, gradient norm, whether it was not finite, `extra` norms, the loss of every sample."""
        loss, norm, nonfinite, *rest = numbers
        norms, losses = rest[:extra], torch.tensor(rest[extra:])
        self.average.add(torch.tensor(loss))
        self.by_timestep.add(report.timesteps, losses)
        average = self.average.mean().item()
        values = {"loss/current": loss, "loss/average": average, **rates, **dict(zip(NORM_NAMES, norms))}
        own = {"gradient_norm": norm, "seconds": seconds, "memory_gib": memory_gib(self.trainer.device)}
        self._record(report.progress, values, report.progress.step, own)
        assert self.progress is not None
        self.progress.note(avr_loss=f"{average:.4f}", lr=f"{next(iter(rates.values()), 0.0):.2e}")
        self._watch(bool(nonfinite), report)

    def _tell_epoch(self, position: TrainProgress) -> None:
        self._record(position, {"loss/epoch_average": self.average.mean().item()}, x=position.epoch)

    def _record(
        self, position: TrainProgress, values: dict[str, float], x: int, own: dict[str, float] | None = None
    ) -> None:
        """values go to the file, the curves and the trackers, `own` to the first two."""
        epoch = position.epoch + (position.batch > 0)
        record = {"step": position.step, "epoch": epoch, **values, **(own or {})}
        self.file.write(record)
        self.curves.add(record)
        if self.trackers is not None:
            self.trackers.scalars(values, x, position.step, epoch)

    def _watch(self, nonfinite: bool, report: StepReport) -> None:
        """Count skipped steps; stop a run that does nothing else."""
        if not nonfinite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        self.skipped += 1
        at = ", ".join(f"{Path(p).name} (timestep {t:g})" for p, t in zip(report.paths, report.timesteps.tolist()))
        logger.warning("Step %d had a gradient that is not finite and was skipped: %s", report.progress.step, at)
        limit = self.args.max_nonfinite_steps
        if limit and self.nonfinite_in_a_row >= limit:
            self.nonfinite_in_a_row = (
                0  # said once: numbers still on their way must not say it again while state is saved
            )
            raise UserError(
                f"{limit} steps in a row had gradients that are not finite; training has stopped. The last saved files are good. "
                "Try --mixed_precision bf16, a lower --learning_rate, or --max_grad_norm 1.0, and look at the images named above."
            )


def memory_gib(device: torch.device) -> float:
    """The peak of what tensors took on a GPU, else what this process takes, in GiB. It asks no device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30
