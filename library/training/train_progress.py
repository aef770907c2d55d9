"""How far a run has come: what a training state saves and a resumed run starts from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainProgress:
    epoch: int = 0  # completed epochs
    batch: int = 0  # micro-batches of the current epoch that this process has consumed
    step: int = 0  # optimizer steps
