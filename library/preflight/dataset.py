"""The dataset of a run, indexed from headers, and what in it goes against the options."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from library.caching.text import check_cacheable
from library.common.errors import collect_errors
from library.data.augment import uncacheable_augmentations
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.data.index import DatasetIndex, build_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    """Where images and captions come from, and what the run does with them."""

    dataset_config: str | None = None
    command_line: CommandLineData = field(default_factory=CommandLineData)
    cache_dir: Path | None = None
    saves_index: bool = True  # index caches
    skip_bad_images: bool = False
    allow_external_links: bool = False
    masked_loss: bool = False
    caches_latents: bool = False
    caches_text: bool = False
    text_cache_variants: int | None = None


def index_data(settings: DataSettings, seed: int) -> DatasetIndex:
    """Index the datasets of --dataset_config or of the command line, from headers."""
    datasets = read_datasets(settings.dataset_config, settings.command_line)
    return build_index(
        datasets,
        cache_dir=settings.cache_dir,
        saves_index=settings.saves_index,
        skip_bad_images=settings.skip_bad_images,
        allow_external_links=settings.allow_external_links,
        seed=seed,
    )


def data_problems(settings: DataSettings, index: DatasetIndex) -> list[str]:
    """Conflicts between the dataset and the options. The dataset's own warnings are logged."""
    for warning in index.warnings:
        logger.warning(warning)
    subsets = [subset for dataset in index.training for subset in dataset.settings.subsets]
    if settings.masked_loss and not any(subset.alpha_mask or subset.style == "mask" for subset in subsets):
        logger.warning(
            "--masked_loss changes nothing: no subset has masks. Give conditioning_data_dir, or alpha_mask for alpha channels."
        )
    problems = uncacheable_augmentations(index.training) if settings.caches_latents else []
    if settings.caches_text:
        collect_errors(problems, lambda: check_cacheable(index.training, settings.text_cache_variants))
    return problems
