"""Settings of what runs between steps. They are here, below the packages that act on them, so that preflight can make them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "all": ("tensorboard", "wandb")}


@dataclass(frozen=True)
class TrackingSettings:
    """names: the trackers. folder: of this run's logs. secrets: words that are hidden from all trackers."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    project: str = "network_train"
    run_name: str | None = None
    arguments_file: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)


def chosen_trackers(log_with: str | None, logging_dir: str | None) -> tuple[str, ...]:
    """What --log_with means. TensorBoard without a folder is left out here: the options' checks report it."""
    return tuple(name for name in NAMES.get(log_with or "", ()) if name != "tensorboard" or logging_dir)


def log_folder(logging_dir: str | None, prefix: str | None) -> Path | None:
    """<logging_dir>/<prefix><time>, one for each run."""
    return Path(logging_dir) / f"{prefix or ''}{time.strftime('%Y%m%d%H%M%S')}" if logging_dir else None


@dataclass(frozen=True)
class MetricsSettings:
    """file: of the metrics. config: the options that trackers may show (--log_config); None: no options."""

    file: Path
    max_steps: int
    tracking: TrackingSettings
    steps_per_epoch: int = 1  # over which the average loss runs
    max_nonfinite_steps: int = 0  # in a row, before the run stops; 0: it never does
    has_validation: bool = False
    config: Mapping[str, object] | None = None


@dataclass(frozen=True)
class ValidationSettings:
    """When validation runs (every how many steps or epochs; neither: after every epoch) and on what."""

    timesteps: Sequence[int]
    seed: int
    batches: int  # of one rank, all of them
    max_batches: int | None = None
    every_steps: int | None = None
    every_epochs: int | None = None

    def step_is_due(self, step: int) -> bool:
        return bool(self.every_steps) and step % (self.every_steps or 1) == 0

    def epoch_is_due(self, epoch: int) -> bool:
        every = self.every_epochs or (None if self.every_steps else 1)
        return every is not None and epoch % every == 0


@dataclass(frozen=True)
class PreviewSettings:
    folder: Path  # output_dir
    name: str  # output_name
    sampler: str = "euler"
    rank: int = 0
    world_size: int = 1
    max_batch_pixels: int = (
        0  # guidance predicts with and without the prompt in one batch where both images have no more
    )
    latent_channels: int = 16
    scale_factor: int = 8  # pixels a side of an image for each latent


@dataclass(frozen=True)
class PreviewSchedule:
    """every_epochs wins over every_steps. sheet: the contact sheet's path."""

    sheet: Path
    at_first: bool = False  # before the first step of a run that starts at 0
    every_steps: int | None = None
    every_epochs: int | None = None

    def step_is_due(self, step: int) -> bool:
        return not self.every_epochs and bool(self.every_steps) and step % (self.every_steps or 1) == 0

    def epoch_is_due(self, epoch: int) -> bool:
        return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0


def step_tag(step: int, epoch: int | None) -> str:
    """The part of a preview's file name that says when it was made: e + epoch, or the step."""
    return f"{step:06d}" if epoch is None else f"e{epoch:06d}"


@dataclass(frozen=True)
class ReportSettings:
    """path: of the report. network: --network_module. changed, defaults: options and their values as text.

    states: pattern of the folders beside the report from which the run can be resumed.
    """

    path: Path
    title: str
    network: str
    changed: Mapping[str, str]
    defaults: Mapping[str, str]
    resume_command: str
    again_command: str
    states: str


@dataclass(frozen=True)
class CallbackSettings:
    """All that runs between steps, but for saving."""

    accumulation: int
    max_steps: int
    epochs: int
    metrics: MetricsSettings
    validation: ValidationSettings
    previews: PreviewSettings
    preview_schedule: PreviewSchedule | None  # None: no previews
    report: ReportSettings | None  # None: no report
