"""What a run is going to do, worked out from headers alone: files, images, steps, rates. No weights are read.

Every mistake of the user that can be found without weights is found here, and all are reported at once.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, cast

from library.caching.files import check_writable
from library.caching.fill import encoder_roles
from library.caching.latents import LatentCacheSettings
from library.caching.text import TextCacheSettings
from library.common.errors import UserError, collect_errors
from library.data.batches import BatchPlan, length_problems
from library.data.dataset import dataset_fingerprint, table
from library.data.index import DatasetIndex
from library.data.prompts import PreviewPrompt, read_prompts
from library.data.settings import Size
from library.flow.loss import LossSettings, check_loss
from library.flow.samplers import SAMPLERS
from library.flow.timesteps import FlowSettings, check_flow
from library.options.table import BY_NAME
from library.preflight.dataset import DataSettings, data_problems, index_data
from library.preflight.disk_space import (
    OptimizerSettings,
    OutputSettings,
    OutputSize,
    cache_requirements,
    output_problems,
    saving_requirement,
    space_problems,
)
from library.preflight.inspector import Files, ModelInspector
from library.preflight.network import NetworkSettings, validate_on_meta
from library.preflight.run_length import LengthSettings, RunLength, run_length, start_problems
from library.saving.modelspec import thumbnail_url
from library.saving.resume import resume_problems
from library.saving.state import SavedState
from library.training.optimizers import check_optimizer
from library.training.schedulers import SchedulerSettings, check_schedule
from networks.lora_file import names_in_file
from networks.parameter_groups import PARTS, LearningRates, parts_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateSettings:
    """The learning rates by their options."""

    learning_rate: float
    unet_lr: float | None = None
    text_encoder_lr: tuple[float, ...] | None = None
    train_unet_only: bool = False
    train_text_encoder_only: bool = False

    def rates(self, train_t5xxl: bool) -> LearningRates:
        """The rate of each part. UserError where the options contradict each other."""
        return LearningRates.from_options(
            self.learning_rate,
            self.unet_lr,
            self.text_encoder_lr,
            self.train_unet_only,
            self.train_text_encoder_only,
            train_t5xxl,
        )


@dataclass(frozen=True)
class ResumeCheck:
    """What a state to resume from is compared with."""

    options: Mapping[str, object] = field(default_factory=dict)  # those that determine the weights, with their values
    undecided: tuple[str, ...] = ()  # options that the memory planner sets later, so they are not compared
    is_whole: bool = True  # False: of a state on the Hub only the position has been downloaded


@dataclass(frozen=True)
class PlanSettings:
    """What the plan of a run depends on, by concern."""

    data: DataSettings
    network: NetworkSettings
    rates: RateSettings
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings  # its total_steps is replaced by the run's
    length: LengthSettings
    output: OutputSettings
    flow: FlowSettings
    loss: LossSettings
    has_model: bool = True  # False: the model's path is missing, which the options' checks report
    number_bytes: int = 4  # of a trained number
    latents: LatentCacheSettings | None = None  # None: not cached
    texts: TextCacheSettings | None = None
    sample_prompts: str | None = None
    thumbnail: str | None = None
    seed: int | None = None
    resume: ResumeCheck = field(default_factory=ResumeCheck)
    is_only_shown: bool = False  # --dry_run, --debug_dataset: nothing is written, not even to try


@dataclass(frozen=True)
class RunPlan(Generic[Files]):
    """What will be trained."""

    files: Files
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

    def image_sizes(self) -> set[Size]:
        """Every (W, H) that the denoiser will see, those of previews included."""
        return {*self.sizes(), *((prompt.width, prompt.height) for prompt in self.prompts)}

    def batch_pixels(self) -> int:
        """Pixels of the largest batch."""
        datasets = self.index.training
        return max(w * h * dataset.settings.batch_size for dataset in datasets for w, h in dataset.buckets)

    def text(self, accumulation: int) -> str:
        """The dataset table and the run's length, for people."""
        batches, length = self.training.batches_per_epoch, self.length
        return (
            f"{table(self.index)}\n\n{self.training.images_per_epoch} images in {batches} batches an epoch and process, "
            f"{length.steps_per_epoch} steps an epoch ({accumulation} batches a step), {length.epochs} epochs, {length.max_steps} steps."
        )


def plan_run(
    settings: PlanSettings,
    inspector: ModelInspector[Files],
    known: Sequence[str] = (),
    world_size: int = 1,
    agree: Callable[[int], int] = lambda seed: seed,
    state: SavedState | None = None,
) -> RunPlan[Files]:
    """Work out the run. UserError lists every problem, those that are `known` already before those of the plan.

    agree: makes this process's seed that of all. state: what the run resumes from.
    """
    problems = list(known)
    seed = agree(run_seed(settings.seed, state))
    files = collect_errors(problems, inspector.locate_models) if settings.has_model else None
    index = collect_errors(problems, lambda: index_data(settings.data, seed))
    rates = collect_errors(problems, lambda: trained_rates(settings, inspector))
    prompts = collect_errors(problems, lambda: preview_prompts(settings.sample_prompts)) or []
    problems += setting_problems(settings, rates)
    output = OutputSize(0, settings.number_bytes)
    if files is not None:
        sizes = _sizes(index, prompts)
        output = _check_models(problems, settings, inspector, files, rates, sizes) or output
    required = []
    if index is not None:
        problems += data_problems(settings.data, index)
        caption_bytes = _caption_bytes(settings, inspector, files, rates)
        texts = None if settings.texts is None else replace(settings.texts, seed=seed, bytes_each=caption_bytes)
        required = cache_requirements(index, settings.latents, texts)
    problems += check_writable({each.folder for each in required}, settings.is_only_shown)
    output_dir = settings.output.output_dir
    unwritable = output_problems(Path(output_dir), settings.is_only_shown) if output_dir else []
    problems += unwritable
    if index is not None and rates is not None:
        training, validation = _batch_plans(index, seed, world_size)
        length = run_length(settings.length, training.batches_per_epoch)
        problems += length_problems(training) + _length_problems(settings, length)
        if output_dir and not unwritable:
            saved = saving_requirement(settings.output, settings.optimizer, length, output)
            problems += space_problems([saved, *required])
        if state is not None and not problems:
            problems += _resume_problems(settings, state, index, seed, length)
    if problems:
        raise UserError(problems)
    assert files is not None and index is not None and rates is not None
    return RunPlan(files, index, training, validation, length, rates, prompts, seed)


