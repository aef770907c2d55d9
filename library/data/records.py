"""What the index knows: one slim record an image, grouped into datasets and buckets.

A hundred thousand records must stay small, so a record has slots, its path is a plain string, and equal sizes share one tuple.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from library.data.settings import DatasetSettings, Size, SubsetSettings


@dataclass(slots=True)
class ImageRecord:
    """One image as its header, its caption file and its subset describe it. Treat it as read-only."""

    path: str  # absolute
    size: Size  # (W, H) as shown, that is after EXIF orientation
    file_size: int  # bytes
    mtime_ns: int
    caption: str  # raw: the first line, or with enable_wildcard every line that is not blank, joined by "\n"
    subset: int  # index into DatasetSettings.subsets
    bucket: Size  # what is fed, each side a multiple of 16
    resized: Size  # scaled to this, which covers the bucket, then cropped to the bucket
    mask_path: str | None  # mask-image style alone
    repeats: int  # >= 1, times in an epoch; cycled for regularisation images
    is_reg: bool
    loss_weight: float


@dataclass(frozen=True)
class IndexedDataset:
    """A dataset's images. `buckets` maps (W, H) to the indices of its records, in order; repeats are not written out."""

    settings: DatasetSettings
    records: list[ImageRecord]
    buckets: dict[Size, list[int]]

    def subset_of(self, record: ImageRecord) -> SubsetSettings:
        return self.settings.subsets[record.subset]

    @property
    def total_repeats(self) -> int:
        """Images in one epoch, repeats counted."""
        return sum(record.repeats for record in self.records)


@dataclass(frozen=True)
class DatasetIndex:
    """Everything that will be trained and validated on. No image is in both lists.

    The settings of a validation dataset have augmentation, dropout, shuffling and wildcards switched off and repeats of 1.
    """

    training: list[IndexedDataset]
    validation: list[IndexedDataset]
    warnings: list[str]


def dataset_fingerprint(datasets: Sequence[IndexedDataset]) -> str:
    """Changes with the images, their captions, buckets and repeats, and with the settings of their subsets."""
    digest = hashlib.blake2b(digest_size=12)
    for dataset in datasets:
        digest.update(repr(dataset.settings.batch_size).encode())
        for subset in dataset.settings.subsets:
            digest.update(repr(subset).encode())
        for record in dataset.records:
            facts = (record.path, record.file_size, record.caption, record.bucket, record.repeats)
            digest.update(repr(facts).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
