"""Reads batches ahead of training in worker processes, in an order that does not depend on how many there are."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from library.common.errors import UserError
from library.data.batch import Batch, CacheReadError, LatentSource, TextSource, stack_masks, stack_texts
from library.data.batches import BatchPlan, BatchSpec
from library.data.captions import CaptionPipeline
from library.data.dataset import ImageRecord, IndexedDataset
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR, read_pixels, shrink_mask, to_tensor
from library.data.recovery import Recovery, keep_child_handler
from library.data.settings import Size, SubsetSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderSettings:
    seed: int
    steps_per_epoch: int  # optimizer steps, for token warm-up
    accumulation: int
    max_train_steps: int
    rank: int = 0
    workers: int = 0
    pin_memory: bool = False
    persistent: bool = False
    skip_bad_images: bool = False  # give an image that cannot be decoded no weight, instead of stopping


BatchKey = tuple[int, int, BatchSpec]
"""Epoch, number of the batch among this process's, and what it is made of."""


@dataclass(frozen=True)
class ReadFailure:
    """What a worker sends in place of a batch that it could not read: torch would wrap a raised error in the worker's traceback."""

    key: BatchKey
    error: UserError


class BatchReader(Dataset["Batch | ReadFailure"]):
    """Makes a batch from its key. Picklable, so that workers can be spawned (Windows, macOS)."""

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        settings: LoaderSettings,
        latents: LatentSource | None,
        texts: TextSource | None,
    ):
        self.datasets, self.settings = datasets, settings
        self.latents, self.texts = latents, texts
        self.pipelines = [
            [CaptionPipeline(subset.captions, settings.max_train_steps) for subset in dataset.settings.subsets]
            for dataset in datasets
        ]

    def __getitem__(self, key: BatchKey) -> Batch | ReadFailure:
        """What a worker sends."""
        try:
            return self.read(key)
        except UserError as error:
            return ReadFailure(key, error)
        except OSError as error:
            return ReadFailure(key, UserError(f"The data cannot be read: {error}."))

    def read(self, key: BatchKey) -> Batch:
        """The batch of a key. UserError names an image that cannot be decoded; CacheReadError, a cache file."""
        epoch, number, spec = key
        step = epoch * self.settings.steps_per_epoch + number // self.settings.accumulation
        items = [self._item(spec.dataset, record, repeat, epoch, step) for record, repeat in spec.items]
        dataset = self.datasets[spec.dataset]
        weights = [
            0.0 if spec.is_padding or item.left_out else dataset.records[n].loss_weight
            for item, (n, _) in zip(items, spec.items)
        ]
        preserve = torch.tensor([preserves(dataset.subset_of(dataset.records[n])) for n, _ in spec.items])
        masks = [item.mask for item in items]
        images = [item.image for item in items if item.image is not None]
        return Batch(
            images=to_tensor(images) if images else None,
            latents=torch.stack([item.latents for item in items if item.latents is not None]) if not images else None,
            captions=[item.caption for item in items],
            text=stack_texts([item.text for item in items]),
            mask=stack_masks(masks),
            loss_weights=torch.tensor(weights),
            preserve=preserve if bool(preserve.any()) else None,
            network_multiplier=dataset.settings.network_multiplier,
            paths=[dataset.records[n].path for n, _ in spec.items],
            size=spec.bucket,
        )

    def _item(self, dataset: int, number: int, repeat: int, epoch: int, step: int) -> _Item:
        indexed = self.datasets[dataset]
        record = indexed.records[number]
        subset = indexed.subset_of(record)
        rng = random.Random(f"{self.settings.seed} item {epoch} {dataset} {number} {repeat}")
        flipped = subset.flip_aug and rng.random() < 0.5
        pipeline = self.pipelines[dataset][record.subset]
        if self.texts is not None:
            dropped = pipeline.is_dropped(rng, epoch + 1)
            variant = rng.randrange(1 << 30)
            try:
                caption, text = self.texts.get(dataset, number, variant, dropped)
            except UserError as error:
                raise CacheReadError(error.problems, "text", dataset, number) from error
        else:
            caption, text = pipeline.at(record.caption, rng, step, epoch + 1), None
        if self.latents is not None:
            if self.latents.is_damaged(dataset, number):
                return _Item(None, _no_latents(record), None, caption, text, left_out=True)
            try:
                latents, mask = self.latents.get(dataset, number, flipped)
            except UserError as error:
                raise CacheReadError(error.problems, "latents", dataset, number) from error
            return _Item(None, latents, mask, caption, text)
        try:
            pixels = read_pixels(record, subset, rng)
        except UserError as error:
            if not self.settings.skip_bad_images:
                raise
            logger.warning("%s It is left out.", error)
            return _Item(_no_pixels(record), None, None, caption, text, left_out=True)
        image = pixels.image[:, ::-1] if flipped else pixels.image
        mask = None if pixels.mask is None else shrink_mask(pixels.mask[:, ::-1] if flipped else pixels.mask)
        return _Item(image, None, mask, caption, text)


