"""Room on the disks: what a run will write, worked out from headers, options and lists of folders before anything is made."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from library.caching.fill import latent_cache_settings, text_cache_settings
from library.caching.latents import LatentCache
from library.caching.text import TextCache
from library.common.errors import UserError
from library.data.captions import CaptionPipeline
from library.data.index import DatasetIndex
from library.data.records import IndexedDataset
from library.memory.estimator.optimizer_memory import optimizer_cost
from library.preflight.settings import RunLength
from library.saving.names import epochs_between_saves

GIB = 2**30
BESIDE = 64 << 20  # bytes in output_dir for logs, previews and the report
SAMPLE = 200  # images whose texts are counted to estimate those of all
CACHES, FILES = "caches", "LoRA files and states"


@dataclass(frozen=True)
class Need:
    """Bytes that the run will write in a folder, which need not be there yet."""

    folder: Path
    size: int
    what: str


@dataclass(frozen=True)
class Outcome:
    """What is known of the files to be saved."""

    numbers: int  # in the LoRA; 0 where that is not known before the models are loaded
    bytes_each: int  # of a trained number: 4, or 2 under full_fp16 and full_bf16
    encoders: int = 0  # bytes of text encoders that are saved beside it


def cache_needs(args: argparse.Namespace, index: DatasetIndex, seed: int, bytes_of_text: int) -> list[Need]:
    """The caches that are missing, from lists of folders alone: a file that is there is taken for good.

    bytes_of_text: of the outputs that are cached for one caption; 0 where none are.
    """
    found: dict[Path, int] = {}
    for datasets, variants in ((index.training, args.text_cache_variants), (index.validation, None)):
        needed = []
        if args.cache_latents_to_disk:
            latents = LatentCache(datasets, replace(latent_cache_settings(args, ""), trust=True))
            needed.append(latents.bytes_needed(latents.missing()))
        if args.cache_text_encoder_outputs_to_disk and bytes_of_text:
            each = round(bytes_of_text * _texts_each(datasets, variants, seed))
            settings = replace(text_cache_settings(args, "", seed, each), variants=None, trust=True)
            texts = TextCache(datasets, settings)
            needed.append(texts.bytes_needed(texts.missing()))
        for folders in needed:
            for folder, size in folders.items():
                found[folder] = found.get(folder, 0) + size
    return [Need(folder, size, CACHES) for folder, size in found.items()]


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


def saving_need(args: argparse.Namespace, length: RunLength, outcome: Outcome) -> Need:
    """The LoRA files and states that will be in output_dir together, and a little for what stands beside them."""
    files, states = _kept_together(args, length)
    number = {"float": 4, "fp16": 2, "bf16": 2}.get(args.save_precision or "", outcome.bytes_each)
    copies = (2 if args.save_format == "both" else 1) * (2 if args.ema_decay and args.ema_save == "beside" else 1)
    size = BESIDE + outcome.encoders + files * copies * number * outcome.numbers
    if states and outcome.numbers:
        size += int(states * outcome.numbers * _state_bytes(args, outcome.bytes_each))
    return Need(Path(args.output_dir), size, FILES)


def _state_bytes(args: argparse.Namespace, bytes_each: int) -> float:
    """Of a state, for each trained number: the number itself, what the optimizer keeps for it, its average."""
    dtype = torch.float32 if bytes_each == 4 else torch.bfloat16
    try:
        kept = optimizer_cost(args.optimizer_type, args.learning_rate, args.optimizer_args, dtype).kept
    except UserError:  # it cannot be made: that is told with all else
        kept = 0.0
    return bytes_each * (1 + kept) + (4 if args.ema_decay else 0)


def _kept_together(args: argparse.Namespace, length: RunLength) -> tuple[int, int]:
    """How many LoRA files and how many states there are at once; an old one goes when the new one stands."""
    every = epochs_between_saves(args.save_every_n_epochs, args.save_n_epoch_ratio, length.epochs)
    epochs = (length.epochs - 1) // every if every else 0
    steps = length.max_steps // args.save_every_n_steps if args.save_every_n_steps else 0

    def kept(last_epochs: int | None, last_steps: int | None) -> int:
        of_epochs = min(epochs, last_epochs + 1) if last_epochs else epochs
        of_steps = min(steps, last_steps // args.save_every_n_steps + 2) if last_steps and steps else steps
        return of_epochs + of_steps + (1 if args.save_every_n_minutes else 0)

    files = 1 + kept(args.save_last_n_epochs, args.save_last_n_steps)
    if args.save_state:
        last_epochs = args.save_last_n_epochs_state or args.save_last_n_epochs
        return files, 1 + kept(last_epochs, args.save_last_n_steps_state or args.save_last_n_steps)
    return files, int(bool(args.save_state_on_train_end)) + int(bool(args.save_every_n_minutes))


def room_problems(needs: Sequence[Need]) -> list[str]:
    """Disks with less room than the run will fill, one sentence each."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    problems = []
    for together in disks.values():
        sizes = {what: sum(need.size for need in together if need.what == what) for what in (CACHES, FILES)}
        free = shutil.disk_usage(_existing(together[0].folder)).free
        if sum(sizes.values()) > free:
            parts = ", ".join(f"{size / GIB:.2f} for {what}" for what, size in sizes.items() if size)
            problems.append(
                f"The disk of {together[0].folder} has {free / GIB:.2f} GiB free, and the run will need about "
                f"{sum(sizes.values()) / GIB:.2f} GiB: {parts}. Make room, give --cache_dir or --output_dir another disk, or keep "
                "fewer files (--save_last_n_epochs, --save_last_n_steps)."
            )
    return problems


def output_problems(folder: Path) -> list[str]:
    """What would keep the run from writing its results at all."""
    existing = _existing(folder)
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
    return []


def _existing(folder: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next((place for place in (folder, *folder.parents) if place.exists()), Path())
