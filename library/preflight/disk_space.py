"""Disk space: what a run will write, worked out from headers, options and lists of folders before anything is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.caching.latents import LatentCache, LatentCacheSettings
from library.caching.text import TextCache, TextCacheSettings
from library.common.errors import UserError
from library.common.files import check_writing
from library.data.captions import CaptionPipeline
from library.data.dataset import IndexedDataset
from library.data.index import DatasetIndex
from library.preflight.optimizer_memory import optimizer_cost
from library.preflight.run_length import RunLength
from library.saving.names import epochs_between_saves

GIB = 2**30
BESIDE = 64 << 20  # bytes in output_dir for logs, previews and the report
SAMPLE = 200  # images whose texts are counted to estimate those of all
CACHES, FILES = "caches", "LoRA files and states"


@dataclass(frozen=True)
class OutputSettings:
    """What is saved, where, and how many files are kept; each number as its option has it, None where it is unset."""

    output_dir: str | None
    save_format: str = "kohya"  # "both" writes two files
    save_precision: str | None = None
    every_n_epochs: int | None = None
    epoch_ratio: int | None = None
    every_n_steps: int | None = None
    every_n_minutes: float | None = None
    last_n_epochs: int | None = None
    last_n_steps: int | None = None
    last_n_epochs_state: int | None = None
    last_n_steps_state: int | None = None
    saves_states: bool = False
    saves_final_state: bool = False
    keeps_average: bool = False  # --ema_decay
    saves_average_beside: bool = False  # --ema_save beside


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer by its options."""

    name: str
    learning_rate: float
    args: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DiskRequirement:
    """Bytes that the run will write in a folder, which need not exist yet."""

    folder: Path
    size: int
    what: str


@dataclass(frozen=True)
class OutputSize:
    """What is known of the files to be saved."""

    numbers: int  # in the LoRA; 0 where that is not known before the models are loaded
    bytes_each: int  # of a trained number: 4, or 2 under full_fp16 and full_bf16
    encoders: int = 0  # bytes of text encoders that are saved beside it


def cache_requirements(
    index: DatasetIndex, latents: LatentCacheSettings | None, texts: TextCacheSettings | None
) -> list[DiskRequirement]:
    """The caches that are missing, from lists of folders alone: an existing file is assumed to be valid.

    latents, texts: None where they are not cached. texts.bytes_each: of the outputs that are cached for one caption.
    """
    sizes: dict[Path, int] = {}
    for datasets, variants in ((index.training, texts.variants if texts else None), (index.validation, None)):
        missing = []
        if latents is not None and latents.on_disk:
            latent_cache = LatentCache(datasets, replace(latents, skip_validation=True))
            missing.append(latent_cache.bytes_needed(latent_cache.missing()))
        if texts is not None and texts.on_disk and texts.bytes_each:
            each = round(texts.bytes_each * _texts_each(datasets, variants, texts.seed))
            text_cache = TextCache(datasets, replace(texts, bytes_each=each, variants=None, skip_validation=True))
            missing.append(text_cache.bytes_needed(text_cache.missing()))
        for folders in missing:
            for folder, size in folders.items():
                sizes[folder] = sizes.get(folder, 0) + size
    return [DiskRequirement(folder, size, CACHES) for folder, size in sizes.items()]


