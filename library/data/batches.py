"""Which images are trained together, and when: a function of the seed and the epoch alone.

A batch never mixes datasets or buckets. The order does not depend on workers, and the processes' shares are disjoint and
complete: process r of n takes batches r, r + n, …. Where the last round is short, a process gets a padding batch of weight
zero, so that all processes make the same number of steps.

Of an epoch only the order of its items and batches is in memory, four bytes each; what a batch is made of is worked out when
it is asked for. How many batches there are follows from the numbers of repeats alone.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

from library.data.dataset import IndexedDataset
from library.data.settings import Size

MAX_ITEMS = 100_000_000
"""Images of an epoch, repeats counted: their order takes four bytes each, and a minute to draw."""


@dataclass(frozen=True)
class BatchSpec:
    """What a batch is made of. items: (number of the record, which of its repeats)."""

    dataset: int
    bucket: Size
    items: tuple[tuple[int, int], ...]
    is_padding: bool = False  # of weight zero: only there to make as many batches as other processes


class BucketPlan:
    """The items of one bucket of a dataset by number: the repeats of its first image, of its second, and so on."""

    def __init__(self, number: int, dataset: IndexedDataset, bucket: Size):
        self.dataset, self.bucket, self.batch_size = number, bucket, dataset.settings.batch_size
        self.records = dataset.buckets[bucket]
        self.ends = list(accumulate(dataset.records[record].repeats for record in self.records))

    @property
    def items(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def batches(self) -> int:
        return -(-self.items // self.batch_size)

    def size(self, batch: int) -> int:
        """How many items a batch has."""
        return min(self.batch_size, self.items - batch * self.batch_size)

    def spec(self, batch: int, order: Sequence[int]) -> BatchSpec:
        start = batch * self.batch_size
        numbers = (order[place] for place in range(start, start + self.size(batch)))
        return BatchSpec(self.dataset, self.bucket, tuple(self._item(number) for number in numbers))

    def _item(self, number: int) -> tuple[int, int]:
        position = bisect_right(self.ends, number)
        return self.records[position], number - (self.ends[position - 1] if position else 0)


class Epoch(Sequence[BatchSpec]):
    """All batches of an epoch, for all processes together; each is made when it is asked for."""

    def __init__(self, buckets: Sequence[BucketPlan], rng: random.Random | None):
        """rng: shuffles the items of each bucket, then the batches; None leaves the order of the dataset."""
        self.buckets = buckets
        self.orders: list[Sequence[int]] = [_order(bucket.items, rng) for bucket in buckets]
        self.ends = list(accumulate(bucket.batches for bucket in buckets))
        self.order = _order(self.ends[-1] if self.ends else 0, rng)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> BatchSpec: ...

    @overload
    def __getitem__(self, index: slice) -> list[BatchSpec]: ...

    def __getitem__(self, index: int | slice) -> BatchSpec | list[BatchSpec]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        bucket, batch = self._locate(index)
        return self.buckets[bucket].spec(batch, self.orders[bucket])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def sizes(self) -> Iterator[int]:
        """The number of items of each batch."""
        for number in range(len(self)):
            bucket, batch = self._locate(number)
            yield self.buckets[bucket].size(batch)

    def _locate(self, index: int) -> tuple[int, int]:
        """The bucket of the epoch's batch, and the batch's number in it."""
        number = self.order[index]
        bucket = bisect_right(self.ends, number)
        return bucket, number - (self.ends[bucket - 1] if bucket else 0)


class Share(Sequence[BatchSpec]):
    """One process's batches of an epoch, padding included."""

    def __init__(self, epoch: Epoch, rank: int, world_size: int):
        self.epoch, self.numbers = epoch, range(rank, len(epoch), world_size)
        self.length = -(-len(epoch) // world_size)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> BatchSpec: ...

    @overload
    def __getitem__(self, index: slice) -> list[BatchSpec]: ...

    def __getitem__(self, index: int | slice) -> BatchSpec | list[BatchSpec]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(self.length)[index]  # IndexError beyond the end
        if number < len(self.numbers):
            return self.epoch[self.numbers[number]]
        last = self.epoch[-1]
        return BatchSpec(last.dataset, last.bucket, last.items[:1], is_padding=True)


class BatchPlan:
    def __init__(self, datasets: Sequence[IndexedDataset], seed: int, world_size: int = 1, shuffle: bool = True):
        self.datasets = list(datasets)
        self.seed, self.world_size, self.shuffle = seed, world_size, shuffle
        self.buckets = [BucketPlan(number, each, size) for number, each in enumerate(datasets) for size in each.buckets]
        self._epochs: dict[int, Epoch] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one process in one epoch, padding counted."""
        return -(-sum(bucket.batches for bucket in self.buckets) // self.world_size)

    @property
    def images_per_epoch(self) -> int:
        return sum(dataset.total_repeats for dataset in self.datasets)

    def epoch(self, epoch: int) -> Epoch:
        """All batches of an epoch, for all processes together."""
        if epoch not in self._epochs:
            rng = random.Random(f"{self.seed} batches {epoch}") if self.shuffle else None
            self._epochs = {epoch: Epoch(self.buckets, rng)}  # the newest alone is kept
        return self._epochs[epoch]

    def share(self, epoch: int, rank: int) -> Share:
        """One process's batches of an epoch, padding included."""
        return Share(self.epoch(epoch), rank, self.world_size)

    def samples(self, epoch: int) -> list[int]:
        """Images in each round of batches, summed over the processes; padding counts nothing."""
        sizes = list(self.epoch(epoch).sizes())
        return [sum(sizes[start : start + self.world_size]) for start in range(0, len(sizes), self.world_size)]


def length_problems(plan: BatchPlan) -> list[str]:
    """Why an epoch of the plan is too long to be drawn."""
    if plan.images_per_epoch <= MAX_ITEMS:
        return []
    return [
        f"An epoch would have {plan.images_per_epoch:,} images, repeats counted, and {MAX_ITEMS:,} is the most: its order is"
        " held in memory. Lower num_repeats, and raise --max_train_epochs instead."
    ]


def _order(length: int, rng: random.Random | None) -> Sequence[int]:
    """0 .. length - 1, shuffled by `rng` as a list of that many would be."""
    if rng is None:
        return range(length)
    numbers = array("I", range(length))
    rng.shuffle(numbers)
    return numbers
