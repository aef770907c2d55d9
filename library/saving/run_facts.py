"""The facts of a run as they go into its LoRA files, collected from the trainer. No path and no secret is among them."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.options.values import metadata_options, modelspec_options
from library.saving.dataset_facts import common, dataset_of_command_line, datasets_of_file, images
from library.saving.metadata import NOT_FOR_SD3, RunFacts, SaveFacts
from library.saving.modelspec import ModelSpec, thumbnail_url
from library.training.precision import DTYPES
from library.training.train_progress import TrainProgress
from networks.lora_arguments import DEFAULT_RANK

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer

PROGRAM = "sd3-lora-trainer"


def run_facts(trainer: NetworkTrainer, started_at: float) -> RunFacts:
    """All that is known when training starts."""
    args = trainer.args
    family = trainer.metadata_facts()
    training: dict[str, Any] = {
        **NOT_FOR_SD3,
        **metadata_options(args),
        "ss_session_id": random.SystemRandom().randrange(2**32),
        "ss_training_started_at": started_at,
        "ss_sd_scripts_commit_hash": program_version(),
        "ss_base_model_version": family.kind,
        **_of_network(trainer),
        **_of_training(trainer),
        **_of_datasets(trainer),
        **family.options,
    }
    return RunFacts(training, _spec(trainer, family.kind), family, args.no_metadata)


def save_facts(position: TrainProgress, finished_at: float) -> SaveFacts:
    """In an epoch, its number is that of the epoch; after its end, too."""
    return SaveFacts(position.step, position.epoch + (position.batch > 0), finished_at)


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


def _of_network(trainer: NetworkTrainer) -> dict[str, Any]:
    """Rank and alpha as they are, not as they were left out."""
    args = trainer.args
    rank = DEFAULT_RANK if args.network_dim is None else args.network_dim
    alpha = args.network_alpha or rank
    if args.dim_from_weights:
        ranks, alphas = zip(*(layer.summary() for layer in trainer.network.layers.values()))
        rank, alpha = _one(ranks), _one(alphas)
    facts = {"ss_network_dim": rank, "ss_network_alpha": alpha}
    if args.network_args:
        facts["ss_network_args"] = json.dumps(dict(text.split("=", 1) for text in args.network_args))
    return facts


def _one(values: tuple[str, ...]) -> str:
    """The number that all layers have, or "Dynamic" as merging tools say. "3 x 4" is the rank 4 of a split layer."""
    numbers = {value.split()[-1] for value in values if value}
    return numbers.pop() if len(numbers) == 1 else "Dynamic"


def _of_training(trainer: NetworkTrainer) -> dict[str, Any]:
    args, plan, optimizer = trainer.args, trainer.plan, trainer.optimizer
    rates = plan.rates
    schedule = optimizer.forced_schedule or args.lr_scheduler_type or args.lr_scheduler
    return {
        "ss_unet_lr": rates.unet or None,
        "ss_text_encoder_lr": list(rates.text_encoders) if any(rates.text_encoders) else None,
        "ss_num_batches_per_epoch": plan.training.batches_per_epoch,
        "ss_num_epochs": plan.length.epochs,
        "ss_max_train_steps": plan.length.max_steps,
        "ss_lr_scheduler": None if optimizer.is_schedule_free else schedule,
        "ss_optimizer": optimizer.name_for_metadata,
        "ss_mixed_precision": next(name for name, dtype in DTYPES.items() if dtype == trainer.precision.dtype),
        "ss_seed": plan.seed,
        "ss_num_processes": trainer.accelerator.num_processes,
        "ss_base_weights": [Path(path).name for path in args.base_weights or ()] or None,
        "ss_base_weights_multiplier": args.base_weights_multiplier,
    }


def _of_datasets(trainer: NetworkTrainer) -> dict[str, Any]:
    args, index = trainer.args, trainer.plan.index
    subsets = [subset for dataset in index.training for subset in dataset.settings.subsets]
    captions = [subset.captions for subset in subsets]
    facts: dict[str, Any] = {
        "ss_num_train_images": sum(images(dataset, regularisation=False) for dataset in index.training),
        "ss_num_reg_images": sum(images(dataset, regularisation=True) for dataset in index.training),
        "ss_num_validation_images": sum(len(dataset.records) for dataset in index.validation),
        "ss_caption_dropout_rate": common([caption.caption_dropout_rate for caption in captions]),
        "ss_caption_dropout_every_n_epochs": common([c.caption_dropout_every_n_epochs for c in captions]),
        "ss_caption_tag_dropout_rate": common([caption.caption_tag_dropout_rate for caption in captions]),
        "ss_face_crop_aug_range": common([subset.face_crop_aug_range for subset in subsets]),
        "ss_resize_interpolation": common([subset.resize_interpolation for subset in subsets]),
    }
    if args.dataset_config:
        return facts | datasets_of_file(index.training)
    batches_a_step = trainer.accelerator.num_processes * args.gradient_accumulation_steps
    return facts | dataset_of_command_line(index.training[0], batches_a_step)


def _spec(trainer: NetworkTrainer, kind: str) -> ModelSpec:
    args = trainer.args
    resolutions = [dataset.settings.resolution for dataset in trainer.plan.index.training]
    return ModelSpec(
        kind=kind,
        title=args.metadata_title or args.output_name or "LoRA",
        resolution=max(resolutions, key=lambda size: size[0] * size[1]),
        timestep_range=_timestep_range(args),
        extra={
            "implementation_version": program_version(),
            "thumbnail": thumbnail_url(args.metadata_thumbnail) if args.metadata_thumbnail else None,
            **modelspec_options(args),
        },
    )


def _timestep_range(args: argparse.Namespace) -> tuple[int, int] | None:
    if args.min_timestep is None and args.max_timestep is None:
        return None
    return args.min_timestep or 0, 1000 if args.max_timestep is None else args.max_timestep