def _texts_each(datasets: Sequence[IndexedDataset], variants: int | None, seed: int) -> float:
    """How many distinct texts an image has, from a sample."""
    if not variants:
        return 1.0
    records = [(dataset, record) for dataset in datasets for record in dataset.records]
    sample = records[:: max(1, len(records) // SAMPLE)]
    texts = [
        len(set(CaptionPipeline(d.subset_of(r).captions, 1).variants(r.caption, variants, seed))) for d, r in sample
    ]
    return sum(texts) / len(texts)


def saving_requirement(
    settings: OutputSettings, optimizer: OptimizerSettings, length: RunLength, output: OutputSize
) -> DiskRequirement:
    """The LoRA files and states that will be in output_dir together, and a little for logs, previews and the report."""
    assert settings.output_dir is not None
    files, states = _kept_together(settings, length)
    number = {"float": 4, "fp16": 2, "bf16": 2}.get(settings.save_precision or "", output.bytes_each)
    averages = settings.keeps_average and settings.saves_average_beside
    copies = (2 if settings.save_format == "both" else 1) * (2 if averages else 1)
    size = BESIDE + output.encoders + files * copies * number * output.numbers
    if states and output.numbers:
        size += int(states * output.numbers * _state_bytes(settings, optimizer, output.bytes_each))
    return DiskRequirement(Path(settings.output_dir), size, FILES)


def _state_bytes(settings: OutputSettings, optimizer: OptimizerSettings, bytes_each: int) -> float:
    """Of a state, for each trained number: the number itself, what the optimizer keeps for it, its average."""
    dtype = torch.float32 if bytes_each == 4 else torch.bfloat16
    try:
        kept = optimizer_cost(optimizer.name, optimizer.learning_rate, optimizer.args, dtype).kept
    except UserError:  # it cannot be made, which check_optimizer reports
        kept = 0.0
    return bytes_each * (1 + kept) + (4 if settings.keeps_average else 0)


def _kept_together(settings: OutputSettings, length: RunLength) -> tuple[int, int]:
    """How many LoRA files and how many states exist at once; an old one is removed after the new one is written."""
    every = epochs_between_saves(settings.every_n_epochs, settings.epoch_ratio, length.epochs)
    every_steps, minutes = settings.every_n_steps, 1 if settings.every_n_minutes else 0
    epochs = (length.epochs - 1) // every if every else 0
    steps = length.max_steps // every_steps if every_steps else 0

    def kept(last_epochs: int | None, last_steps: int | None) -> int:
        of_epochs = min(epochs, last_epochs + 1) if last_epochs else epochs
        of_steps = min(steps, last_steps // every_steps + 2) if every_steps and last_steps and steps else steps
        return of_epochs + of_steps + minutes

    files = 1 + kept(settings.last_n_epochs, settings.last_n_steps)
    if settings.saves_states:
        last_epochs = settings.last_n_epochs_state or settings.last_n_epochs
        return files, 1 + kept(last_epochs, settings.last_n_steps_state or settings.last_n_steps)
    return files, int(settings.saves_final_state) + minutes


def space_problems(requirements: Sequence[DiskRequirement]) -> list[str]:
    """Disks with less room than the run will fill, one sentence each."""
    disks: dict[int, list[DiskRequirement]] = {}
    for requirement in requirements:
        disks.setdefault(_existing(requirement.folder).stat().st_dev, []).append(requirement)
    problems = []
    for together in disks.values():
        sizes = {what: sum(each.size for each in together if each.what == what) for what in (CACHES, FILES)}
        free = shutil.disk_usage(_existing(together[0].folder)).free
        if sum(sizes.values()) > free:
            parts = ", ".join(f"{size / GIB:.2f} for {what}" for what, size in sizes.items() if size)
            problems.append(
                f"The disk of {together[0].folder} has {free / GIB:.2f} GiB free, and the run will need about "
                f"{sum(sizes.values()) / GIB:.2f} GiB: {parts}. Make room, give --cache_dir or --output_dir another disk, or keep "
                "fewer files (--save_last_n_epochs, --save_last_n_steps)."
            )
    return problems


def output_problems(folder: Path, leaves_no_trace: bool = False) -> list[str]:
    """What would keep the run from writing its results at all. leaves_no_trace: look, and write nothing to try."""
    existing = _existing(folder)
    if not existing.is_dir():
        return [f"--output_dir {folder}: {existing} is a file, not a folder."]
    if not os.access(existing, os.W_OK):
        return [f"--output_dir {folder}: {existing} is not writable. Choose a folder that is."]
    try:
        check_writing(folder, leaves_no_trace)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return [f"--output_dir {folder}: nothing can be written there ({reason}). Choose another folder."]
    return []


def _existing(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    for path in (folder, *folder.parents):
        try:
            if path.exists():
                return path
        except (OSError, ValueError):  # a name that is too long, a NUL
            continue
    return Path()
