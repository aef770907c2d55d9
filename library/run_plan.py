"""What a run is going to do, worked out from headers alone: files, images, steps, rates. No weights are read.

Every mistake of the user that can be found without weights is found here, and all are told at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, TypeVar

from library.data.batches import BatchPlan
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.data.index import DatasetIndex, build_index
from library.data.settings import Size
from library.data.table import table
from library.data.text_cache import refuse_lost_chance
from library.options.errors import Problems, UserError
from library.run_settings import (
    RunLength,
    flow_settings,
    loss_settings,
    path_or_none,
    run_length,
    scheduler_settings,
    start_problems,
    tracking_settings,
)
from library.sd3.flow import check_flow
from library.training.loss import check_loss
from library.training.modelspec import thumbnail_url
from library.training.optimizers import check_optimizer
from library.training.prompts import PreviewPrompt, read_prompts
from library.training.schedulers import check_schedule
from library.training.state import SavedState, newest_state, open_state
from library.training.tracking import tracking_problems
from networks.lora_file import names_in_file
from networks.parameter_groups import PARTS, LearningRates, parts_of

logger = logging.getLogger(__name__)
T = TypeVar("T")
ROOM_WANTED = 256 << 20  # bytes free in output_dir before a run starts


class ModelChecks(Protocol):
    """What a model family says of its files before they are loaded."""

    def locate_models(self) -> Any: ...

    def model_problems(self, files: Any, sizes: list[Size]) -> list[str]: ...

    def network_problems(self, files: Any) -> list[str]: ...

    def train_t5xxl(self) -> bool: ...


@dataclass(frozen=True)
class RunPlan:
    files: Any  # the family's
    index: DatasetIndex
    training: BatchPlan
    validation: BatchPlan | None
    length: RunLength
    rates: LearningRates
    prompts: list[PreviewPrompt]
    seed: int

    def sizes(self) -> list[Size]:
        """Every (W, H) that is trained or validated on."""
        return sorted({size for d in [*self.index.training, *self.index.validation] for size in d.buckets})

    def text(self, accumulation: int) -> str:
        """The dataset table and the run's length, for people."""
        batches, length = self.training.batches_per_epoch, self.length
        return (
            f"{table(self.index)}\n\n{self.training.images_per_epoch} images in {batches} batches an epoch and process, "
            f"{length.steps_per_epoch} steps an epoch ({accumulation} batches a step), {length.epochs} epochs, {length.max_steps} steps."
        )


def plan_run(args: argparse.Namespace, family: ModelChecks, found: list[str], world_size: int = 1) -> RunPlan:
    """Work out the run. `found` are problems known already; UserError tells them together with all that is found here."""
    problems = Problems()
    problems.found += found
    seed = _try(problems, lambda: run_seed(args)) or 0
    files = _try(problems, family.locate_models) if args.pretrained_model_name_or_path else None
    index = _try(problems, lambda: index_data(args, seed))
    rates = _try(problems, lambda: learning_rates(args, family.train_t5xxl()))
    if rates is not None and args.dim_from_weights and args.network_weights:
        rates = rates_of_file(rates, args.network_weights)
    prompts = _try(problems, lambda: read_prompts(args.sample_prompts)) if args.sample_prompts else []
    problems.found += check_flow(flow_settings(args)) + check_loss(loss_settings(args))
    if rates is not None:
        given = [rate for rate in (*rates.text_encoders, rates.unet) if rate > 0]
        if not given:
            problems.add(
                "Nothing would be trained: the learning rate of every part is 0, or --dim_from_weights has no LoRA for the others."
                " Raise --learning_rate or --unet_lr."
            )
        problems.found += check_optimizer(args.optimizer_type, args.optimizer_args, given)
    problems.found += tracking_problems(tracking_settings(args))
    if args.metadata_thumbnail:
        _try(problems, lambda: thumbnail_url(args.metadata_thumbnail))
    if args.output_dir:
        problems.found += output_problems(Path(args.output_dir))
    if files is not None:
        problems.found += family.network_problems(files)
    if index is not None:
        for warning in index.warnings:
            logger.warning(warning)
        subsets = [subset for dataset in index.training for subset in dataset.settings.subsets]
        if args.masked_loss and not any(subset.alpha_mask or subset.style == "mask" for subset in subsets):
            logger.warning(
                "--masked_loss changes nothing: no subset has masks. Give conditioning_data_dir, or alpha_mask for alpha channels."
            )
        if args.cache_text_encoder_outputs:
            _try(problems, lambda: refuse_lost_chance(index.training, args.text_cache_variants))
        sizes = {size for dataset in [*index.training, *index.validation] for size in dataset.buckets}
        sizes |= {(prompt.width, prompt.height) for prompt in prompts or []}
        if files is not None:
            problems.found += family.model_problems(files, sorted(sizes))
    plan = None
    if index is not None and rates is not None:
        plan = _plan(args, files, index, rates, prompts or [], seed, world_size)
        problems.found += start_problems(args, plan.length)
        schedule = scheduler_settings(args, plan.length.max_steps)
        problems.found += check_schedule(schedule, args.learning_rate, args.optimizer_type, args.optimizer_args)
    problems.raise_if_any()
    assert plan is not None
    return plan


