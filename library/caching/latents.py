"""Latents made once: in memory, or in files that the next run finds again.

Latents are kept raw, as the VAE gives them, one draw of its posterior an image. With flip_aug the mirrored image has its
own latents, and with masks the mask at latent size goes along.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from library.caching.files import (
    FORMAT,
    cache_folder,
    cache_path,
    check_writable,
    missing_files,
    read_cache,
    read_cache_key,
    space_problems,
    write_cache,
)
from library.caching.latent_entry import (
    NO_TIMES,
    Entry,
    Key,
    cache_key,
    cache_kind,
    content_hashes,
    posterior_noise,
)
from library.common.errors import UserError
from library.data.augment import uncacheable_augmentations
from library.data.dataset import IndexedDataset
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR, Pixels, read_pixels, shrink_mask, to_tensor
from library.data.settings import Size

logger = logging.getLogger(__name__)

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""images [B, 3, H, W] float32 in -1..1, noise [B, 16, H / 8, W / 8] -> raw latents: the posterior's mean plus noise times its deviation."""
Item = TypeVar("Item")
WRITERS = 4  # threads


class Progress(Protocol):
    """Puts a progress bar around what is iterated over."""

    def __call__(self, items: Sequence[Item], title: str, /) -> Iterable[Item]: ...


@dataclass(frozen=True)
class LatentCacheSettings:
    """How latents are cached."""

    fingerprint: str  # of the VAE and the dtype it works in
    on_disk: bool = False
    cache_dir: Path | None = None
    skip_validation: bool = False  # take files that exist without opening them
    skip_bad_images: bool = False  # go on without the images that cannot be decoded


