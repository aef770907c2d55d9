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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from library.files import save_safetensors
from library.options.errors import UserError

FORMAT = 1


def cache_path(image: str, kind: str, cache_dir: Path | None) -> Path:
    """Where the cache of an image lies. kind tells caches of one image apart: "1024x768.latents", "text"."""
    path = Path(image)
    name = f"{path.name}.{kind}.safetensors"
    if cache_dir is None:
        return path.with_name(name)
    folder = hashlib.blake2b(os.fsencode(path.parent), digest_size=6).hexdigest()
    return cache_dir / f"{folder}.{name}"


def write_cache(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
    """Write atomically. UserError where the folder cannot be written or the disk is full; what was written before stays whole."""
    try:
        save_safetensors(path, tensors, {"made_from": canonical(made_from)})
    except OSError as error:
        raise UserError(_write_problem(path, error)) from error
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        if "os error" in str(error) or "I/O" in str(error):
            raise UserError(
                f"{path}: this cache file cannot be written ({error}). Give --cache_dir a folder with room."
            ) from error
        raise


def read_made_from(path: Path) -> dict[str, Any] | None:
    """What a cache file says it was made from; None if there is no such file or it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return json.loads((file.metadata() or {})["made_from"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def read_cache(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a cache file whose names are wanted; no others are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: this cache file cannot be read ({error}). Delete it; it will be made again."
        ) from error


def canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)


def check_writable(folders: set[Path]) -> list[str]:
    """Problems with folders that are to hold caches, before anything is encoded."""
    problems = []
    for folder in sorted(folders):
        probe = folder / f".cache-{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            problems.append(_write_problem(folder, error))
    return problems


def room_problems(needed: Mapping[Path, int]) -> list[str]:
    """Problems with disks that have less room than the caches to be made there. needed: bytes by folder."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        existing = next(place for place in (folder, *folder.parents) if place.exists())
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


def _write_problem(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{path}: the disk is full. The caches written so far are whole; make room, or give --cache_dir another disk, and start again."
    return f"{path}: cache files cannot be written there ({error.strerror or error}). Give --cache_dir a folder that can be written."
