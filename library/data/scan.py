"""What scanning a source of images gives, and the reading of many small files that all sources share."""
# ruff: noqa: PTH118 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from library.data.headers import BadImageError, image_size
from library.data.index_cache import IndexCache, Stamp, forget_stale
from library.data.settings import Size

Item = TypeVar("Item")
Result = TypeVar("Result")
_CHUNK = 256  # files that a thread takes at once


@dataclass(slots=True)
class ScannedImage:
    """An image as it is on the disk."""

    path: str
    size: Size
    stamp: Stamp
    text: str  # the lines of its caption that aren't blank, joined by "\n"
    mask_path: str | None = None


@dataclass
class Scan:
    """What a source holds, and everything that is wrong with it."""

    images: list[ScannedImage] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # paths of images that are symbolic links
    bad: list[tuple[str, str]] = field(default_factory=list)  # path, reason; such an image isn't in `images`
    masks_used: set[str] = field(default_factory=set)  # paths
    masks_unused: set[str] = field(default_factory=set)  # paths of masks that belong to none of these images
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ScanOptions:
    """How to look: `workers` threads; index caches in `cache_dir`, or (None) beside the images of subsets with cache_info."""

    workers: int
    cache_dir: Path | None
    saves_index: bool = True  # False: index caches are read and not written
    allow_external_links: bool = False  # read texts that symbolic links bring in from anywhere


def read_sizes(
    folder: str, stamps: Mapping[str, Stamp], cache: IndexCache, workers: int, bad: list[tuple[str, str]]
) -> dict[str, tuple[Stamp, Size]]:
    """Stamps and sizes of the images that are the keys of `stamps`: the cache's own entries, brought up to date from headers.

    Names are relative to `folder`, or absolute. Images that can't be used have no entry; they are added to `bad`, as path and reason.
    """
    cache.changed |= forget_stale(cache.images, stamps)
    unknown = [name for name in stamps if name not in cache.images]
    shared: dict[Size, Size] = {}  # equal sizes are one object

    def read(name: str) -> Size | str:
        try:
            return image_size(os.path.join(folder, name))
        except BadImageError as error:
            return str(error)

    for name, size_or_reason in zip(unknown, in_threads(read, unknown, workers)):
        if isinstance(size_or_reason, str):
            bad.append((os.path.join(folder, name), size_or_reason))
        else:
            cache.images[name] = (stamps[name], shared.setdefault(size_or_reason, size_or_reason))
            cache.changed = True
    return cache.images


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield the results in the items' order. Threads will do, since what takes time is waiting for the disk."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]

    def run(chunk: Sequence[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    if len(chunks) < 2 or workers < 2:
        for chunk in chunks:
            yield from run(chunk)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="index")
    try:
        for results in pool.map(run, chunks):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C needn't wait for files that nobody has begun to read


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def as_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
