"""Images whose headers are in order and whose pixels are not: told in plain words, or left out where that is wanted."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from library.caching.latents import LatentCache, LatentCacheSettings
from library.common.errors import UserError
from library.data.batches import BatchPlan
from library.data.images import open_image, read_pixels
from library.data.loader import Loader, LoaderSettings
from tests.caching.test_caches import Encoders, datasets_of, filled_latents, filled_texts, folder_of_images
from tests.data.test_images import PLAIN, ramp, record

SETTINGS = LoaderSettings(seed=3, steps_per_epoch=4, accumulation=1, max_train_steps=40)


def damage(path: Path) -> None:
    """Change bytes amid the pixels: the header and the end stay as they are."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, of which 1.png is indexed but cannot be decoded."""
    damage(folder_of_images(tmp_path) / "2_thing" / "1.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_the_message_of_a_worker_is_the_message_of_the_run(folder: Path, workers: int):
    loader = Loader(BatchPlan(datasets_of(folder), seed=1), replace(SETTINGS, workers=workers))
    with pytest.raises(UserError) as told:
        list(loader.batches(0))
    (problem,) = told.value.problems
    assert problem.startswith(str(folder / "2_thing" / "1.png")) and "Traceback" not in problem


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_image_that_is_left_out_weighs_nothing_and_all_others_stay(folder: Path, cached: bool, on_disk: bool):
    datasets = datasets_of(folder, train_batch_size=2, alpha_mask=True)
    latents = texts = None
    if cached:
        latents = filled_latents(datasets, Encoders(), on_disk=on_disk, skip_bad_images=True)
        texts = filled_texts(datasets, Encoders(), on_disk=on_disk)
        assert latents.missing() == [] or on_disk
    plan = BatchPlan(datasets, seed=1)
    weights: dict[str, set[float]] = {}
    for batch in Loader(plan, replace(SETTINGS, skip_bad_images=True), latents, texts).batches(0):
        for place, (path, weight) in enumerate(zip(batch.paths, batch.loss_weights.tolist())):
            weights.setdefault(Path(path).name, set()).add(weight)
            pixels = batch.latents if cached else batch.images
            assert weight or not pixels[place].any() or not cached
    assert weights == {name: {float(name != "1.png")} for name in ("0.png", "1.png", "2.png", "3.png", "4.png")}


def test_nothing_is_tried_twice_and_nothing_trains_on_nothing(folder: Path):
    datasets, encoders = datasets_of(folder), Encoders()
    cache = filled_latents(datasets, encoders, on_disk=False, skip_bad_images=True)
    assert encoders.images == 4 and cache.missing() == []
    for number in (0, 2, 3, 4):
        damage(folder / "2_thing" / f"{number}.png")
    with pytest.raises(UserError) as told:
        filled_latents(datasets_of(folder), Encoders(), on_disk=False, skip_bad_images=True)
    assert len(told.value.problems) == 5


def test_processes_agree_on_what_is_left_out(folder: Path):
    """As the trainer does it: each its share, then all look again for what is missing."""
    caches = [
        LatentCache(datasets_of(folder), LatentCacheSettings("vae", on_disk=True, skip_bad_images=True)) for _ in "ab"
    ]
    missing = [cache.missing() for cache in caches]
    for rank, cache in enumerate(caches):
        cache.fill(cache.share(missing[rank], rank, 2), Encoders().encode_images, 2, lambda batches, title: batches)
    for cache in caches:
        cache.fill(cache.missing(), Encoders().encode_images, 2, lambda batches, title: batches)
        assert [number for number in range(5) if cache.is_damaged(0, number)] == [1] and cache.missing() == []


def test_an_image_that_changed_its_size_is_told_not_distorted(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(ramp(64, 128)).save(path)
    with pytest.raises(UserError, match="it is 64x128, but was 64x64"):
        read_pixels(record(path, (64, 64)), PLAIN, random.Random(0))


@pytest.mark.parametrize(
    ("extension", "mode"), [("png", "P"), ("jpg", "RGB"), ("webp", "RGBA"), ("bmp", "RGB"), ("avif", "RGB")]
)
def test_whatever_a_decoder_raises_is_the_users_error(tmp_path: Path, extension: str, mode: str):
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path, rng = tmp_path / f"a.{extension}", random.Random(1)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 4), dtype=np.uint8)).convert(mode).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(4):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.randrange(1, len(content))] if rng.random() < 0.3 else content)
        try:
            assert open_image(str(path)).mode in ("RGB", "RGBA", "L")
        except UserError:
            refused += 1
    assert refused > 10


def test_a_strip_of_an_image_is_cut_to_its_bucket(tmp_path: Path):
    path = tmp_path / "strip.png"
    Image.fromarray(np.tile(np.arange(30000) % 256, (20, 1)).astype(np.uint8)).save(path)
    pixels = read_pixels(record(path, (30000, 20), (64, 64), (96000, 64)), PLAIN, random.Random(0))
    assert pixels.image.shape == (64, 64, 3) and pixels.crop == ((96000 - 64) // 2, 0)


def test_a_damaged_mask_is_told_by_its_own_name(tmp_path: Path):
    picture, mask = tmp_path / "a.png", tmp_path / "mask.png"
    for path in (picture, mask):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    damage(mask)
    with pytest.raises(UserError, match=r"mask\.png"):
        read_pixels(record(picture, (64, 64), mask=mask), PLAIN, random.Random(0))


def test_an_image_that_is_left_out_does_not_change_the_others(folder: Path, tmp_path_factory):
    whole = folder_of_images(tmp_path_factory.mktemp("whole"))
    settings = replace(SETTINGS, skip_bad_images=True)
    for one, other in zip(*(Loader(BatchPlan(datasets_of(f), seed=1), settings).batches(0) for f in (folder, whole))):
        assert [Path(path).name for path in one.paths] == [Path(path).name for path in other.paths]
        for place, weight in enumerate(one.loss_weights.tolist()):
            assert torch.equal(one.images[place], other.images[place]) == bool(weight)