def run_seed(args: argparse.Namespace) -> int:
    """--seed; without it that of the state to resume from, or a random one."""
    if args.seed is not None:
        return args.seed
    state = state_to_resume(args)
    return random.SystemRandom().randrange(2**32) if state is None else state.options["seed"]


def state_to_resume(args: argparse.Namespace) -> SavedState | None:
    """What --resume means: a folder, or with `auto` the newest whole state of this output name, if there is one."""
    if not args.resume:
        return None
    if args.resume != "auto":
        return open_state(Path(args.resume))
    return newest_state(Path(args.output_dir), args.output_name or "last") if args.output_dir else None


def index_data(args: argparse.Namespace, seed: int) -> DatasetIndex:
    """The datasets of `--dataset_config` or of the command line, from headers."""
    names = {field.name for field in fields(CommandLineData)}
    command_line = CommandLineData(**{name: value for name, value in vars(args).items() if name in names})
    datasets = read_datasets(args.dataset_config, command_line)
    return build_index(
        datasets, cache_dir=path_or_none(args.cache_dir), skip_bad_images=args.skip_bad_images, seed=seed
    )


def learning_rates(args: argparse.Namespace, train_t5xxl: bool) -> LearningRates:
    return LearningRates.from_options(
        args.learning_rate,
        args.unet_lr,
        args.text_encoder_lr,
        args.network_train_unet_only,
        args.network_train_text_encoder_only,
        train_t5xxl,
    )


def rates_of_file(rates: LearningRates, path: str) -> LearningRates:
    """With --dim_from_weights: a part of which the file has no LoRA is not trained, and this is said."""
    try:
        parts = parts_of(names_in_file(path))
    except UserError:
        return rates  # what is wrong with the file is told with all else about the network
    for part, title in PARTS.items():
        if rates.of(part) > 0 and part not in parts:
            logger.warning("--dim_from_weights: %s has no LoRA for %s: it is not trained.", path, title)
    return rates.only(parts)


def output_problems(folder: Path) -> list[str]:
    """What would keep the run from saving."""
    existing = next((parent for parent in [folder, *folder.parents] if parent.exists()), Path())
    if not existing.is_dir():
        return [f"--output_dir {folder}: {existing} is a file, not a folder."]
    if not os.access(existing, os.W_OK):
        return [f"--output_dir {folder}: {existing} is not writable. Choose a folder that is."]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".write-test-"):
            pass
    except OSError as error:
        return [
            f"--output_dir {folder}: nothing can be written there ({error.strerror or error}). Choose another folder."
        ]
    free = shutil.disk_usage(folder).free
    if free < ROOM_WANTED:
        return [f"--output_dir {folder}: {free >> 20} MiB are free on that disk, {ROOM_WANTED >> 20} MiB are wanted."]
    return []


def _plan(
    args: argparse.Namespace,
    files: Any,
    index: DatasetIndex,
    rates: LearningRates,
    prompts: list[PreviewPrompt],
    seed: int,
    world_size: int,
) -> RunPlan:
    training = BatchPlan(index.training, seed, world_size)
    validation = BatchPlan(index.validation, seed, world_size, shuffle=False) if index.validation else None
    length = run_length(
        training.batches_per_epoch, args.gradient_accumulation_steps, args.max_train_steps, args.max_train_epochs
    )
    return RunPlan(files, index, training, validation, length, rates, prompts, seed)


def _try(problems: Problems, do: Callable[[], T]) -> T | None:
    try:
        return do()
    except UserError as error:
        problems.collect(error)
        return None
