"""Samples of every bucket exactly as training will get them, for a look before training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.data.batches import BatchPlan
from library.data.loader import Batch, BatchReader, LoaderSettings, Place
from library.data.settings import Size


@dataclass(frozen=True)
class BucketExamples:
    """The first batches of a bucket in the first epoch."""

    dataset: int  # its number in the plan
    bucket: Size
    batches: list[Batch]  # with images


def bucket_examples(plan: BatchPlan, settings: LoaderSettings, images: int) -> Iterator[BucketExamples]:
    """For each bucket of each dataset its first batches, until they hold `images` images; one bucket in memory at a time."""
    reader = BatchReader(plan.datasets, settings, None, None)
    places: dict[tuple[int, Size], list[Place]] = {}
    counts: dict[tuple[int, Size], int] = {}
    for rank in range(plan.world_size):
        for number, spec in enumerate(plan.share(0, rank)):
            key = spec.dataset, spec.bucket
            if not spec.filler and counts.get(key, 0) < images:
                places.setdefault(key, []).append((0, number, spec))
                counts[key] = counts.get(key, 0) + len(spec.items)
    for (dataset, bucket), chosen in sorted(places.items()):
        yield BucketExamples(dataset, bucket, [reader.read(place) for place in chosen])
