"""The index of all datasets: which images there are, how large, with which captions and in which buckets. No pixels are read."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from library.common.errors import UserError
from library.data.buckets import BucketError, Buckets, Fit
from library.data.captions import first_choices
from library.data.dataset import DatasetIndex, ImageRecord, IndexedDataset
from library.data.folder_scan import scan_folder
from library.data.metadata_scan import scan_metadata
from library.data.scan import Scan, ScannedImage, ScanOptions
from library.data.settings import DatasetSettings, Size, SubsetSettings
from library.data.split import Identities, held_out, relative_names, validation_settings

__all__ = ["DatasetIndex", "ImageRecord", "IndexedDataset", "build_index"]

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = 4
"""Threads. More of them wait for a slow disk together, but get into each other's way where files are in memory already."""


@dataclass
class ScanReport:
    """Faults and remarks of all datasets; one fault of one folder that several datasets share is kept once."""

    bad: dict[str, str] = field(default_factory=dict)  # path -> reason
    links: set[str] = field(default_factory=set)  # paths of images that are symbolic links
    masks_used: set[str] = field(default_factory=set)
    masks_unused: set[str] = field(default_factory=set)
    problems: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)

    def add(self, scan: Scan) -> None:
        self.bad.update(scan.bad)
        self.links.update(scan.links)
        self.masks_used.update(scan.masks_used)
        self.masks_unused.update(scan.masks_unused)
        self.problems.update(dict.fromkeys(scan.problems))
        self.warnings.update(dict.fromkeys(scan.warnings))


def build_index(
    datasets: Sequence[DatasetSettings],
    *,
    workers: int = DEFAULT_WORKERS,
    cache_dir: Path | None = None,
    saves_index: bool = True,
    skip_bad_images: bool = False,
    allow_external_links: bool = False,
    seed: int = 0,
) -> DatasetIndex:
    """Index all datasets from file headers and caption files.

    `cache_dir`: where index caches are kept; None keeps them beside the images of subsets with cache_info alone.
    `saves_index`: whether they are written, too.
    `skip_bad_images`: leave out images that can't be used, with a warning, instead of stopping.
    `allow_external_links`: read caption and metadata files that are symbolic links to anywhere.
    `seed`: chooses the validation images of datasets without a validation_seed.

    Raises one UserError with every problem of every dataset.
    """
    started = time.perf_counter()
    with gc_disabled():
        scan_options = ScanOptions(workers, cache_dir, saves_index, allow_external_links)
        index = _build(datasets, scan_options, skip_bad_images, seed)
    images = sum(len(dataset.records) for dataset in [*index.training, *index.validation])
    logger.info("Indexed %d images in %.1f s", images, time.perf_counter() - started)
    return index


def _build(datasets: Sequence[DatasetSettings], options: ScanOptions, skip_bad_images: bool, seed: int) -> DatasetIndex:
    report = ScanReport()
    scans: dict[tuple[object, ...], Scan] = {}
    records = [_records(settings, options, scans, report) for settings in datasets]
    scans.clear()
    for mask in sorted(report.masks_unused - report.masks_used):  # several subsets may share a folder of masks
        report.problems[f"The mask {mask} belongs to no image."] = None
    held = [_held_out(*pair, seed, report) for pair in zip(datasets, records, strict=True)]
    kept = _kept(datasets, records, held, report)
    training = [_training(settings, own, report) for settings, own in zip(datasets, kept, strict=True)]
    validation = [_validation(settings, own) for settings, own in zip(datasets, held, strict=True)]
    if not any(training) and not report.problems:
        reason = "all of them are held out for validation" if any(held) else "no dataset holds one that can be used"
        subsets = [subset for settings in datasets for subset in settings.subsets]
        sources = ", ".join(dict.fromkeys(str(subset.metadata_file or subset.image_dir) for subset in subsets))
        report.problems[f"There are no images to train on: {reason}. Looked in {sources or 'no folder'}."] = None
    _raise_or_warn(report, skip_bad_images)
    return DatasetIndex([*filter(None, training)], [*filter(None, validation)], list(report.warnings))


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, the many objects that are made here to stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _records(
    settings: DatasetSettings, options: ScanOptions, scans: dict[tuple[object, ...], Scan], report: ScanReport
) -> list[ImageRecord]:
    """The usable images of a dataset. Folders that another dataset has scanned aren't scanned again."""
    buckets = Buckets(settings)
    records: list[ImageRecord] = []
    for number, subset in enumerate(settings.subsets):
        key = _scan_key(subset)
        if key not in scans:
            scans[key] = scan_metadata(subset, options) if subset.style == "metadata" else scan_folder(subset, options)
            report.add(scans[key])
        for image in scans[key].images:
            try:
                fit = buckets.fit(image.size)
            except BucketError as error:
                report.bad[image.path] = str(error)
            else:
                records.append(_record(image, fit, subset, number))
    if settings.subsets and all(record.is_reg for record in records):
        what = "regularisation images alone" if records else "no image that can be used"
        report.warnings[f"{settings.name} holds {what}."] = None
    return records


