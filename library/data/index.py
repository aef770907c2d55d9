"""The index of all datasets: which images there are, how large, with which captions and in which buckets."""

from __future__ import annotations

from library.data.records import DatasetIndex, ImageRecord, IndexedDataset

__all__ = ["DatasetIndex", "ImageRecord", "IndexedDataset"]
