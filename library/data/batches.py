"""Which images are trained together, and when: a function of the seed and the epoch alone.

A batch never mixes datasets or buckets. The order does not depend on workers, and the processes' shares are disjoint and
complete: process r of n takes batches r, r + n, …. Where the last round is short, a process gets a padding batch of weight
zero, so that all processes make the same number of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from library.data.dataset import IndexedDataset
from library.data.settings import Size


@dataclass(frozen=True)
class BatchSpec:
    """What a batch is made of. items: (number of the record, which of its repeats)."""

    dataset: int
    bucket: Size
    items: tuple[tuple[int, int], ...]
    is_padding: bool = False  # of weight zero: only there to make as many batches as other processes


class BatchPlan:
    def __init__(self, datasets: Sequence[IndexedDataset], seed: int, world_size: int = 1, shuffle: bool = True):
        self.datasets = list(datasets)
        self.seed, self.world_size, self.shuffle = seed, world_size, shuffle
        self._epochs: dict[int, list[BatchSpec]] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one process in one epoch, padding counted."""
        return -(-len(self.epoch(0)) // self.world_size)

    @property
    def images_per_epoch(self) -> int:
        return sum(dataset.total_repeats for dataset in self.datasets)

    def epoch(self, epoch: int) -> list[BatchSpec]:
        """All batches of an epoch, for all processes together."""
        if epoch not in self._epochs:
            self._epochs = {epoch: self._make(epoch)}  # the newest alone is kept
        return self._epochs[epoch]

    def share(self, epoch: int, rank: int) -> list[BatchSpec]:
        """One process's batches of an epoch, padding included."""
        batches = self.epoch(epoch)
        own = batches[rank :: self.world_size]
        if len(own) < self.batches_per_epoch:
            last = batches[-1]
            own.append(BatchSpec(last.dataset, last.bucket, last.items[:1], is_padding=True))
        return own

    def samples(self, epoch: int) -> list[int]:
        """Images in each round of batches, summed over the processes; padding counts nothing."""
        sizes = [len(batch.items) for batch in self.epoch(epoch)]
        return [sum(sizes[start : start + self.world_size]) for start in range(0, len(sizes), self.world_size)]

    def _make(self, epoch: int) -> list[BatchSpec]:
        rng = random.Random(f"{self.seed} batches {epoch}")
        batches = []
        for number, dataset in enumerate(self.datasets):
            size = dataset.settings.batch_size
            for bucket, records in dataset.buckets.items():
                items = [(record, repeat) for record in records for repeat in range(dataset.records[record].repeats)]
                if self.shuffle:
                    rng.shuffle(items)
                batches += [
                    BatchSpec(number, bucket, tuple(items[start : start + size]))
                    for start in range(0, len(items), size)
                ]
        if self.shuffle:
            rng.shuffle(batches)
        return batches
