"""What saved files are called, and which of them are old enough to go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = ("safetensors", "ckpt", "pt")


@dataclass(frozen=True)
class OutputNames:
    """Names in output_dir. extension: without its dot."""

    folder: Path
    name: str | None
    extension: str = "safetensors"

    def epoch(self, epoch: int) -> Path:
        """After `epoch` whole epochs."""
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}.{self.extension}"

    def step(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}.{self.extension}"

    def final(self) -> Path:
        return self.folder / f"{self.name or 'last'}.{self.extension}"

    def state_epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}-state"

    def state_step(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}-state"

    def state_final(self) -> Path:
        return self.folder / f"{self.name or 'last'}-state"

    def old_epochs(self, epoch: int, keep: int, states: bool = False) -> list[Path]:
        """Epoch files (or states) of our name that lie `keep` or more epochs behind `epoch`."""
        return [path for number, path in self._numbered(r"-(\d{6})", "epoch", states) if number <= epoch - keep]

    def old_steps(self, step: int, keep: int, states: bool = False) -> list[Path]:
        """Step files (or states) of our name that are more than `keep` steps older than `step`."""
        return [path for number, path in self._numbered(r"-step(\d{8})", "at", states) if number < step - keep]

    def _numbered(self, number: str, default: str, states: bool) -> list[tuple[int, Path]]:
        name = re.escape(self.name or default)
        end = "-state" if states else rf"(?:-ema)?(?:-diffusers)?\.{self.extension}"
        pattern = re.compile(name + number + end)
        numbered = []
        for path in self.folder.iterdir() if self.folder.is_dir() else []:
            match = pattern.fullmatch(path.name)
            if match:
                numbered.append((int(match.group(1)), path))
        return sorted(numbered)


@dataclass(frozen=True)
class SaveSchedule:
    """How often files are written: counts of epochs, steps and minutes, None for never."""

    every_epochs: int | None = None
    every_steps: int | None = None
    every_minutes: float | None = None

    def epoch_is_due(self, epoch: int, epochs: int) -> bool:
        """After `epoch` whole epochs of `epochs`; the last one is the final file."""
        return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0 and epoch < epochs

    def step_is_due(self, step: int) -> bool:
        return bool(self.every_steps) and step % (self.every_steps or 1) == 0


def epochs_between_saves(every: int | None, ratio: int | None, epochs: int) -> int | None:
    """--save_every_n_epochs, or as many as make about `ratio` files of the run (--save_n_epoch_ratio)."""
    return max(1, epochs // ratio) if ratio else every
