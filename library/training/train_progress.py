"""How far a run has come, and what the training loop reports of a step: what callbacks, states and resumed runs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainProgress:
    """What a training state saves and a resumed run starts from."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # micro-batches of the current epoch that this process has consumed
    step: int = 0  # optimizer steps


class NormReport(Protocol):
    """What clipping the weights' norms did, as 0-dim tensors on the device."""

    @property
    def keys_scaled(self) -> Tensor: ...

    @property
    def average_norm(self) -> Tensor: ...

    @property
    def maximum_norm(self) -> Tensor: ...


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Nothing has waited for its tensors: those on the device may still be computed."""

    progress: TrainProgress  # after the step
    loss: Tensor  # 0-dim: mean over the step's samples on this process
    gradient_norm: Tensor  # 0-dim float32, before clipping
    nonfinite: Tensor  # 0-dim bool: the step was skipped
    losses: Tensor  # [samples]
    timesteps: Tensor  # [samples], on the CPU
    paths: list[str]
    norm_report: NormReport | None = None  # what the step's `post_step_hook` returned
