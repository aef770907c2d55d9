"""Scans subsets of the metadata style: a JSON or JSONL file that names images and holds their captions."""
# ruff: noqa: PTH100, PTH109, PTH114, PTH116, PTH117, PTH118, PTH122 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.common.text_files import FormatError, parse_json, read_text
from library.data import headers, index_cache
from library.data.captions import joiner
from library.data.index_cache import Stamp
from library.data.scan import Scan, ScannedImage, ScanOptions, first_names, read_sizes
from library.data.settings import Size, SubsetSettings
from library.data.text_links import metadata_link_problem

MAX_BYTES = 1024**3
"""Of a metadata file: two million long captions."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a metadata file, checked."""

    image: str
    caption: str
    tags: str
    size: Size | None  # as the file says; the image's header is what counts


def scan_metadata(subset: SubsetSettings, options: ScanOptions) -> Scan:
    """Scan the images that a metadata file names, in the order of their paths."""
    scan = Scan()
    path = subset.metadata_file or Path()
    link = "" if options.allow_external_links else metadata_link_problem(str(path), _folder(subset))
    if link:
        scan.problems.append(f"{subset.name}: {link}")
        return scan
    entries: dict[str, Entry] = {}
    stamps: dict[str, Stamp] = {}
    twice: list[str] = []
    for entry in _read(path, subset, scan):
        located = _locate(entry.image, subset, scan)
        if located is None:
            continue
        image, stamp = located
        if image in entries:
            twice.append(entry.image)
            continue
        entries[image], stamps[image] = entry, stamp
    cache_file = index_cache.cache_path(path, subset.cache_info, options.cache_dir)
    cache = index_cache.load(cache_file)
    sizes = read_sizes("", stamps, cache, options.workers, scan.bad)
    index_cache.save(cache_file if options.saves_index else None, cache)
    for image in sorted(sizes):
        text = full_caption(entries[image].caption, entries[image].tags, subset)
        stamp, size = sizes[image]
        scan.images.append(ScannedImage(image, size, stamp, text))
        if os.path.islink(image):
            scan.links.append(image)
    _warn(scan, subset, entries, twice)
    return scan


def _folder(subset: SubsetSettings) -> str | None:
    return None if subset.image_dir is None else str(subset.image_dir)


def full_caption(caption: str, tags: str, subset: SubsetSettings) -> str:
    """Caption and tags as one text; where wildcards are on and the caption has lines, the tags go to each of them."""
    separator = joiner(subset.captions.caption_separator)
    lines = [line for line in map(str.strip, caption.replace("\r", "\n").split("\n")) if line]
    if not subset.captions.enable_wildcard:
        lines = lines[:1]
    return "\n".join(separator.join(part for part in (line, tags.strip()) if part) for line in lines or [""])


def _read(path: Path, subset: SubsetSettings, scan: Scan) -> Iterator[Entry]:
    """The valid entries of the file; every fault becomes a problem."""
    try:
        text = read_text(path, MAX_BYTES)
    except FormatError as error:
        scan.problems.append(f"{subset.name}: metadata_file {path} can't be read: {error}.")
        return
    rows = _json_lines(text, path, scan) if path.suffix.lower() == ".jsonl" else _json_object(text, path, scan)
    for where, image, fields in rows:
        entry = _entry(where, image, fields, scan)
        if entry is not None:
            yield entry


def _json_object(text: str, path: Path, scan: Scan) -> Iterator[tuple[str, Any, Any]]:
    try:
        table = parse_json(text)
    except FormatError as error:
        scan.problems.append(f"{path}: {error}.")
        return
    if not isinstance(table, dict):
        scan.problems.append(f"{path}: the file must hold one object with image paths as keys (or be called .jsonl).")
        return
    for image, fields in table.items():
        yield f'{path}, key "{image}"', image, fields


def _json_lines(text: str, path: Path, scan: Scan) -> Iterator[tuple[str, Any, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = parse_json(line)
        except FormatError as error:
            scan.problems.append(f"{where}: {error}.")
            continue
        yield where, fields.get("image_path") if isinstance(fields, dict) else None, fields


def _entry(where: str, image: Any, fields: Any, scan: Scan) -> Entry | None:
    """Check the types of one entry."""
    if not isinstance(fields, dict) or not isinstance(image, str) or not image:
        scan.problems.append(f'{where}: an entry must be an object, with an "image_path" in a .jsonl file.')
        return None
    caption, tags, size = fields.get("caption") or "", fields.get("tags") or "", fields.get("image_size")
    if not isinstance(caption, str) or not isinstance(tags, str):
        scan.problems.append(f"{where}: caption and tags must be text.")
        return None
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        scan.problems.append(f"{where}: image_size must be [width, height], but it is {size!r}.")
        return None
    return Entry(image, caption, tags, (size[0], size[1]) if size else None)


def _locate(image: str, subset: SubsetSettings, scan: Scan) -> tuple[str, Stamp] | None:
    """The absolute path and the stamp of an image; None, with a problem in `scan`, where there is none or it is outside image_dir.

    A path is relative to image_dir; one that begins with image_dir itself is accepted too, and so is one without its extension.
    """
    if subset.image_dir is None:
        if not os.path.isabs(image):
            scan.problems.append(f"{subset.name}: the path {image} is relative, so the subset needs image_dir.")
            return None
        bases = [""]
    else:
        bases = [os.path.abspath(subset.image_dir), os.getcwd()]
    outside = False
    for base in bases:
        path = os.path.normpath(os.path.join(base, image))
        if subset.image_dir is not None and not path.startswith(os.path.join(bases[0], "")):
            outside = outside or base == bases[0]
            continue
        for candidate in _with_extensions(path):
            stamp = _stamp(candidate)
            if stamp is not None:
                return candidate, stamp
    if outside:
        scan.problems.append(f"{subset.name}: the path {image} leads out of image_dir = {subset.image_dir}.")
    else:
        scan.bad.append((os.path.join(bases[0], image), "does not exist, or can't be read"))
    return None


def _with_extensions(path: str) -> Iterator[str]:
    yield path
    if os.path.splitext(path)[1].lower() not in headers.EXTENSIONS | headers.OPTIONAL_EXTENSIONS:
        for extension in sorted(headers.EXTENSIONS | headers.OPTIONAL_EXTENSIONS):
            yield path + extension


def _stamp(path: str) -> Stamp | None:
    try:
        info = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else None


def _warn(scan: Scan, subset: SubsetSettings, entries: dict[str, Entry], twice: list[str]) -> None:
    if twice:
        scan.warnings.append(f"{subset.name}: named twice, the first entry counts: {first_names(twice)}.")
    if not scan.images and not scan.bad and not scan.problems:
        scan.warnings.append(f"{subset.name}: the metadata file names no image.")
    empty = [image.path for image in scan.images if not image.text]
    if empty:
        scan.warnings.append(f"{subset.name}: neither caption nor tags, so the caption is empty: {first_names(empty)}.")
    other = [image.path for image in scan.images if _differs(entries[image.path].size, image.size)]
    if other:
        scan.warnings.append(
            f"{subset.name}: image_size is not the size of the file, which counts: {first_names(other)}."
        )


def _differs(recorded: Size | None, size: Size) -> bool:
    """Whether a size is another one; turned sides are allowed, as most tools write the size before EXIF orientation."""
    return recorded is not None and sorted(recorded) != sorted(size)
