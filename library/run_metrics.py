"""What a run tells while it trains: the progress bar, a line of JSON a step, trackers. Values are read one step late.

A loss is a tensor on the device when a step ends. Its copy to the host is started then and read when the next step has
been issued, so that nothing waits for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.options.errors import UserError
from library.training.loop import StepReport
from library.training.loss import RunningLoss, TimestepLosses
from library.training.optimizers import logged_rates
from library.training.output_names import OutputNames
from library.training.previews import Preview
from library.training.progress import Progress
from library.training.state import Position

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)


class RunMetrics:
    """Collects and tells. Use it as a context: leaving it reads the last values and closes everything."""

    def __init__(self, trainer: NetworkTrainer, names: OutputNames):
        self.trainer, self.args = trainer, trainer.args
        self.main = trainer.accelerator.is_main_process
        self.average = RunningLoss(max(1, trainer.plan.length.steps_per_epoch), trainer.device)
        self.by_timestep = TimestepLosses(10, trainer.device)
        self.path = names.folder / f"{names.name or 'last'}.metrics.jsonl"
        self.waiting: deque[tuple[Position, Tensor, StepReport, dict[str, float], float]] = deque()
        self.nonfinite_in_a_row = 0
        self.skipped = 0
        self.started_at = time.time()
        self.lines: Any = None
        self.progress: Progress | None = None

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._read_all()
        if self.progress is not None:
            self.progress.close()
        if self.lines is not None:
            self.lines.close()

    def start(self, position: Position) -> None:
        """The first step is about to be made."""
        self.progress = Progress(self.trainer.plan.length.max_steps, "Training", position.step, shown=self.main)
        self.last_time = time.perf_counter()
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = self.path.open("a", encoding="utf-8", buffering=1)

    def step(self, report: StepReport) -> None:
        """Take a step's values, and tell those of the step before."""
        self.average.add(report.loss)
        self.by_timestep.add(report.timesteps, report.losses)
        norms = report.after_step
        extra = [norms.keys_scaled, norms.average_norm, norms.maximum_norm] if norms is not None else []
        values = [report.loss, self.average.mean(), report.gradient_norm, report.nonfinite, *extra]
        packed = torch.stack([value.float().reshape(()) for value in values])
        rates = logged_rates(self.trainer.optimizer.optimizer, self.trainer.group_names)
        now = time.perf_counter()
        self.waiting.append((report.position, packed.to("cpu", non_blocking=True), report, rates, now - self.last_time))
        self.last_time = now
        while len(self.waiting) > 1:
            self._tell(*self.waiting.popleft())
        assert self.progress is not None
        self.progress.advance()

    def epoch(self, position: Position) -> None:
        self._write({"epoch": position.epoch, "step": position.step, "loss/epoch_average": self.average.mean().item()})

    def validation(self, position: Position, kind: str, total: Tensor) -> None:
        """total: [sum of losses, count] over all processes."""
        loss, count = total.tolist()
        if count == 0:
            return
        average = loss / count
        divergence = average - self.average.mean().item()
        logger.info("Validation at step %d: loss %.5f", position.step, average)
        self._write(
            {
                "step": position.step,
                f"loss/validation/{kind}_average": average,
                f"loss/validation/{kind}_divergence": divergence,
            }
        )
        self.trainer.schedule.observe(average)

    def previews(self, position: Position, previews: list[Preview]) -> None:
        for preview in previews:
            self._write({"step": position.step, "preview": str(preview.path), "prompt": preview.prompt.prompt})

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "by_timestep": self.by_timestep.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.by_timestep.load_state_dict(state["by_timestep"])

    def _read_all(self) -> None:
        while self.waiting:
            self._tell(*self.waiting.popleft())

    def _tell(
        self, position: Position, packed: Tensor, report: StepReport, rates: dict[str, float], seconds: float
    ) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.current_stream().synchronize() if not packed.is_pinned() else None
        loss, average, norm, nonfinite, *norms = packed.tolist()
        self._watch(bool(nonfinite), report)
        values = {"loss/current": loss, "loss/average": average, "gradient_norm": norm, **rates, "seconds": seconds}
        if norms:
            values |= dict(zip(("max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm"), norms))
        self._write({"step": position.step, "epoch": position.epoch + 1, **values})
        assert self.progress is not None
        rate = next(iter(rates.values()), 0.0)
        self.progress.note(avr_loss=f"{average:.4f}", lr=f"{rate:.2e}")

    def _watch(self, nonfinite: bool, report: StepReport) -> None:
        """Count skipped steps; stop a run that does nothing else."""
        if not nonfinite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        self.skipped += 1
        at = ", ".join(f"{Path(p).name} (timestep {t:g})" for p, t in zip(report.paths, report.timesteps.tolist()))
        logger.warning("Step %d had a gradient that is not finite and was skipped: %s", report.position.step, at)
        limit = self.args.max_nonfinite_steps
        if limit and self.nonfinite_in_a_row >= limit:
            raise UserError(
                f"{limit} steps in a row had gradients that are not finite; training has stopped. The last saved files are good. "
                "Try --mixed_precision bf16, a lower --learning_rate, or --max_grad_norm 1.0, and look at the images named above."
            )

    def _write(self, values: dict[str, Any]) -> None:
        if self.lines is not None:
            self.lines.write(json.dumps(values, ensure_ascii=False) + "\n")
