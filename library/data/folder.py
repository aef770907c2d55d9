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
    passed_over: dict[str, int] = field(
        default_factory=dict
    )  # extension -> number, of images in formats that can't be read
    broken: list[tuple[str, str]] = field(default_factory=list)  # path, reason: links that lead nowhere

    def caption_of(self, image: str) -> str | None:
        """The caption file of an image: that of its stem, or of the stem without four last parts (face coordinates)."""
        stem = stem_of(image)
        found = self.captions.get(stem)
        if found is None and stem.count("_") >= 4:
            found = self.captions.get(stem.rsplit("_", 4)[0])
        return found[0] if found is not None else None


def list_folder(folder: str, caption_extension: str | None = None) -> Listing:
    """List the images and captions right in `folder`; links are followed, subfolders are not entered.

    Raises OSError where the folder can't be read.
    """
    listing = Listing(os.path.abspath(folder))
    usable = headers.usable_extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            lowered = entry.name.lower()
            extension = os.path.splitext(lowered)[1]
            is_caption = caption_extension is not None and lowered.endswith(caption_extension.lower())
            if extension in usable or is_caption:
                _add(listing, entry, caption_extension if is_caption else None)
            elif extension in headers.OTHER_IMAGE_EXTENSIONS or extension in headers.OPTIONAL_EXTENSIONS:
                listing.passed_over[extension] = listing.passed_over.get(extension, 0) + 1
    return listing


def _add(listing: Listing, entry: os.DirEntry[str], caption_extension: str | None) -> None:
    """Put a file into the listing, as a caption where `caption_extension` is given, else as an image."""
    try:
        info = entry.stat()
    except OSError as error:  # a broken link, or one in a loop
        listing.broken.append((os.path.join(listing.folder, entry.name), f"can't be read: {error.strerror or error}"))
        return
    if not stat.S_ISREG(info.st_mode):
        return
    stamp = (info.st_size, info.st_mtime_ns)
    if caption_extension is None:
        listing.images[entry.name] = stamp
        return
    stem = entry.name[: -len(caption_extension)]
    if stem not in listing.captions or entry.name.endswith(caption_extension):  # ".txt" before ".TXT"
        listing.captions[stem] = (entry.name, stamp)


def stem_of(name: str) -> str:
    """The file name of a name or path without its last extension."""
    return os.path.splitext(os.path.basename(name))[0]
