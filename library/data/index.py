"""The index of all datasets: which images there are, how large, with which captions and in which buckets. No pixels are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.buckets import BucketError, Buckets, Fit
from library.data.captions import first_choices
from library.data.folder_scan import scan_folder
from library.data.metadata_scan import scan_metadata
from library.data.records import DatasetIndex, ImageRecord, IndexedDataset
from library.data.scan import Found, Scan, ScanOptions
from library.data.settings import DatasetSettings, Size, SubsetSettings
from library.data.split import Identities, held_out, relative_names, validation_settings
from library.options.errors import UserError

__all__ = ["DatasetIndex", "ImageRecord", "IndexedDataset", "build_index"]

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = 8
"""Threads. They wait for the disk most of the time, so the number of cores doesn't matter."""


@dataclass(slots=True)
class _Candidate:
    """An image of one dataset, before it is known whether it is trained or validated on."""

    found: Found
    fit: Fit
    subset: int
    validates: bool = False


@dataclass
class _Findings:
    """Faults and remarks of all datasets; one fault of one folder that several datasets share is kept once."""

    bad: dict[str, str] = field(default_factory=dict)  # path -> reason
    problems: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)

    def take(self, scan: Scan) -> None:
        self.bad.update(scan.bad)
        self.problems.update(dict.fromkeys(scan.problems))
        self.warnings.update(dict.fromkeys(scan.warnings))


