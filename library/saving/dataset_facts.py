"""What a LoRA file records about its datasets, in sd-scripts' structure: WebUI and Civitai read trigger words from it.

Regularisation images are counted but their captions are left out, as there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from library.data.dataset import DatasetIndex, ImageRecord, IndexedDataset
from library.data.settings import SubsetSettings

TagFrequency = dict[str, dict[str, int]]
T = TypeVar("T")


def facts_of_datasets(index: DatasetIndex, batches_per_step: int | None) -> dict[str, object]:
    """All ss_ facts of a run's datasets.

    batches_per_step: processes * accumulation, for a dataset given on the command line; None: with --dataset_config.
    """
    subsets = [subset for dataset in index.training for subset in dataset.settings.subsets]
    captions = [subset.captions for subset in subsets]
    facts: dict[str, object] = {
        "ss_num_train_images": sum(images(dataset, regularisation=False) for dataset in index.training),
        "ss_num_reg_images": sum(images(dataset, regularisation=True) for dataset in index.training),
        "ss_num_validation_images": sum(len(dataset.records) for dataset in index.validation),
        "ss_caption_dropout_rate": common([caption.caption_dropout_rate for caption in captions]),
        "ss_caption_dropout_every_n_epochs": common([c.caption_dropout_every_n_epochs for c in captions]),
        "ss_caption_tag_dropout_rate": common([caption.caption_tag_dropout_rate for caption in captions]),
        "ss_face_crop_aug_range": common([subset.face_crop_aug_range for subset in subsets]),
        "ss_resize_interpolation": common([subset.resize_interpolation for subset in subsets]),
    }
    if batches_per_step is None:
        return facts | datasets_of_file(index.training)
    return facts | dataset_of_command_line(index.training[0], batches_per_step)


def datasets_of_file(datasets: Sequence[IndexedDataset]) -> dict[str, object]:
    """ss_datasets, ss_tag_frequency and ss_dataset_dirs of a run with --dataset_config. With one dataset, its resolution
    and buckets are recorded on their own as well, where the WebUI looks for them."""
    frequencies: TagFrequency = {}
    for dataset in datasets:
        for name, tags in tag_frequency(dataset).items():
            frequencies.setdefault(name, tags)  # a folder that several datasets share counts once
    facts: dict[str, object] = {
        "ss_datasets": [dataset_facts(dataset) for dataset in datasets],
        "ss_tag_frequency": frequencies,
        "ss_dataset_dirs": folders(datasets, regularisation=False),
    }
    if len(datasets) == 1:
        facts |= {"ss_resolution": datasets[0].settings.resolution, "ss_bucket_info": bucket_info(datasets[0])}
    return facts


def dataset_of_command_line(dataset: IndexedDataset, batches_per_step: int) -> dict[str, object]:
    """The keys of a run whose dataset is on the command line. batches_per_step: processes * accumulation."""
    settings, subset = dataset.settings, dataset.settings.subsets[0]
    return {
        "ss_batch_size_per_device": settings.batch_size,
        "ss_total_batch_size": settings.batch_size * batches_per_step,
        "ss_resolution": settings.resolution,
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.captions.shuffle_caption,
        "ss_enable_bucket": settings.enable_bucket,
        "ss_bucket_no_upscale": settings.bucket_no_upscale,
        "ss_min_bucket_reso": settings.min_bucket_reso,
        "ss_max_bucket_reso": settings.max_bucket_reso,
        "ss_keep_tokens": subset.captions.keep_tokens,
        "ss_dataset_dirs": folders([dataset], regularisation=False),
        "ss_reg_dataset_dirs": folders([dataset], regularisation=True),
        "ss_tag_frequency": tag_frequency(dataset),
        "ss_bucket_info": bucket_info(dataset) or {},
    }


def dataset_facts(dataset: IndexedDataset) -> dict[str, object]:
    """One entry of ss_datasets."""
    settings = dataset.settings
    return {
        "is_dreambooth": all(subset.style != "metadata" for subset in settings.subsets),
        "batch_size_per_device": settings.batch_size,
        "num_train_images": images(dataset, regularisation=False),
        "num_reg_images": images(dataset, regularisation=True),
        "resolution": list(settings.resolution),
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": settings.min_bucket_reso,
        "max_bucket_reso": settings.max_bucket_reso,
        "tag_frequency": tag_frequency(dataset),
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": settings.subsets[0].resize_interpolation,
        "network_multiplier": settings.network_multiplier,
        "subsets": [_subset_facts(dataset, number) for number in range(len(settings.subsets))],
    }


def images(dataset: IndexedDataset, regularisation: bool) -> int:
    """Images of an epoch, repeats counted."""
    return sum(record.repeats for record in dataset.records if record.is_reg == regularisation)


def tag_frequency(dataset: IndexedDataset) -> TagFrequency:
    """{folder or metadata file: {tag: captions that hold it}}; tags are separated by commas, in lower case."""
    counters: dict[str, Counter[str]] = {}
    for number, subset in enumerate(dataset.settings.subsets):
        records = [record for record in _records(dataset, number) if not record.is_reg]
        if records:
            counter = counters.setdefault(_name(subset), Counter())
            for record in records:
                for line in record.caption.split("\n"):
                    counter.update(tag.strip().lower() for tag in line.split(",") if tag.strip())
    return {name: dict(counter) for name, counter in counters.items()}


def with_commonest_tags(facts: Mapping[str, object], most: int) -> dict[str, object]:
    """The facts of a run with no more than `most` tags of each folder, wherever tags are counted."""

    def cut(frequencies: TagFrequency) -> TagFrequency:
        return {name: dict(Counter(tags).most_common(most)) for name, tags in frequencies.items()}

    shortened = dict(facts)
    if "ss_tag_frequency" in facts:
        shortened["ss_tag_frequency"] = cut(cast(TagFrequency, facts["ss_tag_frequency"]))
    if "ss_datasets" in facts:
        datasets = cast("list[dict[str, object]]", facts["ss_datasets"])
        shortened["ss_datasets"] = [
            {**d, "tag_frequency": cut(cast(TagFrequency, d["tag_frequency"]))} for d in datasets
        ]
    return shortened


def bucket_info(dataset: IndexedDataset) -> dict[str, object] | None:
    """Buckets with their images, repeats counted, and the mean error of the aspect ratio; None without bucketing."""
    if not dataset.settings.enable_bucket:
        return None
    errors = [abs(r.bucket[0] / r.bucket[1] - r.size[0] / r.size[1]) for r in dataset.records]
    counted = [
        (list(size), sum(dataset.records[number].repeats for number in numbers))
        for size, numbers in dataset.buckets.items()
    ]
    return {
        "buckets": {str(n): {"resolution": size, "count": count} for n, (size, count) in enumerate(counted)},
        "mean_img_ar_error": sum(errors) / max(1, len(errors)),
    }


def folders(datasets: Sequence[IndexedDataset], regularisation: bool) -> dict[str, dict[str, int]]:
    """{folder or metadata file: {"n_repeats", "img_count"}}; a repeated name gets " (2)"."""
    by_name: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for number, subset in enumerate(dataset.settings.subsets):
            if subset.is_reg == regularisation:
                name, count = _name(subset), 1
                while name in by_name:
                    count += 1
                    name = f"{_name(subset)} ({count})"
                by_name[name] = {"n_repeats": subset.num_repeats, "img_count": len(_records(dataset, number))}
    return by_name


def common(values: Sequence[T]) -> T | list[T]:
    """The value that all of them are, or the list of all."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _subset_facts(dataset: IndexedDataset, number: int) -> dict[str, object]:
    subset = dataset.settings.subsets[number]
    captions = subset.captions
    facts: dict[str, object] = {
        "img_count": len(_records(dataset, number)),
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "caption_dropout_rate": captions.caption_dropout_rate,
        "caption_tag_dropout_rate": captions.caption_tag_dropout_rate,
        "alpha_mask": subset.alpha_mask,
        "loss_weight": subset.loss_weight,
    }
    if subset.image_dir is not None:
        facts["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        facts["metadata_file"] = subset.metadata_file.name
    else:
        facts |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return facts


def _records(dataset: IndexedDataset, subset: int) -> list[ImageRecord]:
    return [record for record in dataset.records if record.subset == subset]


def _name(subset: SubsetSettings) -> str:
    """The name of a subset in the metadata: the last part of its path, so that no folders of the user are published."""
    path: Path | None = subset.metadata_file or subset.image_dir
    return subset.name if path is None else path.name
