"""Scans subsets of the folder style and the mask-image style: sizes, captions and masks. No pixels are read."""
# ruff: noqa: PTH100, PTH118, PTH119, PTH123 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from library.data import index_cache
from library.data.folder import Listing, list_folder, stem_of
from library.data.index_cache import IndexCache, Stamp
from library.data.scan import Found, Scan, ScanOptions, as_text, in_threads, read_sizes, some
from library.data.settings import Size, SubsetSettings


def scan_folder(subset: SubsetSettings, options: ScanOptions) -> Scan:
    """Scan the folder `image_dir`, with the masks of `conditioning_data_dir` where there is one.

    Sizes and captions that the index cache knows aren't read again. Images come in the order of their names.
    """
    scan = Scan()
    listing = _listed(subset.image_dir, "image_dir", subset, scan)
    if listing is None:
        return scan
    cache_file = index_cache.cache_path(Path(listing.folder), subset.cache_info, options.cache_dir)
    known, fresh = index_cache.load(cache_file), IndexCache()
    sizes = read_sizes(listing.folder, listing.images, known, fresh, options.workers, scan)
    texts = _read_captions(listing, known, fresh, options.workers, scan)
    if fresh != known:
        index_cache.save(cache_file, fresh)
    for name in sorted(sizes):
        caption = listing.caption_of(name)
        if caption is None:
            text = subset.class_tokens or ""
        elif caption in texts:
            text = texts[caption]
        else:  # its caption can't be read, which is told already
            continue
        scan.images.append(Found(os.path.join(listing.folder, name), sizes[name], listing.images[name], text))
    _warn(scan, subset, listing)
    if subset.conditioning_data_dir is not None:
        _add_masks(scan, subset, options)
    return scan


def caption_text(content: bytes) -> str:
    """The lines of a caption file that aren't blank, stripped, joined by newlines. Raises ValueError where it isn't UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"is not UTF-8 (byte 0x{byte:02x} at position {error.start}); save it as UTF-8") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line for line in map(str.strip, lines) if line)


def _listed(folder: Path | None, key: str, subset: SubsetSettings, scan: Scan) -> Listing | None:
    """The folder's listing; where it can't be read, a problem and None."""
    try:
        listing = list_folder(str(folder), subset.caption_extension if key == "image_dir" else None)
    except OSError as error:
        where = os.path.abspath(str(folder))
        scan.problems.append(f"{subset.name}: the folder {key} = {where} can't be read: {error.strerror or error}.")
        return None
    scan.bad += listing.broken
    return listing


def _read_captions(listing: Listing, known: IndexCache, fresh: IndexCache, workers: int, scan: Scan) -> dict[str, str]:
    """Texts by file name of all captions in use, from the cache or from their files; unreadable ones go to `scan`."""
    used = {listing.caption_of(name) for name in listing.images}
    stamps = {name: stamp for name, stamp in listing.captions.values() if name in used}
    texts: dict[str, str] = {}
    unknown: list[tuple[str, Stamp]] = []
    for name, stamp in stamps.items():
        text = known.caption(name, stamp)
        if text is None:
            unknown.append((name, stamp))
        else:
            texts[name] = text

    def read(item: tuple[str, Stamp]) -> tuple[str, str]:
        """(text, "") or ("", reason)."""
        try:
            with open(os.path.join(listing.folder, item[0]), "rb", buffering=0) as file:
                return caption_text(file.read()), ""
        except OSError as error:
            return "", f"can't be read: {error.strerror or error}"
        except ValueError as error:
            return "", str(error)

    for (name, _), (text, reason) in zip(unknown, in_threads(read, unknown, workers)):
        if reason:
            scan.bad.append((os.path.join(listing.folder, name), f"the caption file {reason}"))
        else:
            texts[name] = text
    for name, text in texts.items():
        fresh.captions[name] = (stamps[name], text)
    return texts


def _warn(scan: Scan, subset: SubsetSettings, listing: Listing) -> None:
    """Everything about a folder that is worth a word but no reason to stop."""

    def say(text: str) -> None:
        scan.warnings.append(f"{subset.name}: {text}.")

    for extension, number in sorted(listing.passed_over.items()):
        say(f"{number} {extension} files are passed over, since that format can't be read here")
    if not scan.images and not scan.bad:
        say(f"there is no image in {listing.folder}")
    without, empty = [], []
    for found in scan.images:
        name = os.path.basename(found.path)
        if listing.caption_of(name) is None:
            without.append(name)
        elif not found.text:
            empty.append(name)
    if without:
        instead = f'the class tokens "{subset.class_tokens}"' if subset.class_tokens else "an empty caption"
        say(f"{len(without)} images have no {subset.caption_extension} file and get {instead}: {some(without)}")
    if empty:
        say(f"the caption file is empty of {some(empty)}")
    first: dict[str, str] = {}
    twins = [name for name in sorted(listing.images) if first.setdefault(stem_of(name), name) != name]
    if twins:
        say(f"these have the stem, and so the caption, of an image with another extension: {some(twins)}")


def _add_masks(scan: Scan, subset: SubsetSettings, options: ScanOptions) -> None:
    """Give each image the mask of its stem. Missing, extra and wrongly sized masks are problems."""
    listing = _listed(subset.conditioning_data_dir, "conditioning_data_dir", subset, scan)
    if listing is None:
        return
    cache_file = index_cache.cache_path(Path(listing.folder), subset.cache_info, options.cache_dir)
    known, fresh = index_cache.load(cache_file), IndexCache()
    expected = {stem_of(found.path) for found in scan.images} | {stem_of(path) for path, _ in scan.bad}
    sizes = read_sizes(listing.folder, listing.images, known, fresh, options.workers, scan)
    if fresh != known:
        index_cache.save(cache_file, fresh)

    def problem(text: str) -> None:
        scan.problems.append(f"{subset.name}: {text}.")

    masks: dict[str, str] = {}
    for name in sorted(listing.images):
        stem = stem_of(name)
        if stem in masks:
            problem(f"there are two masks of one stem in {listing.folder}: {masks[stem]} and {name}")
        elif stem not in expected:
            problem(f"the mask {os.path.join(listing.folder, name)} belongs to no image")
        masks.setdefault(stem, name)
    for found in scan.images:
        mask = masks.get(stem_of(found.path))
        if mask is None:
            problem(f"{found.path} has no mask of its stem in {listing.folder}")
        elif mask in sizes:
            found.mask_path = os.path.join(listing.folder, mask)
            _compare(sizes[mask], found, problem)
    scan.images = [found for found in scan.images if found.mask_path is not None]


def _compare(size: Size, found: Found, problem: Callable[[str], None]) -> None:
    if size != found.size:
        problem(f"the mask {found.mask_path} is {as_text(size)}, but its image is {as_text(found.size)}")