def _record(image: ScannedImage, fit: Fit, subset: SubsetSettings, number: int) -> ImageRecord:
    caption = image.text
    if not subset.captions.enable_wildcard and "\n" in caption:
        caption = caption[: caption.index("\n")]
    return ImageRecord(
        path=image.path,
        size=image.size,
        file_size=image.stamp[0],
        mtime_ns=image.stamp[1],
        caption=caption,
        subset=number,
        bucket=fit.bucket,
        resized=fit.resized,
        mask_path=image.mask_path,
        repeats=subset.num_repeats,
        is_reg=subset.is_reg,
        loss_weight=subset.loss_weight,
    )


def _scan_key(subset: SubsetSettings) -> tuple[object, ...]:
    """What the scan of a subset depends on."""
    sources = (subset.image_dir, subset.metadata_file, subset.conditioning_data_dir, subset.cache_info)
    texts = (subset.caption_extension, subset.class_tokens)
    lines = (subset.captions.caption_separator, subset.captions.enable_wildcard) if subset.style == "metadata" else ()
    return (*sources, *texts, *lines)


def _held_out(
    settings: DatasetSettings, records: list[ImageRecord], seed: int, report: ScanReport
) -> list[ImageRecord]:
    """The validation images of a dataset, chosen in each subset alone. Regularization images are never held out."""
    if settings.validation_split == 0:
        return []
    seed = seed if settings.validation_seed is None else settings.validation_seed
    chosen: list[ImageRecord] = []
    for number, subset in enumerate(settings.subsets):
        own = [record for record in records if record.subset == number and not subset.is_reg]
        names = relative_names([record.path for record in own], subset)
        chosen += [own[position] for position in sorted(held_out(names, settings.validation_split, seed))]
    if records and not chosen:
        text = f"{settings.name}: validation_split = {settings.validation_split} holds out no image, there are too few."
        report.warnings[text] = None
    return chosen


def _kept(
    datasets: Sequence[DatasetSettings],
    records: list[list[ImageRecord]],
    held: list[list[ImageRecord]],
    report: ScanReport,
) -> list[list[ImageRecord]]:
    """The images to train on, by dataset: none that any dataset validates on, under whatever path."""
    if not any(held):
        return records
    identities = Identities(report.links)
    taken = {identities.of(record.path) for chosen in held for record in chosen}
    result = []
    for settings, own, chosen in zip(datasets, records, held, strict=True):
        kept = [record for record in own if identities.of(record.path) not in taken]
        elsewhere = len(own) - len(kept) - len(chosen)
        if elsewhere:
            text = f"{settings.name}: {elsewhere} images are not trained on, since they are validated on elsewhere."
            report.warnings[text] = None
        result.append(kept)
    return result


def _training(settings: DatasetSettings, records: list[ImageRecord], report: ScanReport) -> IndexedDataset | None:
    """The dataset as trained on. Regularization images are repeated, or left out, so that they are as many as the others."""
    own = [record for record in records if not record.is_reg]
    regularization = [record for record in records if record.is_reg]
    total = sum(record.repeats for record in own)
    for record, repeats in zip(
        regularization, cycled([record.repeats for record in regularization], total), strict=True
    ):
        record.repeats = repeats
    unused = sum(record.repeats == 0 for record in regularization)
    if unused and total:
        text = (
            f"{settings.name}: {unused} of {len(regularization)} regularization images are not used: an epoch has as many as "
            f"training images × repeats, {total}. Raise num_repeats of the training images, or remove those images."
        )
        report.warnings[text] = None
    return _dataset(settings, [*own, *(record for record in regularization if record.repeats)])


def cycled(repeats: Sequence[int], total: int) -> list[int]:
    """Repeats of each regularization image: its own first, then one more each in turn, until the sum is `total`."""
    result, missing = [], total
    for number in repeats:
        result.append(min(number, missing))
        missing -= result[-1]
    if not result:
        return result
    rounds, rest = divmod(missing, len(result))
    return [number + rounds + (position < rest) for position, number in enumerate(result)]


def _validation(settings: DatasetSettings, records: list[ImageRecord]) -> IndexedDataset | None:
    """The dataset as validated on: each image once, wildcards of its caption at their first choice."""
    for record in records:
        record.repeats = 1
        record.caption = first_choices(record.caption, settings.subsets[record.subset].captions)
    return _dataset(validation_settings(settings), records)


def _dataset(settings: DatasetSettings, records: list[ImageRecord]) -> IndexedDataset | None:
    """The records by buckets; None where there are none."""
    if not records:
        return None
    buckets: dict[Size, list[int]] = {}
    for number, record in enumerate(records):
        buckets.setdefault(record.bucket, []).append(number)
    return IndexedDataset(settings, records, dict(sorted(buckets.items())))


def _raise_or_warn(report: ScanReport, skip_bad_images: bool) -> None:
    """Raise all problems at once. Bad images are one of them, listed with their paths, or a warning if they are skipped."""
    problems = list(report.problems)
    if report.bad:
        listed = "".join(f"\n  {path}: {reason}" for path, reason in sorted(report.bad.items()))
        if skip_bad_images:
            report.warnings[f"{len(report.bad)} files can't be used and are left out:{listed}"] = None
        else:
            problems.append(
                f"{len(report.bad)} files can't be used; mend or remove them, or pass --skip_bad_images:{listed}"
            )
    if problems:
        raise UserError(problems)
