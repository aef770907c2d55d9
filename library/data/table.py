"""The index as a table for people: what each bucket holds and how many batches come of it."""

from __future__ import annotations

from library.data.records import DatasetIndex, IndexedDataset

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
