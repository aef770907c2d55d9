"""Several processes fill one cache: nobody writes before all have looked, and nothing is made twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.caching.fill import fill_latents
from library.caching.latents import LatentCache, LatentCacheSettings
from tests.caching.test_caches import Encoders, datasets_of, folder_of_images

PROCESSES = 3


class LateCache(LatentCache):
    """One whose process is slow to look at the files."""

    def missing(self):
        time.sleep(0.2)
        return super().missing()


def process(rank: int, barrier: threading.Barrier) -> SimpleNamespace:
    """One of several; they are threads here."""
    return SimpleNamespace(process_index=rank, num_processes=PROCESSES, wait_for_everyone=lambda: barrier.wait(20))


def fill_together(caches: list[LatentCache]) -> list[int]:
    """Every process fills its cache; how many images each of them encoded."""
    encoders = [Encoders() for _ in caches]
    barrier = threading.Barrier(PROCESSES)

    def fill(rank: int) -> None:
        fill_latents(caches[rank], encoders[rank].encode_images, 1, no_bar, process(rank, barrier))

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(fill, range(PROCESSES)))
    return [encoder.images for encoder in encoders]


def no_bar(batches: Sequence[Any], title: str) -> Sequence[Any]:
    return batches


@pytest.mark.parametrize("on_disk", [True, False])
def test_processes_share_files_and_fill_memory_of_their_own(tmp_path: Path, on_disk: bool):
    datasets = datasets_of(folder_of_images(tmp_path, 10))
    settings = LatentCacheSettings("vae", on_disk=on_disk)
    caches = [(LatentCache if rank == 0 else LateCache)(datasets, settings) for rank in range(PROCESSES)]
    assert fill_together(caches) == ([4, 3, 3] if on_disk else [10, 10, 10])
    assert all(cache.missing() == [] for cache in caches)


def test_machines_without_a_common_disk_each_make_the_whole_cache(tmp_path: Path):
    folders = [folder_of_images(tmp_path / str(rank), 10) for rank in range(PROCESSES)]
    caches = [LatentCache(datasets_of(folder), LatentCacheSettings("vae", on_disk=True)) for folder in folders]
    assert fill_together(caches) == [10, 10, 10]
    assert all(cache.missing() == [] for cache in caches)
