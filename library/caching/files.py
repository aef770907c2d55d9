"""Cache files: safetensors, one an image and kind, that record what they were made from.

They stand beside the image, or in `cache_dir` under the image's name and a hash of its folder. A file whose record does not
match what would be made now is stale and is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from library.common.errors import UserError
from library.common.files import check_writing, save_safetensors

FORMAT = 1
LONGEST_NAME = 240  # bytes: file systems allow 255, and a file being written has 14 more
HEADERS_AT_ONCE = 1024  # read by one thread in one go: a task costs more than a header
T = TypeVar("T")


def cache_path(image: str, kind: str, cache_dir: Path | None) -> Path:
    """Where the cache of an image lies. kind tells caches of one image apart: "1024x768.latents", "text"."""
    path = Path(image)
    end = f".{kind}.safetensors"
    if cache_dir is None:
        return path.with_name(_fitting(path.name, end))
    folder = hashlib.blake2b(os.fsencode(path.parent), digest_size=6).hexdigest()
    return cache_dir / _fitting(f"{folder}.{path.name}", end)


def cache_folder(image: str, cache_dir: Path | None) -> str:
    """The folder of `cache_path`, found quickly: for counting what a hundred thousand files will take."""
    return os.path.dirname(image) if cache_dir is None else str(cache_dir)  # noqa: PTH120 (Path takes ten times as long)


def _fitting(name: str, end: str) -> str:
    """The two joined; a name that would be too long for a file is cut and ends in its hash."""
    limit, encoded = LONGEST_NAME - len(end), os.fsencode(name)
    if len(encoded) <= limit:
        return name + end
    mark = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return encoded[: limit - len(mark) - 1].decode("utf-8", "ignore") + "~" + mark + end


def missing_files(
    items: Sequence[T], path_of: Callable[[T], Path], is_fresh: Callable[[T], bool] | None, threads: int = 4
) -> list[T]:
    """The items whose cache file is not there, or is stale; without `is_fresh` every file that is there counts.

    Each folder is listed once, so that files that are not there cost nothing more.
    """
    paths = [path_of(item) for item in items]
    names = {folder: _names(folder) for folder in {path.parent for path in paths}}
    there = [path.name in names[path.parent] for path in paths]
    if is_fresh is None:
        return [item for item, exists in zip(items, there) if not exists]
    chunks = [range(start, min(start + HEADERS_AT_ONCE, len(items))) for start in range(0, len(items), HEADERS_AT_ONCE)]

    def look(chunk: Iterable[int]) -> list[T]:
        return [items[index] for index in chunk if not (there[index] and is_fresh(items[index]))]

    with ThreadPoolExecutor(threads) as pool:
        return [item for stale in pool.map(look, chunks) for item in stale]


def _names(folder: Path) -> set[str]:
    """The names in a folder; none where there is no such folder or it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()


def write_cache(path: Path, tensors: Mapping[str, Tensor], cache_key: Mapping[str, Any]) -> None:
    """Write atomically. UserError where the folder cannot be written or the disk is full; what was written before stays whole."""
    try:
        save_safetensors(path, tensors, {"made_from": canonical(cache_key)})
    except OSError as error:
        raise UserError(_write_problem(path, error)) from error


def read_cache_key(path: Path) -> dict[str, Any] | None:
    """The cache key that a file records: what it was made from. None if there is no such file or it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            key = json.loads((file.metadata() or {})["made_from"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return key if isinstance(key, dict) else None


def read_cache(path: Path, is_needed: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a cache file whose names are needed; no others are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if is_needed(name)}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: this cache file cannot be read ({error}). Delete it; it will be made again."
        ) from error


def canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)


def check_writable(folders: set[Path], leaves_no_trace: bool = False) -> list[str]:
    """Problems with folders that are to hold caches, before anything is encoded. leaves_no_trace: look, and write nothing to try."""
    problems = []
    for folder in sorted(folders):
        try:
            check_writing(folder, leaves_no_trace)
        except OSError as error:
            problems.append(_write_problem(folder, error))
    return problems


def space_problems(needed: Mapping[Path, int]) -> list[str]:
    """Problems with disks that have less room than the caches to be made there. needed: bytes by folder."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        first, total = by_disk.get(existing.stat().st_dev, (existing, 0))
        by_disk[existing.stat().st_dev] = (first, total + size)
    return [
        f"{folder}: the caches need {total / 2**30:.2f} GiB, and {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free. "
        "Make room, or give --cache_dir another disk."
        for folder, total in by_disk.values()
        if total > shutil.disk_usage(folder).free
    ]


def content_hash(path: str) -> str:
    """A hash of a file's content, so that a copied image keeps its cache."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # the disk, or the user's share of it


def _write_problem(path: Path, error: OSError) -> str:
    if error.errno in FULL:
        return f"{path}: the disk is full. The caches written so far are whole; make room, or give --cache_dir another disk, and start again."
    return f"{path}: cache files cannot be written there ({error.strerror or error}). Give --cache_dir a folder that can be written."
