"""What a run is going to do, worked out from headers alone: files, images, steps, rates. No weights are read.

Every mistake of the user that can be found without weights is found here, and all are told at once.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from library.caching.files import check_writable
from library.caching.fill import encoder_roles
from library.caching.text import refuse_lost_chance
from library.common.errors import Problems, UserError
from library.data.augment import frozen_chance
from library.data.batches import BatchPlan
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.data.index import DatasetIndex, build_index
from library.data.prompts import PreviewPrompt, read_prompts
from library.data.settings import Size
from library.data.table import table
from library.flow.loss import check_loss
from library.flow.timesteps import check_flow
from library.monitoring.trackers import tracking_problems
from library.preflight.disk_space import Outcome, cache_needs, output_problems, room_problems, saving_need
from library.preflight.network import rehearse_network
from library.preflight.settings import (
    RunLength,
    flow_settings,
    loss_settings,
    path_or_none,
    run_length,
    scheduler_settings,
    start_problems,
    tracking_settings,
)
from library.saving.modelspec import thumbnail_url
from library.saving.resume import resume_problems
from library.saving.state import SavedState
from library.training.optimizers import check_optimizer
from library.training.schedulers import check_schedule
from networks.lora_file import names_in_file
from networks.parameter_groups import PARTS, LearningRates, parts_of

logger = logging.getLogger(__name__)
T = TypeVar("T")
LEFT_TO_THE_PLAN = ("fp8_base", "fp8_base_unet", "t5xxl_device")  # --memory_plan chooses them


class ModelChecks(Protocol):
    """What a model family says of its files before they are loaded."""

    def locate_models(self) -> Any: ...

    def model_problems(self, files: Any, sizes: list[Size]) -> list[str]: ...

    def network_problems(self, files: Any) -> list[str]: ...

    def train_t5xxl(self) -> bool: ...

    def encoder_names(self) -> list[str]: ...

    def present_encoders(self, files: Any) -> list[str]: ...

    def empty_models(self, files: Any, rates: LearningRates) -> tuple[list[nn.Module | None], nn.Module | None]: ...

    def bytes_of_text(self, files: Any) -> int: ...

    def bytes_of_saved_encoders(self, files: Any) -> int: ...


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


def plan_run(
    args: argparse.Namespace,
    family: ModelChecks,
    found: list[str],
    world_size: int = 1,
    agree: Callable[[int], int] = lambda seed: seed,
    state: SavedState | None = None,
) -> RunPlan:
    """Work out the run. `found` are problems known already; UserError tells them together with all that is found here.

    agree: makes this process's seed that of all. state: what the run goes on from.
    """
    problems = Problems()
    problems.found += found
    seed = agree(run_seed(args, state))
    files = _try(problems, family.locate_models) if args.pretrained_model_name_or_path else None
    index = _try(problems, lambda: index_data(args, seed))
    rates = _try(problems, lambda: learning_rates(args, family.train_t5xxl()))
    if rates is not None and args.dim_from_weights and args.network_weights:
        rates = rates_of_file(rates, args.network_weights)
    prompts = _try(problems, lambda: read_prompts(args.sample_prompts)) if args.sample_prompts else []
    problems.found += setting_problems(args, rates)
    outcome = Outcome(0, 2 if args.full_fp16 or args.full_bf16 else 4)
    if files is not None:
        wrong = family.network_problems(files) + family.model_problems(files, _sizes(index, prompts or []))
        problems.found += wrong
        if rates is not None and any((rates.unet, *rates.text_encoders)) and not wrong:
            models = family.empty_models(files, rates)
            numbers = _try(problems, lambda: rehearse_network(args, *models))
            outcome = replace(outcome, numbers=numbers or 0, encoders=family.bytes_of_saved_encoders(files))
    cached = []
    if index is not None:
        problems.found += data_problems(args, index)
        ahead = files is not None and rates is not None and _texts_are_cached(args, family, files, rates)
        cached = cache_needs(args, index, seed, family.bytes_of_text(files) if ahead else 0)
    problems.found += check_writable({need.folder for need in cached})
    unwritable = output_problems(Path(args.output_dir)) if args.output_dir else []
    problems.found += unwritable
    plan = None
    if index is not None and rates is not None:
        plan = _plan(args, files, index, rates, prompts or [], seed, world_size)
        problems.found += start_problems(args, plan.length)
        schedule = scheduler_settings(args, plan.length.max_steps)
        problems.found += check_schedule(schedule, args.learning_rate, args.optimizer_type, args.optimizer_args)
        if args.output_dir and not unwritable:
            problems.found += room_problems([saving_need(args, plan.length, outcome), *cached])
        if state is not None and not problems.found:
            problems.found += resume_problems(state, args, plan, LEFT_TO_THE_PLAN if args.memory_plan else ())
    problems.raise_if_any()
    assert plan is not None
    return plan


def setting_problems(args: argparse.Namespace, rates: LearningRates | None) -> list[str]:
    """What is wrong with options that need neither model nor dataset. rates: None where they are wrong themselves."""
    problems = check_flow(flow_settings(args)) + check_loss(loss_settings(args))
    if rates is not None:
        given = [rate for rate in (*rates.text_encoders, rates.unet) if rate > 0]
        if not given:
            problems.append(
                "Nothing would be trained: the learning rate of every part is 0, or --dim_from_weights has no LoRA for the others."
                " Raise --learning_rate or --unet_lr."
            )
        problems += check_optimizer(args.optimizer_type, args.optimizer_args, given)
    problems += tracking_problems(tracking_settings(args))
    if args.metadata_thumbnail:
        problems += _problems_of(lambda: thumbnail_url(args.metadata_thumbnail))
    return problems


def data_problems(args: argparse.Namespace, index: DatasetIndex) -> list[str]:
    """What in the dataset goes against the options. Its own warnings are logged."""
    for warning in index.warnings:
        logger.warning(warning)
    subsets = [subset for dataset in index.training for subset in dataset.settings.subsets]
    if args.masked_loss and not any(subset.alpha_mask or subset.style == "mask" for subset in subsets):
        logger.warning(
            "--masked_loss changes nothing: no subset has masks. Give conditioning_data_dir, or alpha_mask for alpha channels."
        )
    problems = frozen_chance(index.training) if args.cache_latents else []
    if args.cache_text_encoder_outputs:
        problems += _problems_of(lambda: refuse_lost_chance(index.training, args.text_cache_variants))
    return problems


def run_seed(args: argparse.Namespace, state: SavedState | None) -> int:
    """--seed; without it that of the state to resume from, or a random one."""
    if args.seed is not None:
        return args.seed
    return random.SystemRandom().randrange(2**32) if state is None else state.options["seed"]


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


def _sizes(index: DatasetIndex | None, prompts: list[PreviewPrompt]) -> list[Size]:
    """Every (W, H) that is trained, validated or shown."""
    datasets = [] if index is None else [*index.training, *index.validation]
    return sorted({size for d in datasets for size in d.buckets} | {(p.width, p.height) for p in prompts})


def _texts_are_cached(args: argparse.Namespace, family: ModelChecks, files: Any, rates: LearningRates) -> bool:
    trains = dict(zip(family.encoder_names(), rates.trained_text_encoders))
    roles = encoder_roles(family.present_encoders(files), trains, args.cache_text_encoder_outputs)
    return bool(roles.ahead)


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


def _problems_of(do: Callable[[], object]) -> list[str]:
    problems = Problems()
    _try(problems, do)
    return problems.found