def build_index(
    datasets: Sequence[DatasetSettings],
    *,
    workers: int = DEFAULT_WORKERS,
    cache_dir: Path | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> DatasetIndex:
    """Index all datasets from file headers and caption files.

    `cache_dir`: where index caches are kept; None keeps them beside the images of subsets with cache_info alone.
    `skip_bad_images`: leave out images that can't be used, with a warning, instead of stopping.
    `seed`: chooses the validation images of datasets without a validation_seed.

    Raises one UserError with every problem of every dataset.
    """
    started = time.perf_counter()
    findings = _Findings()
    options = ScanOptions(workers, cache_dir)
    scans: dict[tuple[object, ...], Scan] = {}
    candidates = [_candidates(settings, options, scans, findings) for settings in datasets]
    scans.clear()
    for settings, found in zip(datasets, candidates, strict=True):
        _hold_out(settings, found, seed, findings)
    trained, validated = _separate(datasets, candidates, findings)
    training = [dataset for dataset in map(_training, datasets, trained) if dataset.records]
    validation = [dataset for dataset in map(_validation, datasets, validated) if dataset.records]
    if not training and not findings.problems:
        reason = (
            "all of them are held out for validation" if any(validated) else "no dataset holds one that can be used"
        )
        findings.problems[f"There are no images to train on: {reason}."] = None
    _raise_or_warn(findings, skip_bad_images)
    images = sum(len(dataset.records) for dataset in [*training, *validation])
    logger.info("Indexed %d images in %.1f s", images, time.perf_counter() - started)
    return DatasetIndex(training, validation, list(findings.warnings))


def _candidates(
    settings: DatasetSettings, options: ScanOptions, scans: dict[tuple[object, ...], Scan], findings: _Findings
) -> list[_Candidate]:
    """The usable images of a dataset. Folders that another dataset has scanned aren't scanned again."""
    buckets = Buckets(settings)
    candidates = []
    for number, subset in enumerate(settings.subsets):
        key = _scan_key(subset)
        if key not in scans:
            scans[key] = scan_metadata(subset, options) if subset.style == "metadata" else scan_folder(subset, options)
            findings.take(scans[key])
        for found in scans[key].images:
            try:
                candidates.append(_Candidate(found, buckets.fit(found.size), number))
            except BucketError as error:
                findings.bad[found.path] = str(error)
    if settings.subsets and not any(not settings.subsets[candidate.subset].is_reg for candidate in candidates):
        what = "regularisation images alone" if candidates else "no image that can be used"
        findings.warnings[f"{settings.name} holds {what}."] = None
    return candidates


def _scan_key(subset: SubsetSettings) -> tuple[object, ...]:
    """What the scan of a subset depends on."""
    sources = (subset.image_dir, subset.metadata_file, subset.conditioning_data_dir, subset.cache_info)
    texts = (subset.caption_extension, subset.class_tokens)
    lines = (subset.captions.caption_separator, subset.captions.enable_wildcard) if subset.style == "metadata" else ()
    return (*sources, *texts, *lines)


def _hold_out(settings: DatasetSettings, candidates: list[_Candidate], seed: int, findings: _Findings) -> None:
    """Mark the validation images of each subset. Regularisation images are never held out."""
    if settings.validation_split == 0:
        return
    seed = seed if settings.validation_seed is None else settings.validation_seed
    marked = False
    for number, subset in enumerate(settings.subsets):
        own = [candidate for candidate in candidates if candidate.subset == number and not subset.is_reg]
        names = relative_names([candidate.found.path for candidate in own], subset)
        for position in held_out(names, settings.validation_split, seed):
            own[position].validates = marked = True
    if candidates and not marked:
        text = f"{settings.name}: validation_split = {settings.validation_split} holds out no image, there are too few."
        findings.warnings[text] = None


def _separate(
    datasets: Sequence[DatasetSettings], candidates: list[list[_Candidate]], findings: _Findings
) -> tuple[list[list[_Candidate]], list[list[_Candidate]]]:
    """The images to train on and those to validate on, by dataset. What any dataset validates on, none trains on."""
    validated = [[candidate for candidate in found if candidate.validates] for found in candidates]
    if not any(validated):
        return candidates, validated
    identities = Identities()
    taken = {identities.of(candidate.found.path) for found in validated for candidate in found}
    trained = []
    for settings, found in zip(datasets, candidates, strict=True):
        rest = [candidate for candidate in found if not candidate.validates]
        kept = [candidate for candidate in rest if identities.of(candidate.found.path) not in taken]
        if len(kept) < len(rest):
            text = f"{settings.name}: {len(rest) - len(kept)} images are not trained on, since they are validated on elsewhere."
            findings.warnings[text] = None
        trained.append(kept)
    return trained, validated


def _training(settings: DatasetSettings, candidates: list[_Candidate]) -> IndexedDataset:
    """The dataset as trained on. Regularisation images are repeated, or left out, so that they are as many as the others."""
    own = [candidate for candidate in candidates if not settings.subsets[candidate.subset].is_reg]
    regularisation = [candidate for candidate in candidates if settings.subsets[candidate.subset].is_reg]
    records = [_record(candidate, settings, settings.subsets[candidate.subset].num_repeats) for candidate in own]
    wanted = sum(record.repeats for record in records)
    once = [settings.subsets[candidate.subset].num_repeats for candidate in regularisation]
    for candidate, repeats in zip(regularisation, cycled(once, wanted), strict=True):
        if repeats:
            records.append(_record(candidate, settings, repeats))
    return _dataset(settings, records)


def cycled(repeats: Sequence[int], wanted: int) -> list[int]:
    """Repeats of each regularisation image: its own first, then one more each in turn, until the sum is `wanted`."""
    result, missing = [], wanted
    for number in repeats:
        result.append(min(number, missing))
        missing -= result[-1]
    if not result:
        return result
    rounds, rest = divmod(missing, len(result))
    return [number + rounds + (position < rest) for position, number in enumerate(result)]


def _validation(settings: DatasetSettings, candidates: list[_Candidate]) -> IndexedDataset:
    """The dataset as validated on: each image once, wildcards of its caption at their first choice."""
    records = [_record(candidate, settings, repeats=1) for candidate in candidates]
    for record in records:
        record.caption = first_choices(record.caption, settings.subsets[record.subset].captions)
    return _dataset(validation_settings(settings), records)


def _record(candidate: _Candidate, settings: DatasetSettings, repeats: int) -> ImageRecord:
    subset, found = settings.subsets[candidate.subset], candidate.found
    caption = found.text
    if not subset.captions.enable_wildcard and "\n" in caption:
        caption = caption[: caption.index("\n")]
    return ImageRecord(
        path=found.path,
        size=found.size,
        file_size=found.stamp[0],
        mtime_ns=found.stamp[1],
        caption=caption,
        subset=candidate.subset,
        bucket=candidate.fit.bucket,
        resized=candidate.fit.resized,
        mask_path=found.mask_path,
        repeats=repeats,
        is_reg=subset.is_reg,
        loss_weight=subset.loss_weight,
    )


def _dataset(settings: DatasetSettings, records: list[ImageRecord]) -> IndexedDataset:
    buckets: dict[Size, list[int]] = {}
    for number, record in enumerate(records):
        buckets.setdefault(record.bucket, []).append(number)
    return IndexedDataset(settings, records, dict(sorted(buckets.items())))


def _raise_or_warn(findings: _Findings, skip_bad_images: bool) -> None:
    """Raise all problems at once. Bad images are one of them, listed with their paths, or a warning if they are skipped."""
    problems = list(findings.problems)
    if findings.bad:
        listed = "".join(f"\n  {path}: {reason}" for path, reason in sorted(findings.bad.items()))
        if skip_bad_images:
            findings.warnings[f"{len(findings.bad)} files can't be used and are left out:{listed}"] = None
        else:
            problems.append(
                f"{len(findings.bad)} files can't be used; mend or remove them, or pass --skip_bad_images:{listed}"
            )
    if problems:
        raise UserError(problems)
