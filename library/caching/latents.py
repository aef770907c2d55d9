"""Latents made once: in memory, or in files that the next run finds again.

Latents are kept raw, as the VAE gives them, one draw of its posterior an image. With flip_aug the mirrored image has its
own latents, and with masks the mask at latent size goes along.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.caching.files import (
    FORMAT,
    cache_folder,
    cache_path,
    check_writable,
    content_hash,
    missing_files,
    read_cache,
    read_made_from,
    room_problems,
    write_cache,
)
from library.common.errors import UserError
from library.data.augment import frozen_chance
from library.data.buckets import cover
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR, Pixels, read_pixels, shrink_mask, to_tensor
from library.data.records import ImageRecord, IndexedDataset
from library.data.settings import SubsetSettings

logger = logging.getLogger(__name__)

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""images [B, 3, H, W] float32 in -1..1, noise [B, 16, H / 8, W / 8] -> raw latents: the posterior's mean plus noise times its deviation."""
Wrap = Callable[[Sequence[Any], str], Any]
"""(batches, title) -> the batches behind a progress bar."""
WRITERS = 4  # threads


@dataclass(frozen=True)
class LatentCacheSettings:
    fingerprint: str  # of the VAE and the dtype it works in
    on_disk: bool = False
    cache_dir: Path | None = None
    trust: bool = False  # take files that exist without opening them
    skip_bad_images: bool = False  # go on without the images that cannot be decoded


Key = tuple[int, int]
"""Number of the dataset, number of the record in it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a dataset, for the cache."""

    key: Key
    record: ImageRecord
    subset: SubsetSettings
    kind: str  # of the cache file: what sets apart the caches of one image
    flipped: bool  # whether mirrored latents are wanted too


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
                kind = _kind(record, subset)
                known = first.setdefault((record.path, kind), key)
                if known == key:
                    self.entries[key] = Entry(key, record, subset, kind, subset.flip_aug)
                    continue
                self.same[key] = known
                if subset.flip_aug:
                    self.entries[known] = replace(self.entries[known], flipped=True)
        self.memory: dict[Key, dict[str, Tensor]] = {}
        self.damaged: set[Key] = set()  # without latents: they cannot be decoded, and that is to be passed over
        self.frozen = frozen_chance(datasets)

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
        found = self.memory.get(key)
        if found is None:
            path = self._path(self.entries[key])
            found = read_cache(path, lambda there: there in (name, "mask"))
            if name not in found:
                raise UserError(f"{path}: it holds no {name}. Run once without --skip_cache_check to make it again.")
        mask = found.get("mask")
        return found[name], mask.flip(-1) if mask is not None and flipped else mask

    def missing(self) -> list[Entry]:
        """The images whose latents are not there, or are stale."""
        entries = [entry for entry in self.entries.values() if entry.key not in self.damaged]
        if not self.settings.on_disk:
            return [entry for entry in entries if entry.key not in self.memory]
        return missing_files(entries, self._path, None if self.settings.trust else self._is_fresh)

    def check(self, missing: Sequence[Entry]) -> list[str]:
        """Problems that would stop `fill`: chance that would be lost, folders that cannot be written, too little room."""
        needed = self.bytes_needed(missing)
        return self.frozen or check_writable(set(needed)) or room_problems(needed)

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
        self, missing: Sequence[Entry], encode: EncodeImages, batch_size: int, wrap: Wrap, workers: int = 4
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
            for batch in wrap(batches, "Caching latents"):
                done = list(zip(batch, next(ahead)))
                damaged.update({entry.key: found for entry, found in done if isinstance(found, UserError)})
                readable = [(entry, found) for entry, found in done if isinstance(found, Pixels)]
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
            write_cache(self._path(entry), tensors, self._made_from(entry, *_contents(entry.record)))
        else:
            self.memory[entry.key] = tensors

    def _path(self, entry: Entry) -> Path:
        return cache_path(entry.record.path, entry.kind, self.settings.cache_dir)

    def _made_from(self, entry: Entry, content: str, mask_content: str) -> dict[str, Any]:
        record, subset = entry.record, entry.subset
        mask_size, mask_time = _stamp(record.mask_path)
        return {
            "content": content,
            "file_size": record.file_size,
            "mtime_ns": record.mtime_ns,
            "size": list(record.size),
            "bucket": list(record.bucket),
            "resized": list(record.resized),
            "interpolation": subset.resize_interpolation,
            "face_crop": list(subset.face_crop_aug_range or []),
            "flipped": entry.flipped,
            "mask": [Path(record.mask_path).name, mask_size] if record.mask_path else subset.alpha_mask,
            "mask_content": mask_content,
            "mask_mtime_ns": mask_time,
            "vae": self.settings.fingerprint,
        }

    def _is_fresh(self, entry: Entry) -> bool:
        """Same sizes and times, or same contents: a copied data set keeps its caches."""
        found = read_made_from(self._path(entry))
        if found is None:
            return False
        contents = found.get("content", ""), found.get("mask_content", "")
        wanted: dict[str, Any] = {"format": FORMAT, **self._made_from(entry, *contents)}
        if not entry.flipped:
            wanted["flipped"] = found.get("flipped")  # a mirrored copy more does no harm
        if found == wanted:
            return True
        if {**found, **NO_TIMES} != {**wanted, **NO_TIMES} or contents != _contents(entry.record):
            return False
        with suppress(UserError):  # with the new times the next run need not read the image again
            write_cache(self._path(entry), read_cache(self._path(entry)), wanted)
        return True


NO_TIMES = {"mtime_ns": None, "mask_mtime_ns": None}


def posterior_noise(record: ImageRecord, kind: str = "") -> Tensor:
    """[16, h, w] float32 ~ N(0, 1): of the image alone, so that its latents depend on neither batch nor order nor place."""
    facts = f"{Path(record.path).name} {record.file_size} {record.bucket} {kind}"
    seed = int.from_bytes(hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
    width, height = record.bucket
    shape = (LATENT_CHANNELS, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _kind(record: ImageRecord, subset: SubsetSettings) -> str:
    """The bucket, and a mark of what else decides the latents where that is not the default."""
    width, height = record.bucket
    mask = Path(record.mask_path).parent.name if record.mask_path else subset.alpha_mask
    scaled = None if record.resized == cover(record.size, record.bucket) else record.resized
    facts = (subset.resize_interpolation, subset.face_crop_aug_range, mask, scaled)
    if not any(facts):
        return f"{width}x{height}.latents"
    mark = hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=3).hexdigest()
    return f"{width}x{height}-{mark}.latents"


def _contents(record: ImageRecord) -> tuple[str, str]:
    """Hashes of the image and of its mask file, "" without one."""
    return content_hash(record.path), content_hash(record.mask_path) if record.mask_path else ""


def _stamp(path: str | None) -> tuple[int, int]:
    """Size in bytes and time in ns of a mask file; zeros without one."""
    if path is None:
        return 0, 0
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


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
    for place in range(len(batches)):
        futures = waiting.pop(0)
        if place + depth < len(batches):
            waiting.append([pool.submit(_read, entry) for entry in batches[place + depth]])
        yield [future.result() for future in futures]


def _read(entry: Entry) -> Pixels | UserError:
    try:
        return read_pixels(entry.record, entry.subset, random.Random(0))
    except UserError as error:
        return error
