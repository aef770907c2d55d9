"""Watches for steps and losses that are not finite, and says what the files that were saved are worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from library.common.errors import UserError

logger = logging.getLogger(__name__)
SANE_GROWTH = 10  # a loss of more than this many times the lowest one is not sane
REMEDY = (
    "Try --mixed_precision bf16, a lower --learning_rate, or --max_grad_norm 1.0, and look at the images named above."
)


class NonfiniteWatch:
    """Counts steps that were skipped because of a gradient that is not finite; stops a run that does nothing else."""

    def __init__(self, limit: int):
        self.limit = limit
        self.steps, self.in_a_row, self.skipped = 0, 0, 0
        self.last_loss, self.lowest_loss = math.nan, math.inf

    def observe_loss(self, loss: float) -> None:
        """Take in a loss of training or validation."""
        self.last_loss = loss
        if math.isfinite(loss):
            self.lowest_loss = min(self.lowest_loss, loss)

    def saved_files(self) -> str:
        """What the last saved files are: "good" after a sane loss, else no more than "finite" (nothing else is saved)."""
        is_sane = math.isfinite(self.last_loss) and self.last_loss <= SANE_GROWTH * self.lowest_loss
        return "good" if is_sane else "finite"

    def check(self, nonfinite: bool, step: int, paths: Sequence[str], timesteps: Tensor) -> None:
        """Take in one step. UserError at the `limit`-th skipped step in a row."""
        self.steps += 1
        if not nonfinite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        at = ", ".join(f"{Path(p).name} (timestep {t:g})" for p, t in zip(paths, timesteps.tolist()))
        logger.warning("Step %d had a gradient that is not finite and was skipped: %s", step, at)
        if self.limit and self.in_a_row >= self.limit:
            self.in_a_row = 0  # numbers still on their way must not raise again while the state is saved
            raise UserError(
                f"{self.limit} steps in a row had gradients that are not finite; training has stopped. "
                f"The last saved files are {self.saved_files()}. {REMEDY}"
            )

    def check_end(self) -> None:
        """UserError where the run has not made a single step that counts."""
        if self.steps and self.skipped == self.steps:
            raise UserError(
                f"Every step was skipped, because its gradient was not finite: nothing has been trained in {self.steps} steps. {REMEDY}"
            )
