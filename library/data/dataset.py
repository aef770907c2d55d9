"""What a run is trained on. Open this file first: it holds the data model, and here is the way to it and from it.

    config.read_datasets      dataset file and command line -> DatasetSettings (settings.py); schema.py checks the file
    index.build_index         DatasetSettings -> DatasetIndex, from image headers (headers.py) and caption files alone:
                              folders (folder.py, folder_scan.py) or a metadata file (metadata_scan.py) are scanned (scan.py), each
                              image gets a bucket (buckets.py), some are held out for validation (split.py)
    batches.BatchPlan         DatasetIndex -> which images are trained together, in what order
    loader.Loader             BatchPlan -> Batch (batch.py): captions varied (captions.py), pixels read, scaled and cropped
                              (images.py), colors changed (augment.py); or latents and text encoder outputs from caches
    prompts.read_prompts      the prompts of previews

A hundred thousand records must stay small: a record has slots, its path is a plain string, and equal sizes share one tuple.
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
    repeats: int  # >= 1, times in an epoch; cycled for regularization images
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


# --- the index as text ------------------------------------------------------------------------------------------

_HEADINGS = ("bucket", "images", "repeats", "batches")
Row = tuple[str, str, str, str]


def table(index: DatasetIndex) -> str:
    """One table a dataset, in lines: each bucket's images, images with repeats, and batches on one process in one epoch."""
    parts = [_titled(dataset, "training") for dataset in index.training]
    parts += [_titled(dataset, "validation") for dataset in index.validation]
    return "\n\n".join(parts)


def batch_count(dataset: IndexedDataset) -> int:
    """Batches of one epoch on one process; the last batch of a bucket may be short."""
    return sum(_batches(dataset, numbers) for numbers in dataset.buckets.values())


def _titled(dataset: IndexedDataset, use: str) -> str:
    settings = dataset.settings
    width, height = settings.resolution
    title = f"{settings.name}, {use}: resolution {width}x{height}, batch size {settings.batch_size}"
    rows = [_row(dataset, f"{size[0]}x{size[1]}", numbers) for size, numbers in dataset.buckets.items()]
    everything = [number for numbers in dataset.buckets.values() for number in numbers]
    total = ("total", str(len(everything)), str(_repeats(dataset, everything)), str(batch_count(dataset)))
    lines = [_HEADINGS, *rows, total]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join([title, *("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)])


def _row(dataset: IndexedDataset, label: str, numbers: list[int]) -> Row:
    return (label, str(len(numbers)), str(_repeats(dataset, numbers)), str(_batches(dataset, numbers)))


def _repeats(dataset: IndexedDataset, numbers: list[int]) -> int:
    return sum(dataset.records[number].repeats for number in numbers)


def _batches(dataset: IndexedDataset, numbers: list[int]) -> int:
    return -(-_repeats(dataset, numbers) // dataset.settings.batch_size)