@dataclass
class _Item:
    image: np.ndarray | None  # [H, W, 3] uint8
    latents: Tensor | None
    mask: Tensor | None  # [1, h, w]
    caption: str
    text: dict[str, Tensor] | None
    left_out: bool = False  # nothing stands for a damaged image, and weighs nothing


def _no_pixels(record: ImageRecord) -> np.ndarray:
    return np.zeros((record.bucket[1], record.bucket[0], 3), dtype=np.uint8)


def _no_latents(record: ImageRecord) -> Tensor:
    return torch.zeros(LATENT_CHANNELS, record.bucket[1] // VAE_SCALE_FACTOR, record.bucket[0] // VAE_SCALE_FACTOR)


class BatchKeySampler(Sampler[BatchKey]):
    """This process's batches of one epoch from some batch on. Read in the main process."""

    def __init__(self, plan: BatchPlan, rank: int):
        self.plan, self.rank = plan, rank
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[BatchKey]:
        batches = self.plan.share(self.epoch, self.rank)
        for number in range(self.start, len(batches)):
            yield self.epoch, number, batches[number]

    def __len__(self) -> int:
        return self.plan.batches_per_epoch - self.start


class Loader:
    """One process's batches, epoch after epoch."""

    def __init__(
        self,
        plan: BatchPlan,
        settings: LoaderSettings,
        latents: LatentSource | None = None,
        texts: TextSource | None = None,
    ):
        """Where all is in memory there is nothing to wait for, and no workers are started."""
        reads_latents = latents is None or latents.on_disk
        reads_texts = texts is not None and texts.on_disk
        workers = settings.workers if reads_latents or reads_texts else 0
        self.sampler = BatchKeySampler(plan, settings.rank)
        reader = BatchReader(plan.datasets, settings, latents, texts)
        self.recovery = Recovery(reader, goes_on_after_failure=plan.world_size > 1)
        self.loader: DataLoader[Batch | ReadFailure] = DataLoader(
            reader,
            batch_size=None,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=settings.pin_memory,
            persistent_workers=settings.persistent and workers > 0,
            prefetch_factor=2 if workers else None,
        )

    @property
    def failure(self) -> UserError | None:
        """Why batches that have no weight stand in for those of this process. None: nothing has failed."""
        return self.recovery.failure

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on. ReadError where one cannot be read and nothing can stand in for it."""
        self.sampler.epoch, self.sampler.start = epoch, start
        with keep_child_handler():
            results = iter(self.loader)
        return self.recovery.batches(results)


def preserves(subset: SubsetSettings) -> bool:
    """Whether the subset's images are to keep what the base model says (differential output preservation)."""
    return bool(subset.custom_attributes.get("diff_output_preservation"))


@dataclass(frozen=True)
class BucketExamples:
    """The first batches of a bucket in the first epoch."""

    dataset: int  # its number in the plan
    bucket: Size
    batches: list[Batch]  # with images


def bucket_examples(plan: BatchPlan, settings: LoaderSettings, images: int) -> Iterator[BucketExamples]:
    """For each bucket of each dataset its first batches, until they hold `images` images; one bucket in memory at a time."""
    reader = BatchReader(plan.datasets, settings, None, None)
    keys: dict[tuple[int, Size], list[BatchKey]] = {}
    counts: dict[tuple[int, Size], int] = {}
    for rank in range(plan.world_size):
        for number, spec in enumerate(plan.share(0, rank)):
            bucket = spec.dataset, spec.bucket
            if not spec.is_padding and counts.get(bucket, 0) < images:
                keys.setdefault(bucket, []).append((0, number, spec))
                counts[bucket] = counts.get(bucket, 0) + len(spec.items)
    for (dataset, size), chosen in sorted(keys.items()):
        yield BucketExamples(dataset, size, [reader.read(key) for key in chosen])
