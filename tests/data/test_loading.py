"""Batches: a function of seed and epoch alone, whole and disjoint over processes, the same for any number of workers."""

from __future__ import annotations

import pickle
import random
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from library.data.batch import Batch
from library.data.batches import MAX_ITEMS, BatchPlan, BatchSpec, length_problems
from library.data.dataset import ImageRecord, IndexedDataset
from library.data.loader import BatchReader, Loader, LoaderSettings
from library.data.settings import DatasetSettings, SubsetSettings
from tests.caching.test_caches import Encoders, datasets_of, filled_latents, filled_texts, folder_of_images

SETTINGS = LoaderSettings(seed=3, steps_per_epoch=4, accumulation=1, max_train_steps=40)
TWO_BUCKETS = {"resolution": "96", "min_bucket_reso": 32}  # for folder_of_images
CHANCE = {
    "flip_aug": True,
    "color_aug": True,
    "random_crop": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.3,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of_images(tmp_path, 7)


def equal(a: Batch, b: Batch) -> bool:
    def same(x, y) -> bool:
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        return x == y

    return all(same(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_every_image_comes_as_often_as_its_repeats_and_no_batch_mixes_buckets(folder: Path):
    datasets = datasets_of(folder, train_batch_size=3, **TWO_BUCKETS)
    assert len(datasets[0].buckets) == 2
    plan = BatchPlan(datasets, seed=1)
    seen = Counter(record for spec in plan.epoch(0) for record, _ in spec.items)
    assert seen == dict.fromkeys(range(7), 2)
    for spec in plan.epoch(0):
        assert {datasets[0].records[number].bucket for number, _ in spec.items} == {spec.bucket}
        assert 1 <= len(spec.items) <= 3
    assert plan.images_per_epoch == sum(plan.samples(0)) == 14


def test_epochs_differ_and_each_is_the_same_every_time(folder: Path):
    a, b = (BatchPlan(datasets_of(folder, train_batch_size=2), seed=1) for _ in range(2))
    assert a.epoch(3) == b.epoch(3) and a.epoch(0) != a.epoch(1)
    assert a.epoch(3) == b.epoch(3)
    assert BatchPlan(a.datasets, seed=2).epoch(0) != a.epoch(0)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_the_processes_shares_are_disjoint_complete_and_equally_long(folder: Path, processes: int):
    plan = BatchPlan(datasets_of(folder, train_batch_size=2, **TWO_BUCKETS), seed=1, world_size=processes)
    shares = [plan.share(0, rank) for rank in range(processes)]
    assert {len(share) for share in shares} == {plan.batches_per_epoch}
    items = [item for share in shares for spec in share if not spec.is_padding for item in spec.items]
    assert len(items) == len(set(items)) == 14
    rounds = [
        sum(len(share[i].items) for share in shares if not share[i].is_padding) for i in range(plan.batches_per_epoch)
    ]
    assert rounds == plan.samples(0)


@given(
    buckets=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    processes=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_plan_is_whole_unmixed_and_evenly_shared(buckets, batch_size: int, processes: int, seed: int):
    """buckets: the repeats of each image in each bucket, as one dataset and once more as another."""
    repeats = [count for bucket in buckets for count in bucket]
    sizes = [(64, 64 + 16 * number) for number, bucket in enumerate(buckets) for _ in bucket]
    records = [
        ImageRecord(f"/{n}", size, 1, 1, "", 0, size, size, None, count, False, 1.0)
        for n, (size, count) in enumerate(zip(sizes, repeats))
    ]
    by_size = {size: [n for n, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
    dataset = IndexedDataset(DatasetSettings("d", (SubsetSettings("s"),), (64, 64), batch_size), records, by_size)
    plan = BatchPlan([dataset, dataset], seed, processes)
    shares = [plan.share(2, rank) for rank in range(processes)]
    assert {len(share) for share in shares} == {plan.batches_per_epoch}
    whole = [spec for share in shares for spec in share if not spec.is_padding]
    assert sum(len(share) for share in shares) - len(whole) < processes
    items = Counter((spec.dataset, record) for spec in whole for record, _ in spec.items)
    assert items == {(d, n): count for d in range(2) for n, count in enumerate(repeats)}
    assert all({sizes[n] for n, _ in spec.items} == {spec.bucket} and len(spec.items) <= batch_size for spec in whole)
    assert sum(plan.samples(2)) == plan.images_per_epoch == 2 * sum(repeats)


def rows_of_an_epoch(datasets: list[IndexedDataset], seed: int, epoch: int) -> list[BatchSpec]:
    """The order of an epoch with a row for each repeat, as first released: states of earlier runs depend on it."""
    rng = random.Random(f"{seed} batches {epoch}")
    batches = []
    for number, dataset in enumerate(datasets):
        size = dataset.settings.batch_size
        for bucket, records in dataset.buckets.items():
            items = [(record, repeat) for record in records for repeat in range(dataset.records[record].repeats)]
            rng.shuffle(items)
            batches += [
                BatchSpec(number, bucket, tuple(items[start : start + size])) for start in range(0, len(items), size)
            ]
    rng.shuffle(batches)
    return batches


@given(
    repeats=st.lists(st.integers(1, 7), min_size=1, max_size=9), batch_size=st.integers(1, 4), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_the_order_is_that_of_a_list_with_a_row_for_each_repeat(repeats: list[int], batch_size: int, seed: int):
    sizes = [(64, 64 + 16 * (number % 3)) for number in range(len(repeats))]
    records = [
        ImageRecord(f"/{n}", size, 1, 1, "", 0, size, size, None, count, False, 1.0)
        for n, (size, count) in enumerate(zip(sizes, repeats))
    ]
    by_size = {size: [n for n, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
    dataset = IndexedDataset(DatasetSettings("d", (SubsetSettings("s"),), (64, 64), batch_size), records, by_size)
    for epoch in range(3):
        assert list(BatchPlan([dataset, dataset], seed).epoch(epoch)) == rows_of_an_epoch([dataset] * 2, seed, epoch)


def test_millions_of_repeats_take_no_row_each():
    record = ImageRecord("/a", (64, 64), 1, 1, "", 0, (64, 64), (64, 64), None, 50_000_000, False, 1.0)
    many = IndexedDataset(DatasetSettings("d", (SubsetSettings("s"),), (64, 64)), [record], {(64, 64): [0]})
    tracemalloc.start()
    assert BatchPlan([many], 1).batches_per_epoch == 50_000_000
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    record.repeats = 200_000
    epoch = BatchPlan([many], 1).epoch(0)
    assert sys.getsizeof(epoch.order) + sys.getsizeof(epoch.orders[0]) < 2e6
    assert len({item for spec in epoch[:500] for item in spec.items}) == 500
    record.repeats = MAX_ITEMS + 1
    (problem,) = length_problems(BatchPlan([many], 1))
    assert "Lower num_repeats" in problem


def test_a_filler_weighs_nothing(folder: Path):
    plan = BatchPlan(datasets_of(folder, train_batch_size=4), seed=1, world_size=3)
    rank = next(r for r in range(3) if plan.share(0, r)[-1].is_padding)
    last = list(Loader(plan, replace(SETTINGS, rank=rank)).batches(0))[-1]
    assert last.loss_weights.tolist() == [0.0]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(folder: Path, workers: int):
    plan = BatchPlan(datasets_of(folder, train_batch_size=2, **TWO_BUCKETS, **CHANCE), seed=1)
    alone = list(Loader(plan, SETTINGS).batches(1))
    many = list(Loader(plan, replace(SETTINGS, workers=workers, persistent=True)).batches(1))
    assert len(alone) == len(many) and all(equal(a, b) for a, b in zip(alone, many))


def test_it_goes_on_at_any_batch(folder: Path):
    plan = BatchPlan(datasets_of(folder, train_batch_size=2, **TWO_BUCKETS, **CHANCE), seed=1)
    whole = list(Loader(plan, SETTINGS).batches(2))
    for start in range(len(whole)):
        rest = list(Loader(plan, SETTINGS).batches(2, start))
        assert len(rest) == len(whole) - start and all(equal(a, b) for a, b in zip(whole[start:], rest))


def test_chance_differs_between_epochs_and_repeats(folder: Path):
    plan = BatchPlan(datasets_of(folder, train_batch_size=1, shuffle_caption=True), seed=1)
    captions = {
        caption for epoch in range(4) for batch in Loader(plan, SETTINGS).batches(epoch) for caption in batch.captions
    }
    assert len(captions) > 6


def test_caches_are_read_with_their_flips_masks_and_dropped_captions(folder: Path):
    datasets = datasets_of(folder, train_batch_size=2, flip_aug=True, alpha_mask=True, caption_dropout_rate=0.5)
    encoders = Encoders()
    latents, texts = filled_latents(datasets, encoders), filled_texts(datasets, encoders)
    loader = Loader(BatchPlan(datasets, seed=1), SETTINGS, latents, texts)
    dropped = flipped = 0
    for epoch in range(4):
        for batch in loader.batches(epoch):
            assert batch.images is None and batch.mask.shape == (len(batch.paths), 1, *batch.latents.shape[2:])
            for index, path in enumerate(batch.paths):
                number = next(n for n, r in enumerate(datasets[0].records) if r.path == path)
                is_flipped = torch.equal(batch.latents[index], latents.get(0, number, True)[0])
                wanted, mask = latents.get(0, number, is_flipped)
                assert torch.equal(batch.latents[index], wanted) and torch.equal(batch.mask[index], mask)
                assert batch.text["clip_l"][index, 0, 0] == len(batch.captions[index])
                flipped += is_flipped
                dropped += batch.captions[index] == ""
    assert 10 < flipped < 46 and 10 < dropped < 46


@pytest.mark.parametrize(
    ("latents_on_disk", "texts_on_disk", "workers"),
    [(None, None, 2), (True, None, 2), (False, None, 0), (False, False, 0), (False, True, 2), (None, False, 2)],
)
def test_workers_are_started_only_where_something_is_to_be_read(folder: Path, latents_on_disk, texts_on_disk, workers):
    datasets = datasets_of(folder)
    latents = None if latents_on_disk is None else filled_latents(datasets, Encoders(), on_disk=latents_on_disk)
    texts = None if texts_on_disk is None else filled_texts(datasets, Encoders(), on_disk=texts_on_disk)
    loader = Loader(BatchPlan(datasets, seed=1), replace(SETTINGS, workers=2), latents, texts)
    assert loader.loader.num_workers == workers


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_reader_with_caches_can_be_sent_to_a_spawned_worker(folder: Path, on_disk: bool):
    """As Windows and macOS do."""
    datasets = datasets_of(folder, flip_aug=True)
    caches = [fill(datasets, Encoders(), on_disk=on_disk) for fill in (filled_latents, filled_texts)]
    reader = BatchReader(datasets, SETTINGS, *caches)
    copy = pickle.loads(pickle.dumps(reader))
    place = (0, 0, BatchPlan(datasets, seed=1).epoch(0)[0])
    assert equal(reader.read(place), copy.read(place))


def test_settings_of_a_dataset_reach_the_batch(tmp_path: Path):
    from library.data.command_line import CommandLineData
    from library.data.config import read_datasets
    from library.data.index import build_index

    folder_of_images(tmp_path, 2)
    path = tmp_path / "d.toml"
    path.write_text(
        f"""
[[datasets]]
resolution = 64
network_multiplier = 0.5
  [[datasets.subsets]]
  image_dir = {str(tmp_path / "2_thing")!r}
  caption_extension = ".txt"
  custom_attributes = {{ diff_output_preservation = true }}
""",
        encoding="utf-8",
    )
    datasets = build_index(read_datasets(str(path), CommandLineData())).training
    batch = next(iter(Loader(BatchPlan(datasets, seed=1), SETTINGS).batches(0)))
    assert batch.network_multiplier == 0.5 and batch.preserve.tolist() == [True]
    assert batch.images.shape == (1, 3, 64, 64) and -1 <= batch.images.min() < batch.images.max() <= 1
