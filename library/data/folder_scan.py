"""Scans subsets of the folder style and the mask-image style: sizes, captions and masks. No pixels are read."""
# ruff: noqa: PTH100, PTH118, PTH123 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from library.data import index_cache
from library.data.folder import Listing, list_folder, pair, stem_of
from library.data.index_cache import IndexCache, Stamp, forget_stale
from library.data.scan import Scan, ScannedImage, ScanOptions, as_text, first_names, in_threads, read_sizes
from library.data.settings import Size, SubsetSettings
from library.data.text_links import caption_link_problem

USUAL_EXTENSIONS = (".txt", ".caption")  # of caption files


def scan_folder(subset: SubsetSettings, options: ScanOptions) -> Scan:
    """Scan the folder `image_dir`, with the masks of `conditioning_data_dir` where there is one.

    Sizes and captions that the index cache knows aren't read again. Images come in the order of their names.
    """
    scan = Scan()
    listing = _listed(subset.image_dir, "image_dir", subset, scan)
    if listing is None:
        return scan
    cache_file = index_cache.cache_path(Path(listing.folder), subset.cache_info, options.cache_dir)
    cache = index_cache.load(cache_file)
    pairs, duplicate_stems = pair(listing)
    refused = set() if options.allow_external_links else _refused_links(listing, pairs, subset, scan)
    used = set(pairs.values()) - refused
    caption_stamps = {name: stamp for name, stamp in listing.captions.values() if name in used}
    sizes = read_sizes(listing.folder, listing.images, cache, options.workers, scan.bad)
    texts = read_captions(listing.folder, caption_stamps, cache, options.workers, scan.bad)
    index_cache.save(cache_file if options.saves_index else None, cache)
    base = os.path.join(listing.folder, "")
    scan.links += [base + name for name in listing.links]
    for name, caption in pairs.items():
        if name not in sizes or (caption is not None and caption not in texts):  # its problem is in `scan` already
            continue
        stamp, size = sizes[name]
        text = texts[caption][1] if caption is not None else subset.class_tokens or ""
        scan.images.append(ScannedImage(base + name, size, stamp, text))
    _warn(scan, subset, listing, duplicate_stems)
    _warn_of_captions(scan, subset, pairs, texts, listing.folder)
    if subset.conditioning_data_dir is not None:
        _add_masks(scan, subset, options)
    return scan


def _refused_links(listing: Listing, pairs: Mapping[str, str | None], subset: SubsetSettings, scan: Scan) -> set[str]:
    """The caption files that are links to texts outside of the dataset; each is listed as bad."""
    refused = {}
    for image, caption in pairs.items():
        if caption is not None and caption in listing.caption_links:
            problem = caption_link_problem(listing.folder, caption, image, subset.caption_extension)
            if problem:
                refused[caption] = problem
    scan.bad += [(os.path.join(listing.folder, caption), problem) for caption, problem in refused.items()]
    return set(refused)


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


def read_captions(
    folder: str, stamps: Mapping[str, Stamp], cache: IndexCache, workers: int, bad: list[tuple[str, str]]
) -> dict[str, tuple[Stamp, str]]:
    """Stamps and texts of the caption files that are the keys of `stamps`: the cache's own entries, brought up to date.

    Files that can't be read have no entry; they are added to `bad`, as path and reason.
    """
    cache.changed |= forget_stale(cache.captions, stamps)
    unknown = [name for name in stamps if name not in cache.captions]

    def read(name: str) -> tuple[str, str]:
        """(text, "") or ("", reason)."""
        try:
            with open(os.path.join(folder, name), "rb", buffering=0) as file:
                return caption_text(file.read()), ""
        except OSError as error:
            return "", f"can't be read: {error.strerror or error}"
        except ValueError as error:
            return "", str(error)

    for name, (text, reason) in zip(unknown, in_threads(read, unknown, workers)):
        if reason:
            bad.append((os.path.join(folder, name), f"the caption file {reason}"))
        else:
            cache.captions[name] = (stamps[name], text)
            cache.changed = True
    return cache.captions