class LatentCache:
    """Latents of all images of some datasets. `get` after `fill`.

    Datasets that cut an image alike share its latents.
    """

    def __init__(self, datasets: Sequence[IndexedDataset], settings: LatentCacheSettings):
        self.settings = settings
        self.entries: dict[Key, Entry] = {}
        self.same: dict[Key, Key] = {}  # the entry that stands for another one too
        first: dict[tuple[str, str], Key] = {}
        for d, dataset in enumerate(datasets):
            for n, record in enumerate(dataset.records):
                subset, key = dataset.subset_of(record), (d, n)
                kind = cache_kind(record, subset)
                known = first.setdefault((record.path, kind), key)
                if known == key:
                    self.entries[key] = Entry(key, record, subset, kind, subset.flip_aug)
                    continue
                self.same[key] = known
                if subset.flip_aug:
                    self.entries[known] = replace(self.entries[known], flipped=True)
        self.memory: dict[Key, dict[str, Tensor]] = {}
        self.damaged: set[Key] = set()  # without latents: they cannot be decoded, and that is to be passed over
        self.uncacheable = uncacheable_augmentations(datasets)
        self.encode_again: EncodeImages | None = None  # makes files again that get lost in training

    def __getstate__(self) -> dict[str, object]:
        """What a data worker gets: everything but the VAE."""
        return {**self.__dict__, "encode_again": None}

    @property
    def on_disk(self) -> bool:
        """Whether `get` reads files."""
        return self.settings.on_disk

    def is_damaged(self, dataset: int, number: int) -> bool:
        """Whether `get` has nothing for an image, since it cannot be decoded and skip_bad_images is on."""
        return self.same.get((dataset, number), (dataset, number)) in self.damaged

    def get(self, dataset: int, number: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """latents [16, h, w] float32 and the mask [1, h, w] (None without one)."""
        key = self.same.get((dataset, number), (dataset, number))
        name = "latents_flipped" if flipped else "latents"
        tensors = self.memory.get(key)
        if tensors is None:
            path = self._path(self.entries[key])
            tensors = read_cache(path, lambda stored: stored in (name, "mask"))
            if name not in tensors:
                raise UserError(f"{path}: it holds no {name}. Run once without --skip_cache_check to make it again.")
            _check_shapes(path, tensors, self.entries[key].record.bucket)
        mask = tensors.get("mask")
        return tensors[name], mask.flip(-1) if mask is not None and flipped else mask

    def remake(self, dataset: int, number: int) -> None:
        """Make one image's file again. With skip_bad_images an image of which that is impossible counts as damaged."""
        if self.encode_again is None:
            return
        key = self.same.get((dataset, number), (dataset, number))
        try:
            self.fill([self.entries[key]], self.encode_again, 1, lambda batches, title: batches)
        except UserError as error:
            if not self.settings.skip_bad_images:
                raise
            logger.warning("%s It is left out.", error)
            self.damaged.add(key)

    def missing(self) -> list[Entry]:
        """The images whose latents are not there, or are stale."""
        entries = [entry for entry in self.entries.values() if entry.key not in self.damaged]
        if not self.settings.on_disk:
            return [entry for entry in entries if entry.key not in self.memory]
        return missing_files(entries, self._path, None if self.settings.skip_validation else self._is_fresh)

    def check(self, missing: Sequence[Entry]) -> list[str]:
        """Problems that would stop `fill`: chance that would be lost, folders that cannot be written, too little room."""
        needed = self.bytes_needed(missing)
        return self.uncacheable or check_writable(set(needed)) or space_problems(needed)

    def bytes_needed(self, missing: Sequence[Entry]) -> dict[Path, int]:
        """What the files to be made take in each folder."""
        needed: dict[str, int] = {}
        if not self.settings.on_disk:
            return {}
        for entry in missing:
            cells = entry.record.bucket[0] * entry.record.bucket[1] // VAE_SCALE_FACTOR**2
            size = 4 * cells * (LATENT_CHANNELS * (1 + entry.flipped) + 1)
            folder = cache_folder(entry.record.path, self.settings.cache_dir)
            needed[folder] = needed.get(folder, 0) + size
        return {Path(folder): size for folder, size in needed.items()}

    def share(self, missing: Sequence[Entry], rank: int, processes: int) -> list[Entry]:
        """What one process makes of files that all have found missing; all of a cache in memory, which is its own."""
        return list(missing[rank::processes] if self.settings.on_disk else missing)

    def fill(
        self, missing: Sequence[Entry], encode: EncodeImages, batch_size: int, progress: Progress, workers: int = 4
    ) -> None:
        """Encode the missing images, batches of one size at a time; threads decode ahead and write behind.

        UserError lists every image that cannot be decoded, when all the others are done; with skip_bad_images they are
        left out with a warning, unless no image is left.
        """
        batches = list(_batched(missing, batch_size))
        damaged: dict[Key, UserError] = {}
        writing: list[Future[None]] = []
        with ThreadPoolExecutor(max(1, workers)) as pool, ThreadPoolExecutor(WRITERS) as writers:
            ahead = _ahead(pool, batches, depth=max(2, workers // max(1, batch_size)) + 1)
            for batch in progress(batches, "Caching latents"):
                done = list(zip(batch, next(ahead)))
                damaged.update({entry.key: error for entry, error in done if isinstance(error, UserError)})
                readable = [(entry, pixels) for entry, pixels in done if isinstance(pixels, Pixels)]
                made = self._encode(readable, encode) if readable else []
                _wait(writing)  # for the batch before: no more than one waits in memory
                writing = [writers.submit(self._keep, entry, tensors) for entry, tensors in made]
            _wait(writing)
        if damaged:
            self._pass_over(damaged)

    def _pass_over(self, damaged: Mapping[Key, UserError]) -> None:
        problems = [problem for error in damaged.values() for problem in error.problems]
        if not self.settings.skip_bad_images or len(damaged) + len(self.damaged) == len(self.entries):
            raise UserError(problems)
        logger.warning("%d images are left out:\n  %s", len(damaged), "\n  ".join(problems))
        self.damaged.update(damaged)

    def _encode(
        self, batch: Sequence[tuple[Entry, Pixels]], encode: EncodeImages
    ) -> list[tuple[Entry, dict[str, Tensor]]]:
        """What is to be kept of each image."""
        entries = [entry for entry, _ in batch]
        images = to_tensor([pixels.image for _, pixels in batch])
        latents = encode(images, torch.stack([posterior_noise(entry.record) for entry in entries])).float().cpu()
        flips = [index for index, entry in enumerate(entries) if entry.flipped]
        flipped: dict[int, Tensor] = {}
        if flips:
            noise = torch.stack([posterior_noise(entries[index].record, "flipped") for index in flips])
            flipped = dict(zip(flips, encode(images[flips].flip(-1), noise).float().cpu()))
        result = []
        for index, (entry, pixels) in enumerate(batch):
            tensors = {"latents": latents[index].clone()}
            if index in flipped:
                tensors["latents_flipped"] = flipped[index].clone()
            if pixels.mask is not None:
                tensors["mask"] = shrink_mask(pixels.mask)
            result.append((entry, tensors))
        return result

    def _keep(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise UserError(f"{entry.record.path}: its latents are not finite. Use --no_half_vae, or remove the image.")
        if self.settings.on_disk:
            key = cache_key(entry, *content_hashes(entry.record), self.settings.fingerprint)
            write_cache(self._path(entry), tensors, key)
        else:
            self.memory[entry.key] = tensors

    def _path(self, entry: Entry) -> Path:
        return cache_path(entry.record.path, entry.kind, self.settings.cache_dir)

    def _is_fresh(self, entry: Entry) -> bool:
        """Same sizes and times, or same contents: a copied dataset keeps its caches."""
        recorded = read_cache_key(self._path(entry))
        if recorded is None:
            return False
        contents = recorded.get("content", ""), recorded.get("mask_content", "")
        expected: dict[str, object] = {"format": FORMAT, **cache_key(entry, *contents, self.settings.fingerprint)}
        if not entry.flipped:
            expected["flipped"] = recorded.get("flipped")  # a mirrored copy more does no harm
        if recorded == expected:
            return True
        if {**recorded, **NO_TIMES} != {**expected, **NO_TIMES} or contents != content_hashes(entry.record):
            return False
        with suppress(UserError):  # with the new times the next run need not read the image again
            write_cache(self._path(entry), read_cache(self._path(entry)), expected)
        return True


def _batched(missing: Sequence[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Batches of one bucket each, in a steady order."""
    by_size: dict[tuple[int, int], list[Entry]] = {}
    for entry in missing:
        by_size.setdefault(entry.record.bucket, []).append(entry)
    for entries in by_size.values():
        for start in range(0, len(entries), batch_size):
            yield entries[start : start + batch_size]


def _wait(writing: Sequence[Future[None]]) -> None:
    for future in writing:
        future.result()  # raises what went wrong


def _ahead(
    pool: ThreadPoolExecutor, batches: Sequence[Sequence[Entry]], depth: int
) -> Iterator[list[Pixels | UserError]]:
    """The pixels of each batch, or why an image has none, with up to `depth` batches being decoded ahead."""
    waiting = [[pool.submit(_read, entry) for entry in batch] for batch in batches[:depth]]
    for index in range(len(batches)):
        futures = waiting.pop(0)
        if index + depth < len(batches):
            waiting.append([pool.submit(_read, entry) for entry in batches[index + depth]])
        yield [future.result() for future in futures]


def _read(entry: Entry) -> Pixels | UserError:
    try:
        return read_pixels(entry.record, entry.subset, random.Random(0))
    except UserError as error:
        return error


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], bucket: Size) -> None:
    """UserError where a cache file holds other shapes than an image of this bucket has."""
    cells = bucket[1] // VAE_SCALE_FACTOR, bucket[0] // VAE_SCALE_FACTOR
    for name, tensor in tensors.items():
        expected = (1 if name == "mask" else LATENT_CHANNELS, *cells)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{path}: its {name} is {list(tensor.shape)}, not {list(expected)}. Delete the file; it will be made again."
            )
