"""Callback: after every step all ranks agree whether the run stops, and whether it saves out of turn."""

from __future__ import annotations

import logging
from collections.abc import Callable

from library.distributed.consensus import Agreement
from library.training.signals import StopSignals
from library.training.train_progress import StepReport, TrainProgress

logger = logging.getLogger(__name__)


class StopControl:
    """Turns one rank's signal, or clock, into a decision of all ranks: to stop, to save because of the clock, to save on request.

    With one rank a decision holds at once; with several, one step later (see Agreement). The callbacks that act on it come
    behind this one.
    """

    def __init__(
        self,
        signals: StopSignals,
        agreement: Agreement,
        save_is_due: Callable[[], bool],
        failure: Callable[[], Exception | None] = lambda: None,
    ):
        """save_is_due: whether this rank's clock asks for a save. failure: why this rank cannot go on, None where it can."""
        self.failure = failure
        self.signals, self.agreement, self._save_is_due = signals, agreement, save_is_due
        self._stop_agreed = self._save_agreed = self._request_agreed = False

    def on_step_end(self, report: StepReport) -> None:
        has_to_stop = self.signals.received is not None or self.failure() is not None
        answers = [has_to_stop, self._save_is_due(), self.signals.take_save_request()]
        self._stop_agreed, self._save_agreed, self._request_agreed = self.agreement.any_rank(answers)

    def on_epoch_end(self, progress: TrainProgress) -> None:
        pass

    def should_stop(self) -> bool:
        """Whether a signal was received; with several ranks, whether they have agreed that one of them received it."""
        return self._stop_agreed or (self.agreement.world_size == 1 and self.signals.received is not None)

    def should_save(self) -> bool:
        """Whether the ranks have agreed to save because of the clock."""
        return self._save_agreed

    def save_is_requested(self) -> bool:
        """Whether SIGUSR1 was received; with several ranks, whether they have agreed that one of them received it."""
        return self._request_agreed

    def exit(self, step: int) -> None:
        """End the process as a shell expects of one that a signal has stopped."""
        logger.warning("Stopped at step %d. To go on: the same command with --resume auto", step)
        raise SystemExit(self.signals.exit_code)