def _warn(scan: Scan, subset: SubsetSettings, listing: Listing, duplicate_stems: list[str]) -> None:
    """What is odd about a folder, but no reason to stop."""
    for extension, number in sorted(listing.passed_over.items()):
        scan.warnings.append(
            f"{subset.name}: {number} {extension} files are passed over, since that format can't be read here."
        )
    if not scan.images and not scan.bad:
        scan.warnings.append(f"{subset.name}: there is no image in {listing.folder}.")
    if duplicate_stems:
        text = "these have the stem, and so the caption, of an image with another extension"
        scan.warnings.append(f"{subset.name}: {text}: {first_names(duplicate_stems)}.")


def _warn_of_captions(
    scan: Scan,
    subset: SubsetSettings,
    pairs: Mapping[str, str | None],
    texts: Mapping[str, tuple[Stamp, str]],
    folder: str,
) -> None:
    """Which images have no caption file, and which an empty one."""
    without = [name for name, caption in pairs.items() if caption is None]
    if without:
        instead = f'the class tokens "{subset.class_tokens}"' if subset.class_tokens else "an empty caption"
        scan.warnings.append(
            f"{subset.name}: {len(without)} images have no {subset.caption_extension} file and get {instead}: {first_names(without)}.{_other_extension(without, subset, folder)}"
        )
    empty = [name for name, (_, text) in texts.items() if not text]
    if empty:
        scan.warnings.append(f"{subset.name}: empty caption files give empty captions: {first_names(sorted(empty))}.")


def _other_extension(names: Sequence[str], subset: SubsetSettings, folder: str) -> str:
    """The advice to take another --caption_extension, where files beside these images have one of the usual ones."""
    present = {path.name for path in Path(folder).iterdir()}
    for extension in USUAL_EXTENSIONS:
        count = sum(name[: name.rindex(".")] + extension in present for name in names)
        if count and extension != subset.caption_extension:
            return f" {count} of them have a {extension} file: is --caption_extension {extension} what you want?"
    return ""


def _add_masks(scan: Scan, subset: SubsetSettings, options: ScanOptions) -> None:
    """Give each image the mask of its stem. Missing, extra and wrongly sized masks are problems."""
    listing = _listed(subset.conditioning_data_dir, "conditioning_data_dir", subset, scan)
    if listing is None:
        return
    cache_file = index_cache.cache_path(Path(listing.folder), subset.cache_info, options.cache_dir)
    cache = index_cache.load(cache_file)
    expected = {stem_of(image.path) for image in scan.images} | {stem_of(path) for path, _ in scan.bad}
    sizes = read_sizes(listing.folder, listing.images, cache, options.workers, scan.bad)
    index_cache.save(cache_file if options.saves_index else None, cache)

    def problem(text: str) -> None:
        scan.problems.append(f"{subset.name}: {text}.")

    masks: dict[str, str] = {}
    for name in sorted(listing.images):
        stem = stem_of(name)
        if stem in masks:
            problem(f"there are two masks of one stem in {listing.folder}: {masks[stem]} and {name}")
        else:
            kind = scan.masks_used if stem in expected else scan.masks_unused
            kind.add(os.path.join(listing.folder, name))
        masks.setdefault(stem, name)
    for image in scan.images:
        mask = masks.get(stem_of(image.path))
        if mask is None:
            problem(f"{image.path} has no mask of its stem in {listing.folder}")
        elif mask in sizes:
            image.mask_path = os.path.join(listing.folder, mask)
            _compare(sizes[mask][1], image, problem)
    scan.images = [image for image in scan.images if image.mask_path is not None]


def _compare(size: Size, image: ScannedImage, problem: Callable[[str], None]) -> None:
    if size != image.size:
        problem(f"the mask {image.mask_path} is {as_text(size)}, but its image is {as_text(image.size)}")
