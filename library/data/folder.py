"""What lies in one folder: images, caption files and masks, with their stamps. Nothing is opened.

Paths are plain strings here: a hundred thousand Path objects cost more time and memory than all the rest of the index.
"""
# ruff: noqa: PTH100, PTH118, PTH119, PTH122 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from library.data import headers
from library.data.index_cache import Stamp


@dataclass
class Listing:
    """The files of one folder that matter, by name."""

    folder: str  # absolute
    images: dict[str, Stamp] = field(default_factory=dict)
    captions: dict[str, tuple[str, Stamp]] = field(default_factory=dict)  # by the stem that they belong to
    links: list[str] = field(default_factory=list)  # those of the images that are symbolic links
    caption_links: set[str] = field(default_factory=set)  # those of the caption files that are
    passed_over: dict[str, int] = field(
        default_factory=dict
    )  # extension -> number, of images in formats that can't be read
    broken: list[tuple[str, str]] = field(default_factory=list)  # path, reason: links that lead nowhere


def list_folder(folder: str, caption_extension: str | None = None) -> Listing:
    """List the images and captions right in `folder`. Links are followed; subfolders and hidden files (".name") are not looked at.

    Raises OSError where the folder can't be read.
    """
    listing = Listing(os.path.abspath(folder))
    images, captions = listing.images, listing.captions
    usable = headers.usable_extensions()
    caption_end = caption_extension.lower() if caption_extension else "\0"  # no name ends so
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":  # macOS leaves "._photo.jpg" beside photo.jpg, which is no image
                continue
            lowered = name.lower()
            extension = lowered[lowered.rfind(".") :]
            is_caption = lowered.endswith(caption_end)
            if not is_caption and extension not in usable:
                if extension in headers.OTHER_IMAGE_EXTENSIONS or extension in headers.OPTIONAL_EXTENSIONS:
                    listing.passed_over[extension] = listing.passed_over.get(extension, 0) + 1
                continue
            try:
                info = entry.stat()
            except OSError as error:  # a broken link, or one in a loop
                listing.broken.append((os.path.join(listing.folder, name), f"can't be read: {error.strerror or error}"))
                continue
            if not stat.S_ISREG(info.st_mode):
                continue
            stamp = (info.st_size, info.st_mtime_ns)
            if not is_caption:
                images[name] = stamp
                if entry.is_symlink():
                    listing.links.append(name)
            elif (stem := name[: -len(caption_end)]) not in captions or name.endswith(caption_extension or ""):
                captions[stem] = (name, stamp)  # ".txt" before ".TXT"
                if entry.is_symlink():
                    listing.caption_links.add(name)
    return listing


def pair(listing: Listing) -> tuple[dict[str, str | None], list[str]]:
    """The caption file of each image, in the order of the images' names, and the images whose stem another one had before.

    A caption has the image's stem, or the stem without its four last parts (the face coordinates of face_crop_aug_range).
    """
    pairs: dict[str, str | None] = {}
    duplicate_stems: list[str] = []
    stems: set[str] = set()
    for image in sorted(listing.images):
        stem = image[: image.rindex(".")]
        if stem in stems:
            duplicate_stems.append(image)
        stems.add(stem)
        caption = listing.captions.get(stem)
        if caption is None and stem.count("_") >= 4:
            caption = listing.captions.get(stem.rsplit("_", 4)[0])
        pairs[image] = caption[0] if caption is not None else None
    return pairs, duplicate_stems


def stem_of(name: str) -> str:
    """The file name of a name or path without its last extension."""
    return os.path.splitext(os.path.basename(name))[0]
