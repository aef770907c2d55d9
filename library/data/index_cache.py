"""The index cache: what earlier runs read from image headers and caption files, so that a later run need not.

An entry counts only while the file's size and time of change are those of the entry; new, changed and removed files are seen at once.
The file is JSON in columns, which is compact and quick to read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from library.common.files import write_text
from library.common.processes import remove_stale_temporaries
from library.data.settings import Size

logger = logging.getLogger(__name__)

FILE_NAME = "index_cache.json"
_VERSION = 1
_TOO_FRESH_NS = 2_000_000_000
"""A file changed this shortly before the cache is written could change again within the same tick of its clock."""

Item = TypeVar("Item")
Stamp = tuple[int, int]
"""(size in bytes, mtime in ns) of a file."""


@dataclass
class IndexCache:
    """Entries by file name: (stamp, size) of images and (stamp, text) of caption files.

    The scan brings them up to date in place; `changed` says whether it had to.
    """

    images: dict[str, tuple[Stamp, Size]] = field(default_factory=dict)
    captions: dict[str, tuple[Stamp, str]] = field(default_factory=dict)
    changed: bool = False


def forget_stale(entries: dict[str, tuple[Stamp, Item]], stamps: Mapping[str, Stamp]) -> bool:
    """Remove the entries of files that are gone or have another stamp now; say whether there were any."""
    stale = [name for name, entry in entries.items() if stamps.get(name) != entry[0]]
    for name in stale:
        del entries[name]
    return bool(stale)


def cache_path(source: Path, beside: bool, cache_dir: Path | None) -> Path | None:
    """Where the index cache of `source` (an image folder or a metadata file) lies: in `cache_dir`, else beside it, else nowhere."""
    if cache_dir is not None:
        identity = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]
        return cache_dir / f"{identity}.{FILE_NAME}"
    if not beside:
        return None
    return source / FILE_NAME if source.is_dir() else source.with_name(f"{source.name}.{FILE_NAME}")


def load(path: Path | None) -> IndexCache:
    """The cache at `path`; empty where there is none, or where it is damaged or of another version."""
    if path is None:
        return IndexCache()
    try:
        columns = json.loads(path.read_bytes())
        if columns["version"] != _VERSION:
            return IndexCache()
        shared: dict[Size, Size] = {}  # equal sizes are one object, in a hundred thousand entries too
        sizes = (shared.setdefault(size, size) for size in zip(columns["width"], columns["height"], strict=True))
        return IndexCache(
            dict(zip(columns["image"], zip(_stamps(columns, "image"), sizes), strict=True)),
            dict(zip(columns["caption"], zip(_stamps(columns, "caption"), columns["text"]), strict=True)),
        )
    except FileNotFoundError:
        return IndexCache()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("The index cache %s can't be used and is made anew: %s", path, error)
        return IndexCache()


def save(path: Path | None, cache: IndexCache) -> None:
    """Write the cache, if it has changed, whole or not at all. A folder that can't be written to is no reason to stop: it is said and passed over."""
    if path is None or not cache.changed:
        return
    remove_stale_temporaries([path.parent])
    limit = time.time_ns() - _TOO_FRESH_NS
    images = [(name, *stamp, *size) for name, (stamp, size) in cache.images.items() if stamp[1] < limit]
    captions = [(name, *stamp, text) for name, (stamp, text) in cache.captions.items() if stamp[1] < limit]
    columns: dict[str, object] = {"version": _VERSION}
    columns |= _columns(("image", "image_bytes", "image_mtime", "width", "height"), images)
    columns |= _columns(("caption", "caption_bytes", "caption_mtime", "text"), captions)
    try:
        write_text(path, json.dumps(columns, separators=(",", ":")))
    except OSError as error:
        logger.warning("The index cache %s can't be written, so the next run reads all headers again: %s", path, error)


def _stamps(columns: dict[str, list[int]], kind: str) -> Iterable[Stamp]:
    return zip(columns[f"{kind}_bytes"], columns[f"{kind}_mtime"], strict=True)


def _columns(names: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    return {name: [row[number] for row in rows] for number, name in enumerate(names)}
