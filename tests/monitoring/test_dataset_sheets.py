"""`--debug_dataset`: each bucket has its sheet, with crops, masks and captions as training gets them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.batches import BatchPlan
from library.data.loader import Loader, bucket_examples
from library.monitoring.dataset_sheets import CELL, GAP, PICTURES, write_dataset_sheets
from tests.caching.test_caches import datasets_of, folder_of_images
from tests.data.test_loading import CHANCE, SETTINGS, TWO_BUCKETS, equal


@pytest.mark.parametrize("processes", [1, 2])
def test_examples_are_the_very_batches_of_the_first_epoch(tmp_path: Path, processes: int):
    plan = BatchPlan(
        datasets_of(folder_of_images(tmp_path, 9), train_batch_size=2, **TWO_BUCKETS, **CHANCE), 1, processes
    )
    fed = [b for rank in range(processes) for b in Loader(plan, replace(SETTINGS, rank=rank)).batches(0)]
    found = list(bucket_examples(plan, SETTINGS, 5))
    assert {examples.bucket for examples in found} == set(plan.datasets[0].buckets)
    for examples in found:
        count = sum(len(batch.paths) for batch in examples.batches)
        assert 5 <= count <= 6 and {batch.size for batch in examples.batches} == {examples.bucket}
        assert all(any(equal(batch, other) for other in fed) for batch in examples.batches)


def test_each_bucket_has_its_sheet_and_captions_are_whole(tmp_path: Path):
    folder = folder_of_images(tmp_path / "data", 5)
    (folder / "2_thing" / "1.txt").write_text("\u732b" * 400, encoding="utf-8")
    plan = BatchPlan(datasets_of(folder, train_batch_size=3, **TWO_BUCKETS), seed=1)
    paths = write_dataset_sheets(bucket_examples(plan, SETTINGS, PICTURES), tmp_path / "out", "run")
    wanted = sorted(f"run-1-{w}x{h}.png" for w, h in plan.datasets[0].buckets)
    assert sorted(path.name for path in paths) == sorted([*wanted, "run-captions.txt"]) and len(wanted) == 2
    lines = (tmp_path / "out" / "run-captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10  # five images, twice each
    assert sum(line.endswith("\t" + "\u732b" * 400) for line in lines) == 2


def test_a_sheet_shows_the_crop_and_darkens_what_the_mask_leaves_out(tmp_path: Path):
    images = tmp_path / "1_a"
    images.mkdir()
    pixels = np.full((64, 128, 4), 255, dtype=np.uint8)
    pixels[:, :64, 1:3] = 0  # red, then white; only the middle is kept
    pixels[:32, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(images / "0.png")
    plan = BatchPlan(datasets_of(tmp_path, enable_bucket=False, alpha_mask=True), seed=1)
    path = write_dataset_sheets(bucket_examples(plan, SETTINGS, PICTURES), tmp_path / "out", "run")[0]
    with Image.open(path) as sheet:
        at = {
            (x, y): sheet.convert("RGB").getpixel((GAP + x * CELL // 4, GAP + y * CELL // 4))
            for x in (1, 3)
            for y in (1, 3)
        }
    assert at[1, 3][0] > 240 and at[1, 3][1] < 15  # red, counted
    assert min(at[3, 3]) > 240  # white, counted
    assert 40 < at[3, 1][0] < 70 and at[1, 1][0] < 70  # darkened
