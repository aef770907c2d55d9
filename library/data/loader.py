"""Batches, ready before they are needed: items are read by workers, in an order that does not depend on how many there are."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from library.common.errors import UserError
from library.data.batches import BatchPlan, BatchSpec
from library.data.captions import CaptionPipeline
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR, read_pixels, shrink_mask, to_tensor
from library.data.records import ImageRecord, IndexedDataset
from library.data.settings import Size, SubsetSettings

logger = logging.getLogger(__name__)


class LatentSource(Protocol):
    """Latents made before training, by the number of the dataset and of the record in it."""

    @property
    def on_disk(self) -> bool: ...

    def is_damaged(self, dataset: int, number: int) -> bool: ...

    def get(self, dataset: int, number: int, flipped: bool) -> tuple[Tensor, Tensor | None]: ...


class TextSource(Protocol):
    """Text encoder outputs made before training, by the number of the dataset and of the record in it."""

    @property
    def on_disk(self) -> bool: ...

    def get(self, dataset: int, number: int, variant: int, dropped: bool) -> tuple[str, dict[str, Tensor]]: ...


@dataclass
class Batch:
    """What one process trains on at once. images or latents is None; so is text where captions are encoded live."""

    images: Tensor | None  # [B, 3, H, W] float32 in -1..1
    latents: Tensor | None  # [B, 16, h, w] float32, raw
    captions: list[str]
    text: dict[str, Tensor] | None  # each [B, ...]
    mask: Tensor | None  # [B, 1, h, w] float32 in 0..1
    loss_weights: Tensor  # [B]; 0 in a filler, and for an image that is left out
    preserve: Tensor | None  # [B] bool: differential output preservation
    network_multiplier: float
    paths: list[str]
    size: Size  # (W, H) in pixels

    def tensors(self) -> dict[str, Any]:
        names = ("images", "latents", "text", "mask", "loss_weights", "preserve")
        return {name: getattr(self, name) for name in names}

    def pin_memory(self) -> Batch:
        """Called by the DataLoader where pinning is on."""
        return replace(self, **{name: _each(value, Tensor.pin_memory) for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, **{name: _each(value, move) for name, value in self.tensors().items()})


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


Place = tuple[int, int, BatchSpec]
"""epoch, number of the batch in this process's share, what it is made of"""


class BatchReader(Dataset["Batch | UserError"]):
    """Makes a batch from its place. Picklable, so that workers can be spawned (Windows, macOS)."""

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

    def __getitem__(self, place: Place) -> Batch | UserError:
        """What a worker sends: a user's mistake as it is, since torch would wrap a raised one in the worker's traceback."""
        try:
            return self.read(place)
        except UserError as error:
            return error

    def read(self, place: Place) -> Batch:
        """The batch of a place. UserError names an image that cannot be decoded."""
        epoch, number, spec = place
        step = epoch * self.settings.steps_per_epoch + number // self.settings.accumulation
        items = [self._item(spec.dataset, record, repeat, epoch, step) for record, repeat in spec.items]
        dataset = self.datasets[spec.dataset]
        weights = [
            0.0 if spec.filler or item.left_out else dataset.records[n].loss_weight
            for item, (n, _) in zip(items, spec.items)
        ]
        preserve = torch.tensor([preserves(dataset.subset_of(dataset.records[n])) for n, _ in spec.items])
        masks = [item.mask for item in items]
        images = [item.image for item in items if item.image is not None]
        return Batch(
            images=to_tensor(images) if images else None,
            latents=torch.stack([item.latents for item in items if item.latents is not None]) if not images else None,
            captions=[item.caption for item in items],
            text=_stack([item.text for item in items]),
            mask=_stack_masks(masks),
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
            caption, text = self.texts.get(dataset, number, rng.randrange(1 << 30), dropped)
        else:
            caption, text = pipeline.at(record.caption, rng, step, epoch + 1), None
        if self.latents is not None:
            if self.latents.is_damaged(dataset, number):
                return _Item(None, _no_latents(record), None, caption, text, left_out=True)
            latents, mask = self.latents.get(dataset, number, flipped)
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
    image: Any  # [H, W, 3] uint8 or None
    latents: Tensor | None
    mask: Tensor | None  # [1, h, w]
    caption: str
    text: dict[str, Tensor] | None
    left_out: bool = False  # nothing stands for a damaged image, and weighs nothing


def _no_pixels(record: ImageRecord) -> np.ndarray:
    return np.zeros((record.bucket[1], record.bucket[0], 3), dtype=np.uint8)


def _no_latents(record: ImageRecord) -> Tensor:
    return torch.zeros(LATENT_CHANNELS, record.bucket[1] // VAE_SCALE_FACTOR, record.bucket[0] // VAE_SCALE_FACTOR)


class PlaceSampler(Sampler[Place]):
    """This process's batches of one epoch from some batch on. Read in the main process."""

    def __init__(self, plan: BatchPlan, rank: int):
        self.plan, self.rank = plan, rank
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[Place]:
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
        self.sampler = PlaceSampler(plan, settings.rank)
        self.loader: DataLoader[Batch | UserError] = DataLoader(
            BatchReader(plan.datasets, settings, latents, texts),
            batch_size=None,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=settings.pin_memory,
            persistent_workers=settings.persistent and workers > 0,
            prefetch_factor=2 if workers else None,
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        self.sampler.epoch, self.sampler.start = epoch, start
        return _raising(iter(self.loader))


def _raising(found: Iterable[Batch | UserError]) -> Iterator[Batch]:
    for batch in found:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def preserves(subset: SubsetSettings) -> bool:
    """Whether the subset's images are to keep what the base model says (differential output preservation)."""
    return bool(subset.custom_attributes.get("diff_output_preservation"))


def _stack(texts: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    rows = [text for text in texts if text is not None]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else None


def _stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """[B, 1, h, w]; an image without a mask counts fully. None where no image has one."""
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if mask is None else mask for mask in masks])


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: change(tensor) for key, tensor in value.items()}
    return value
