"""Caches: made once, found again, made anew when what they were made from has changed, whole whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from library.caching import latent_entry
from library.caching.latent_entry import posterior_noise
from library.caching.latents import LatentCache, LatentCacheSettings
from library.caching.text import TextCache, TextCacheSettings, check_cacheable
from library.common import files as common_files
from library.common.errors import UserError
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.data.dataset import IndexedDataset
from library.data.images import shrink_mask
from library.data.index import build_index


def folder_of_images(folder: Path, count: int = 5) -> Path:
    images = folder / "2_thing"
    images.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(count):
        pixels = rng.integers(0, 255, (64 + 32 * (number % 2), 64, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"thing {number % 2}, a, b", encoding="utf-8")
    return folder


def datasets_of(folder: Path, **changes) -> list[IndexedDataset]:
    chosen = {
        "resolution": "64",
        "caption_extension": ".txt",
        "enable_bucket": True,
        "bucket_reso_steps": 32,
        **changes,
    }
    return build_index(
        read_datasets(None, CommandLineData.from_options({"train_data_dir": str(folder), **chosen}))
    ).training


class Encoders:
    """Counting stand-ins: latents are the image's means, text outputs its length."""

    def __init__(self) -> None:
        self.images, self.texts, self.fail_after = 0, [], 10**9

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        if self.images > self.fail_after:
            raise KeyboardInterrupt
        small = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)
        return small.expand(-1, 16, -1, -1) + 0.1 * noise

    def encode_texts(self, texts) -> list[dict[str, torch.Tensor]]:
        self.texts += texts
        return [
            {"clip_l": torch.full((2, 3), float(len(text))), "t5": torch.tensor([hash(text) % 97.0])} for text in texts
        ]


def filled_latents(datasets, encoders: Encoders, batch_size: int = 2, **settings) -> LatentCache:
    cache = LatentCache(datasets, LatentCacheSettings(**{"fingerprint": "vae", "on_disk": True, **settings}))
    cache.fill(cache.missing(), encoders.encode_images, batch_size, lambda batches, title: batches)
    return cache


def filled_texts(datasets, encoders: Encoders, extra_prompts=(), **settings) -> TextCache:
    cache = TextCache(datasets, TextCacheSettings(**{"fingerprint": "te", "on_disk": True, **settings}), extra_prompts)
    cache.fill(cache.missing(), encoders.encode_texts)
    return cache


