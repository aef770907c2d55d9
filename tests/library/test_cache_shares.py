"""Several processes fill one cache: nobody writes before all have looked, and nothing is made twice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.data.latent_cache import LatentCache, LatentCacheSettings
from library.sd3_trainer import Sd3NetworkTrainer
from tests.data.test_caches import Encoders, datasets_of, folder_of_images

PROCESSES = 3


class LateCache(LatentCache):
    """One whose process is slow to look at the files."""

    def missing(self):
        time.sleep(0.2)
        return super().missing()


def trainer(rank: int, barrier: threading.Barrier, encoders: Encoders) -> Sd3NetworkTrainer:
    """One of several, as far as filling caches goes; processes are threads here."""
    made = Sd3NetworkTrainer.__new__(Sd3NetworkTrainer)
    made.accelerator = SimpleNamespace(
        process_index=rank,
        num_processes=PROCESSES,
        is_main_process=rank == 0,
        wait_for_everyone=lambda: barrier.wait(20),
    )
    made.args = SimpleNamespace(vae_batch_size=1)
    made.device, made.vae = torch.device("cpu"), object()
    made.encode_images = encoders.encode_images
    return made


@pytest.mark.parametrize("on_disk", [True, False])
def test_processes_share_files_and_fill_memory_of_their_own(tmp_path: Path, on_disk: bool):
    datasets = datasets_of(folder_of_images(tmp_path, 10))
    settings = LatentCacheSettings("vae", on_disk=on_disk)
    caches = [(LatentCache if rank == 0 else LateCache)(datasets, settings) for rank in range(PROCESSES)]
    encoders = [Encoders() for _ in caches]
    barrier = threading.Barrier(PROCESSES)
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(
            pool.map(lambda rank: trainer(rank, barrier, encoders[rank])._fill_latents(caches[rank]), range(PROCESSES))
        )
    assert [encoder.images for encoder in encoders] == ([4, 3, 3] if on_disk else [10, 10, 10])
    assert all(cache.missing() == [] for cache in caches)


def test_machines_without_a_common_disk_each_make_the_whole_cache(tmp_path: Path):
    folders = [folder_of_images(tmp_path / str(rank), 10) for rank in range(PROCESSES)]
    caches = [LatentCache(datasets_of(folder), LatentCacheSettings("vae", on_disk=True)) for folder in folders]
    encoders = [Encoders() for _ in caches]
    barrier = threading.Barrier(PROCESSES)
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(
            pool.map(lambda rank: trainer(rank, barrier, encoders[rank])._fill_latents(caches[rank]), range(PROCESSES))
        )
    assert [encoder.images for encoder in encoders] == [10, 10, 10]
    assert all(cache.missing() == [] for cache in caches)
