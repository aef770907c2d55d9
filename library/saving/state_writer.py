"""Saves training states: alone in the background, or together with the other ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from library.saving.hub import HubUploader
from library.saving.saver import BackgroundSaver, remove, translate_write_errors
from library.saving.state import Snapshot, Stateful, take_snapshot, write_state
from library.training.train_progress import TrainProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class StateWriter:
    """Takes snapshots of the run between two steps and has them written."""

    def __init__(
        self,
        network: nn.Module,
        components: Mapping[str, Stateful],
        options: Callable[[], Mapping[str, object]],
        saver: BackgroundSaver,
        accelerator: Accelerator,
        hub: HubUploader | None = None,
    ):
        """options: returns those that decide what the run computes. hub: where states are uploaded to; None: nowhere."""
        self.network, self.components, self.options = network, components, options
        self.saver, self.accelerator, self.hub = saver, accelerator, hub

    def save(self, folder: Path, progress: TrainProgress, obsolete: Callable[[], list[Path]] = list) -> None:
        """Save the whole run. obsolete: returns the older states that may go; called when the new one is on the disk."""
        snapshot = take_snapshot(progress, self.options(), self.network.state_dict(), self.components)
        if self.accelerator.num_processes > 1:
            self._write_together(folder, snapshot, obsolete)
            return

        def write() -> None:
            with translate_write_errors(folder):
                write_state(folder, snapshot)
            logger.info("Saved state %s", folder)
            self._upload(folder)
            remove([old for old in obsolete() if old != folder])

        self.saver.submit(write)

    def _write_together(self, folder: Path, snapshot: Snapshot, obsolete: Callable[[], list[Path]]) -> None:
        """Every rank adds its random states; all wait until the folder is whole."""
        accelerator = self.accelerator
        self.saver.flush()
        with translate_write_errors(folder):
            write_state(folder, snapshot, accelerator.process_index, accelerator.wait_for_everyone)
        if accelerator.is_main_process:
            self._upload(folder)
            remove(obsolete())

    def _upload(self, folder: Path) -> None:
        if self.hub is not None:
            self.hub.submit(folder)