@pytest.mark.parametrize("on_disk", [False, True])
def test_latents_are_made_once_and_are_of_the_image_alone(tmp_path: Path, on_disk: bool):
    datasets = datasets_of(folder_of_images(tmp_path), flip_aug=True, alpha_mask=True)
    encoders = Encoders()
    cache = filled_latents(datasets, encoders, on_disk=on_disk, cache_dir=tmp_path / "cache")
    assert encoders.images == 10 and cache.missing() == []
    other = filled_latents(datasets, Encoders(), batch_size=5, on_disk=False)  # other batches, the same draws
    for number, record in enumerate(datasets[0].records):
        for flipped in (False, True):
            latents, mask = cache.get(0, number, flipped)
            assert torch.equal(latents, other.get(0, number, flipped)[0])
            assert latents.shape == (16, record.bucket[1] // 8, record.bucket[0] // 8)
            assert mask is not None and mask.shape == (1, *latents.shape[1:])
        assert torch.equal(cache.get(0, number, True)[1], cache.get(0, number, False)[1].flip(-1))


def test_a_second_run_finds_the_files_and_makes_nothing(tmp_path: Path):
    datasets = datasets_of(folder_of_images(tmp_path), caption_dropout_rate=0.5)
    encoders = Encoders()
    filled_latents(datasets, encoders)
    filled_texts(datasets, encoders, extra_prompts=["a prompt"])
    again = Encoders()
    latents, texts = filled_latents(datasets, again), filled_texts(datasets, again, extra_prompts=["a prompt"])
    assert again.images == 0 and again.texts == []
    assert latents.get(0, 0, False)[0].shape[0] == 16
    assert texts.get(0, 0, 0, dropped=True)[0] == ""  # the empty caption is in a file of its own
    assert torch.equal(texts.of_text("a prompt")["clip_l"], torch.full((2, 3), 8.0))


def test_each_distinct_caption_is_encoded_once(tmp_path: Path):
    encoders = Encoders()
    filled_texts(datasets_of(folder_of_images(tmp_path, 9)), encoders)
    assert sorted(encoders.texts) == ["thing 0, a, b", "thing 1, a, b"]


def change_image(folder: Path) -> None:
    path = folder / "2_thing" / "0.png"
    Image.fromarray(np.zeros((64, 64, 4), dtype=np.uint8), "RGBA").save(path)
    os.utime(path, ns=(1, 1))


def test_a_replaced_image_another_vae_or_another_crop_is_stale(tmp_path: Path):
    folder = folder_of_images(tmp_path)
    filled_latents(datasets_of(folder), Encoders())
    assert len(LatentCache(datasets_of(folder), LatentCacheSettings("another", on_disk=True)).missing()) == 5
    assert len(LatentCache(datasets_of(folder, flip_aug=True), LatentCacheSettings("vae", on_disk=True)).missing()) == 5
    assert (
        len(LatentCache(datasets_of(folder, alpha_mask=True), LatentCacheSettings("vae", on_disk=True)).missing()) == 5
    )
    changed = datasets_of(folder, resize_interpolation="bicubic")
    assert len(LatentCache(changed, LatentCacheSettings("vae", on_disk=True)).missing()) == 5
    change_image(folder)
    missing = LatentCache(datasets_of(folder), LatentCacheSettings("vae", on_disk=True)).missing()
    assert [Path(entry.record.path).name for entry in missing] == ["0.png"]
    assert (
        LatentCache(datasets_of(folder), LatentCacheSettings("another", on_disk=True, skip_validation=True)).missing()
        == []
    )


def test_an_edited_caption_or_another_encoder_is_stale(tmp_path: Path):
    folder = folder_of_images(tmp_path)
    filled_texts(datasets_of(folder), Encoders())
    (folder / "2_thing" / "3.txt").write_text("edited", encoding="utf-8")
    missing = TextCache(datasets_of(folder), TextCacheSettings("te", on_disk=True)).missing()
    assert [Path(image).name for image in missing] == ["3.png"]
    prefixed = datasets_of(folder, caption_prefix="new,")
    assert len(TextCache(prefixed, TextCacheSettings("te", on_disk=True)).missing()) == 5
    assert len(TextCache(datasets_of(folder), TextCacheSettings("another", on_disk=True)).missing()) == 5


def test_a_copied_dataset_keeps_its_caches(tmp_path: Path):
    """Copies have new times; the content decides."""
    folder = folder_of_images(tmp_path / "a")
    filled_latents(datasets_of(folder), Encoders())
    for path in list((folder / "2_thing").iterdir()):
        target = tmp_path / "b" / "2_thing" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert LatentCache(datasets_of(tmp_path / "b"), LatentCacheSettings("vae", on_disk=True)).missing() == []


def test_a_copied_dataset_is_read_whole_once_not_at_every_run(tmp_path: Path, monkeypatch):
    images = folder_of_images(tmp_path) / "2_thing"
    cache = filled_latents(datasets_of(tmp_path), Encoders())
    for path in images.glob("*.png"):
        os.utime(path, ns=(1, 1))
    settings = LatentCacheSettings("vae", on_disk=True)
    assert LatentCache(datasets_of(tmp_path), settings).missing() == []

    def refuse(path: str) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(latent_entry, "content_hash", refuse)
    again = LatentCache(datasets_of(tmp_path), settings)
    assert again.missing() == [] and torch.equal(again.get(0, 1, False)[0], cache.get(0, 1, False)[0])


@pytest.mark.parametrize("on_disk", [False, True])
def test_chance_of_a_subset_that_a_cache_would_freeze_is_told_before_anything_is_encoded(tmp_path: Path, on_disk: bool):
    datasets = two_datasets(tmp_path, "color_aug = true\nrandom_crop = true", "face_crop_aug_range = [0.3, 0.6]")
    cache = LatentCache(datasets, LatentCacheSettings("vae", on_disk=on_disk))
    first, second = cache.check(cache.missing())
    assert "color_aug, random_crop would be lost" in first and "face_crop_aug_range" in second
    fixed = datasets_of(tmp_path, flip_aug=True, face_crop_aug_range="0.5,0.5")
    assert LatentCache(fixed, LatentCacheSettings("vae", on_disk=on_disk)).check([]) == []


def test_interrupted_caching_goes_on_where_it_was(tmp_path: Path):
    datasets = datasets_of(folder_of_images(tmp_path, 8))
    encoders = Encoders()
    encoders.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        filled_latents(datasets, encoders)
    again = Encoders()
    filled_latents(datasets, again)
    assert again.images == 4


def test_a_full_disk_is_told_and_leaves_no_half_file(tmp_path: Path, monkeypatch):
    datasets = datasets_of(folder_of_images(tmp_path))
    plain, calls = safetensors.torch.save_file, []

    def save(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    with pytest.raises(UserError, match="the disk is full"):
        filled_latents(datasets, Encoders())
    assert len(list((tmp_path / "2_thing").glob("*.safetensors"))) == 2
    assert not list((tmp_path / "2_thing").glob(".*tmp"))
    monkeypatch.undo()
    assert len(LatentCache(datasets, LatentCacheSettings("vae", on_disk=True)).missing()) == 3


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_encoded(tmp_path: Path, monkeypatch):
    datasets = datasets_of(folder_of_images(tmp_path))
    cache = LatentCache(datasets, LatentCacheSettings("vae", on_disk=True))

    def refuse(target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(common_files, "temporary_name", refuse)
    problems = cache.check(cache.missing())
    assert len(problems) == 1 and "--cache_dir" in problems[0]


def test_a_disk_with_too_little_room_is_told_before_anything_is_encoded(tmp_path: Path, monkeypatch):
    datasets = datasets_of(folder_of_images(tmp_path), flip_aug=True)
    latents = LatentCache(datasets, LatentCacheSettings("vae", on_disk=True, cache_dir=tmp_path / "new" / "cache"))
    texts = TextCache(datasets, TextCacheSettings("te", on_disk=True, bytes_each=1 << 20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 << 20))
    assert latents.check(latents.missing()) == []
    (problem,) = texts.check(texts.missing())
    assert "need 0.00 GiB" in problem and "--cache_dir" in problem
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 10))
    assert len(latents.check(latents.missing())) == 1


def two_datasets(tmp_path: Path, first: str, second: str) -> list[IndexedDataset]:
    """One folder in two datasets, each with lines of its own in its subset."""
    images = folder_of_images(tmp_path) / "2_thing"
    tables = [
        f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = {str(images)!r}\n"
        f"caption_extension = '.txt'\n{lines}\n"
        for lines in (first, second)
    ]
    path = tmp_path / "two.toml"
    path.write_text("".join(tables), encoding="utf-8")
    return build_index(read_datasets(str(path), CommandLineData())).training


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_image_of_two_datasets_has_the_text_of_each(tmp_path: Path, on_disk: bool):
    datasets = two_datasets(tmp_path, "caption_prefix = 'one'", "caption_prefix = 'another'")
    cache = filled_texts(datasets, Encoders(), on_disk=on_disk)
    assert cache.missing() == []
    for dataset, word in enumerate(("one", "another")):
        text, outputs = cache.get(dataset, 1, 0, False)
        assert text.startswith(f"{word} thing") and set(outputs) == {"clip_l", "t5"}
        assert outputs["clip_l"][0, 0] == len(text) and outputs["t5"].item() == hash(text) % 97.0


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_image_of_two_datasets_is_encoded_once_and_mirrored_if_one_wants_it(tmp_path: Path, on_disk: bool):
    datasets, encoders = two_datasets(tmp_path, "", "flip_aug = true"), Encoders()
    cache = filled_latents(datasets, encoders, on_disk=on_disk)
    assert encoders.images == 10 and cache.missing() == []
    assert torch.equal(cache.get(0, 2, False)[0], cache.get(1, 2, False)[0])
    assert cache.get(1, 2, True)[0].shape == cache.get(1, 2, False)[0].shape


def test_datasets_that_cut_an_image_otherwise_have_files_of_their_own(tmp_path: Path):
    datasets = two_datasets(tmp_path, "alpha_mask = true", "resize_interpolation = 'nearest'")
    cache = filled_latents(datasets, Encoders())
    assert cache.missing() == [] and len(list((tmp_path / "2_thing").glob("*.safetensors"))) == 10
    assert cache.get(0, 1, False)[1] is not None and cache.get(1, 1, False)[1] is None
    assert not torch.equal(cache.get(0, 1, False)[0], cache.get(1, 1, False)[0])


def test_every_damaged_image_is_named_and_the_others_are_kept(tmp_path: Path):
    datasets = datasets_of(folder_of_images(tmp_path))
    for name in ("1.png", "4.png"):  # damaged after they were indexed
        path = tmp_path / "2_thing" / name
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError) as told:
        filled_latents(datasets, Encoders())
    assert len(told.value.problems) == 2
    assert "1.png" in told.value.problems[0] + told.value.problems[1] and "4.png" in told.value.as_text()
    assert len(list((tmp_path / "2_thing").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_make_files_between_them_without_overlap(tmp_path: Path, processes: int):
    datasets = datasets_of(folder_of_images(tmp_path, 9))
    latents = LatentCache(datasets, LatentCacheSettings("vae", on_disk=True))
    texts = TextCache(datasets, TextCacheSettings("te", on_disk=True))
    missing_latents, missing_texts, encoders = latents.missing(), texts.missing(), Encoders()
    for rank in range(processes):
        share = latents.share(missing_latents, rank, processes)
        latents.fill(share, encoders.encode_images, 2, lambda batches, title: batches)
        texts.fill(texts.share(missing_texts, rank, processes), encoders.encode_texts)
    assert encoders.images == 9 and latents.missing() == []
    assert len(encoders.texts) == 2 and texts.missing() == []
    alone = LatentCache(datasets, LatentCacheSettings("vae"))
    assert alone.share(alone.missing(), 1, processes) == alone.missing()  # memory is each process's own


def test_a_replaced_mask_is_stale_and_a_copied_one_is_not(tmp_path: Path):
    images = folder_of_images(tmp_path, 2) / "2_thing"
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(2):
        Image.new("L", (64, 64 + 32 * (number % 2)), 100).save(masks / f"{number}.png")
    path = tmp_path / "d.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {str(images)!r}\n"
        f"conditioning_data_dir = {str(masks)!r}\n",
        encoding="utf-8",
    )

    def datasets() -> list[IndexedDataset]:
        return build_index(read_datasets(str(path), CommandLineData(masked_loss=True))).training

    cache = filled_latents(datasets(), Encoders())
    assert cache.get(0, 0, False)[1].unique().item() == pytest.approx(100 / 255)
    os.utime(masks / "0.png", ns=(1, 1))
    assert LatentCache(datasets(), LatentCacheSettings("vae", on_disk=True)).missing() == []
    Image.new("L", (64, 64), 200).save(masks / "0.png")
    missing = LatentCache(datasets(), LatentCacheSettings("vae", on_disk=True)).missing()
    assert [Path(entry.record.path).name for entry in missing] == ["0.png"]


def test_a_trusted_file_without_mirrored_latents_is_told(tmp_path: Path):
    folder = folder_of_images(tmp_path)
    filled_latents(datasets_of(folder), Encoders())
    trusting = filled_latents(datasets_of(folder, flip_aug=True), Encoders(), skip_validation=True)
    with pytest.raises(UserError, match="--skip_cache_check"):
        trusting.get(0, 0, True)


def test_several_resolutions_and_twin_stems_have_files_of_their_own(tmp_path: Path):
    folder = folder_of_images(tmp_path, 2)
    Image.new("RGB", (64, 64), "red").save(folder / "2_thing" / "0.bmp")
    filled_latents(datasets_of(folder), Encoders())
    filled_latents(datasets_of(folder, resolution="96"), Encoders())
    names = sorted(path.name for path in (folder / "2_thing").glob("*.safetensors"))
    assert len(names) == 6 and "0.bmp.64x64.latents.safetensors" in names and "0.png.96x96.latents.safetensors" in names


def test_variants_are_cached_and_chance_that_would_be_lost_is_refused(tmp_path: Path):
    datasets = datasets_of(folder_of_images(tmp_path), shuffle_caption=True)
    with pytest.raises(UserError, match="shuffle_caption would be lost"):
        check_cacheable(datasets, None)
    check_cacheable(datasets, 4)
    check_cacheable(
        datasets_of(tmp_path, caption_dropout_rate=0.3), None
    )  # dropout of whole captions works with caches
    cache = filled_texts(datasets, Encoders(), variants=4)
    texts = {cache.get(0, 0, variant, False)[0] for variant in range(4)}
    assert len(texts) > 1 and all(sorted(text.split(", ")) == ["a", "b", "thing 0"] for text in texts)
    for variant in range(4):
        text, outputs = cache.get(0, 0, variant, False)
        assert outputs["t5"].item() == hash(text) % 97.0


def test_noise_is_standard_and_differs_between_images(tmp_path: Path):
    records = datasets_of(folder_of_images(tmp_path))[0].records
    noise = torch.cat([posterior_noise(record).flatten() for record in records])
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05
    assert not torch.equal(posterior_noise(records[0]), posterior_noise(records[2]))
    assert not torch.equal(posterior_noise(records[0]), posterior_noise(records[0], "flipped"))


def test_a_mask_is_the_mean_of_each_cell():
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:8, :4] = 255
    assert shrink_mask(mask).tolist() == [[[0.5, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("on_disk", [False, True])
def test_text_outputs_that_are_not_finite_are_refused_with_caption_and_encoder(tmp_path: Path, on_disk: bool):
    datasets = datasets_of(folder_of_images(tmp_path))
    cache = TextCache(datasets, TextCacheSettings("encoders", on_disk=on_disk))

    def encode(captions):
        rows = [{"clip_l": torch.ones(2), "t5": torch.ones(2)} for _ in captions]
        rows[0]["t5"][1] = float("inf")
        return rows

    with pytest.raises(UserError, match=r"The caption .* text encoder .t5. is not finite"):
        cache.fill(cache.missing(), encode)
    assert not list(tmp_path.rglob("*.text.safetensors")) and not cache.memory
