"""Whether a run that is started again has anything left to do: `--resume auto` of a finished run loads no model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.common.errors import UserError
from library.common.safetensors_header import read_header
from library.distributed.consensus import gather
from library.saving.names import OutputNames
from library.saving.state import POSITION_FILE, SavedState, open_state

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinalOutputs:
    """What a run leaves at its end."""

    names: OutputNames
    max_steps: int
    lora_files: Sequence[Path]
    other_files: Sequence[Path] = ()  # text encoders
    saves_state: bool = False
    previews: Sequence[str] = ()  # patterns, under the output folder, of the previews after the last step

    def all_there(self, state: SavedState) -> bool:
        """Whether all of it is on the disk, made by the run that saved `state` or by one with the same options."""
        is_final = state.folder.name == self.names.state_final().name and state.position.step == self.max_steps
        if not is_final and (self.saves_state and not self._has_final_state()):
            return False
        files = [*self.lora_files, *self.other_files]
        saved = 0 if is_final else (state.folder / POSITION_FILE).stat().st_mtime_ns  # the final state is saved last
        return (
            all(path.is_file() and path.stat().st_mtime_ns >= saved for path in files)
            and all(self._is_of_last_step(path, state) for path in self.lora_files)
            and all(any(self.names.folder.glob(pattern)) for pattern in self.previews)
        )

    def finished_lora(self, state: SavedState, accelerator: Accelerator) -> Path | None:
        """The LoRA of a run that has nothing left to do; None where something is missing. Rank 0 decides for all."""
        if not gather(accelerator, [self.all_there(state)])[0]:
            return None
        if accelerator.is_main_process:
            logger.info("Already finished at step %d: %s", self.max_steps, self.lora_files[0])
        return self.lora_files[0]

    def _has_final_state(self) -> bool:
        try:
            return open_state(self.names.state_final()).position.step == self.max_steps
        except UserError:
            return False

    def _is_of_last_step(self, path: Path, state: SavedState) -> bool:
        """A file without metadata counts where the state shows that the last step was reached."""
        try:
            steps = read_header(path).metadata.get("ss_steps") if path.suffix == ".safetensors" else None
        except UserError:
            return False
        return state.position.step == self.max_steps if steps is None else steps == str(self.max_steps)