def run_seed(seed: int | None, state: SavedState | None) -> int:
    """--seed; without it that of the state to resume from, or a random one."""
    if seed is not None:
        return seed
    return random.SystemRandom().randrange(2**32) if state is None else int(cast("int", state.options["seed"]))


def preview_prompts(path: str | None) -> list[PreviewPrompt]:
    """The prompts of --sample_prompts. UserError lists what is wrong with the file."""
    return read_prompts(path, SAMPLERS, [str(name) for name in BY_NAME["sample_sampler"].choices or ()]) if path else []


def trained_rates(settings: PlanSettings, inspector: ModelInspector[Files]) -> LearningRates:
    """The rate of each part; with --dim_from_weights 0 for each that the file has no LoRA for."""
    rates = settings.rates.rates(inspector.trains_t5xxl())
    network = settings.network
    return rates_of_file(rates, network.weights) if network.dim_from_weights and network.weights else rates


def rates_of_file(rates: LearningRates, path: str) -> LearningRates:
    """The rates with 0 for each part that a LoRA file lacks, with a warning."""
    try:
        parts = parts_of(names_in_file(path))
    except UserError:
        return rates  # network_problems reports what is wrong with the file
    for part, title in PARTS.items():
        if rates.of(part) > 0 and part not in parts:
            logger.warning("--dim_from_weights: %s has no LoRA for %s: it is not trained.", path, title)
    return rates.only(parts)


def setting_problems(settings: PlanSettings, rates: LearningRates | None) -> list[str]:
    """Problems of options that need neither model nor dataset. rates: None where they are wrong themselves."""
    problems = check_flow(settings.flow) + check_loss(settings.loss)
    if rates is not None:
        trained = [rate for rate in (*rates.text_encoders, rates.unet) if rate > 0]
        if not trained:
            problems.append(
                "Nothing would be trained: the learning rate of every part is 0, or --dim_from_weights has no LoRA for the others."
                " Raise --learning_rate or --unet_lr."
            )
        problems += check_optimizer(settings.optimizer.name, settings.optimizer.args, trained)
    thumbnail = settings.thumbnail
    if thumbnail:
        collect_errors(problems, lambda: thumbnail_url(thumbnail))
    return problems


def _check_models(
    problems: list[str],
    settings: PlanSettings,
    inspector: ModelInspector[Files],
    files: Files,
    rates: LearningRates | None,
    sizes: list[Size],
) -> OutputSize | None:
    """Check the model's files and make the network on the meta device; the size of its file, None where that is unknown."""
    wrong = inspector.network_problems(files) + inspector.model_problems(files, sizes)
    problems += wrong
    if rates is None or wrong or not settings.network.module or not any((rates.unet, *rates.text_encoders)):
        return None
    models = inspector.meta_models(files, rates)
    numbers = collect_errors(problems, lambda: validate_on_meta(settings.network, *models))
    return OutputSize(numbers or 0, settings.number_bytes, inspector.saved_encoder_bytes(files))


def _sizes(index: DatasetIndex | None, prompts: list[PreviewPrompt]) -> list[Size]:
    """Every (W, H) that is trained, validated or shown."""
    datasets = [] if index is None else [*index.training, *index.validation]
    return sorted({size for d in datasets for size in d.buckets} | {(p.width, p.height) for p in prompts})


def _caption_bytes(
    settings: PlanSettings, inspector: ModelInspector[Files], files: Files | None, rates: LearningRates | None
) -> int:
    """Bytes of a caption's cached outputs; 0 where none are cached or that is unknown."""
    if files is None or rates is None:
        return 0
    trains = dict(zip(inspector.encoder_names(), rates.trained_text_encoders))
    roles = encoder_roles(inspector.present_encoders(files), trains, settings.texts is not None)
    return inspector.caption_bytes(files) if roles.precomputed else 0


def _batch_plans(index: DatasetIndex, seed: int, world_size: int) -> tuple[BatchPlan, BatchPlan | None]:
    """Of training and of validation, None without images to validate on."""
    validation = BatchPlan(index.validation, seed, world_size, shuffle=False) if index.validation else None
    return BatchPlan(index.training, seed, world_size), validation


def _length_problems(settings: PlanSettings, length: RunLength) -> list[str]:
    scheduler, optimizer = replace(settings.scheduler, total_steps=length.max_steps), settings.optimizer
    return start_problems(settings.length, length) + check_schedule(
        scheduler, optimizer.learning_rate, optimizer.name, optimizer.args
    )


def _resume_problems(
    settings: PlanSettings, state: SavedState, index: DatasetIndex, seed: int, length: RunLength
) -> list[str]:
    check = settings.resume
    options = {**check.options, "seed": seed, "dataset": dataset_fingerprint(index.training)}
    last = None if settings.length.sets_start else length.max_steps
    return resume_problems(state, options, last, check.undecided, check.is_whole)
