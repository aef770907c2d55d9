"""The facts of a run as they go into its LoRA files. No path and no secret is among them."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.dataset import IndexedDataset
from library.saving.metadata import NOT_FOR_SD3, FamilyFacts, SaveFacts
from library.saving.modelspec import ModelSpec
from library.training.train_progress import TrainProgress
from networks.lora_arguments import DEFAULT_RANK
from networks.network_layer import NetworkLayer

PROGRAM = "sd3-lora-trainer"


@dataclass(frozen=True)
class NetworkFacts:
    """Rank and alpha as they are, not as they were left out; "Dynamic" where the layers differ, as merging tools say."""

    rank: int | str
    alpha: float | str
    arguments: tuple[str, ...] = ()  # key=value, of --network_args

    @classmethod
    def of_options(cls, rank: int | None, alpha: float | None, arguments: Sequence[str]) -> NetworkFacts:
        rank = DEFAULT_RANK if rank is None else rank
        return cls(rank, alpha or rank, tuple(arguments))

    @classmethod
    def of_layers(cls, layers: Mapping[str, NetworkLayer], arguments: Sequence[str]) -> NetworkFacts:
        """Of a network whose ranks come from a file (--dim_from_weights)."""
        ranks, alphas = zip(*(layer.summary() for layer in layers.values()))
        return cls(_common_number(ranks), _common_number(alphas), tuple(arguments))

    def as_facts(self) -> dict[str, object]:
        facts: dict[str, object] = {"ss_network_dim": self.rank, "ss_network_alpha": self.alpha}
        if self.arguments:
            facts["ss_network_args"] = json.dumps(dict(text.split("=", 1) for text in self.arguments))
        return facts


@dataclass(frozen=True)
class TrainingFacts:
    """How long, how fast and with what the run trains. Names are those of the metadata."""

    unet_lr: float | None
    text_encoder_lr: list[float] | None
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    lr_scheduler: str | None  # None: the optimizer schedules itself
    optimizer: str
    mixed_precision: str
    seed: int
    num_processes: int
    base_weights: list[str] | None  # file names
    base_weights_multiplier: list[float] | None

    def as_facts(self) -> dict[str, object]:
        return {f"ss_{name}": value for name, value in vars(self).items()}


def training_facts(
    options: Mapping[str, object],
    family: FamilyFacts,
    network: NetworkFacts,
    training: TrainingFacts,
    datasets: Mapping[str, object],
    started_at: float,
) -> dict[str, object]:
    """All ss_ facts that are known when training starts.

    options: those that are recorded, by ss_ names. datasets: see dataset_facts. started_at: seconds since 1970.
    """
    return {
        **NOT_FOR_SD3,
        **options,
        "ss_session_id": random.SystemRandom().randrange(2**32),
        "ss_training_started_at": started_at,
        "ss_sd_scripts_commit_hash": program_version(),
        "ss_base_model_version": family.kind,
        **network.as_facts(),
        **training.as_facts(),
        **datasets,
        **family.options,
    }


def model_spec(
    kind: str,
    title: str,
    datasets: Sequence[IndexedDataset],
    timestep_range: tuple[int, int] | None,
    extra: Mapping[str, object],
) -> ModelSpec:
    """The facts of the modelspec keys. extra: values of --metadata_… by the standard's names, the thumbnail as a data URL."""
    resolutions = [dataset.settings.resolution for dataset in datasets]
    return ModelSpec(
        kind=kind,
        title=title,
        resolution=max(resolutions, key=lambda size: size[0] * size[1]),
        timestep_range=timestep_range,
        extra={
            "implementation_version": program_version(),
            **{key: None if value is None else str(value) for key, value in extra.items()},
        },
    )


def save_facts(progress: TrainProgress, finished_at: float) -> SaveFacts:
    """The facts of one save. Its epoch is the one in training, or the one that has just ended, from 1."""
    return SaveFacts(progress.step, progress.epoch + (progress.batch > 0), finished_at)


def program_version() -> str:
    """This program's name and commit, or its name alone outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return PROGRAM
    return f"{PROGRAM}/{done.stdout.strip()}" if done.returncode == 0 else PROGRAM


def _common_number(values: Sequence[str]) -> str:
    """The number that all layers have, or "Dynamic". "3 x 4" is the rank 4 of a split layer."""
    numbers = {value.split()[-1] for value in values if value}
    return numbers.pop() if len(numbers) == 1 else "Dynamic"
