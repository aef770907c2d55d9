"""Which images are held out for validation, and how they are fed."""
# ruff: noqa: PTH100, PTH118 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from library.data.captions import deterministic
from library.data.settings import DatasetSettings, SubsetSettings


def held_out(names: Sequence[str], share: float, seed: int) -> set[int]:
    """The positions in `names` of round(len * share) names to validate on.

    Names are ranked by a hash of seed and name, so that the choice depends on neither order nor folder, is nearly the same after an
    image is added, and is the same in two datasets that hold the same folder.
    """
    count = math.floor(len(names) * share + 0.5)

    def rank(position: int) -> bytes:
        return hashlib.blake2b(f"{seed}\n{names[position]}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    return set(sorted(range(len(names)), key=rank)[:count]) if count else set()


def relative_names(paths: Sequence[str], subset: SubsetSettings) -> list[str]:
    """The paths relative to the subset's folder where there is one, so that moving the folder moves no image across the split."""
    if subset.image_dir is None:
        return list(paths)
    folder = os.path.join(os.path.abspath(subset.image_dir), "")
    return [path.removeprefix(folder).replace(os.sep, "/") for path in paths]


class Identities:
    """Tells whether two paths are one image, through links of folders and files and whatever the case on Windows.

    `links` are the paths that are symbolic links themselves: to ask the disk for each path would take long.
    """

    def __init__(self, links: Iterable[str]) -> None:
        self._links = set(links)
        self._folders: dict[str, str] = {}

    def of(self, path: str) -> str:
        if path in self._links:
            return os.path.normcase(os.path.realpath(path))
        folder, _, name = path.rpartition(os.sep)
        if folder not in self._folders:
            self._folders[folder] = os.path.join(os.path.realpath(folder + os.sep), "")
        return os.path.normcase(self._folders[folder] + name)


def validation_settings(settings: DatasetSettings) -> DatasetSettings:
    """The dataset's settings for validation: nothing random, each image once."""
    return replace(settings, subsets=tuple(_validation_subset(subset) for subset in settings.subsets))


def _validation_subset(subset: SubsetSettings) -> SubsetSettings:
    return replace(
        subset,
        num_repeats=1,
        captions=deterministic(subset.captions),
        color_aug=False,
        flip_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
    )
