"""What a run will write is known before it starts: the caches that are missing, the files that it keeps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.caching.latents import LatentCache, LatentCacheSettings
from library.caching.text import TextCache, TextCacheSettings
from library.data.index import DatasetIndex
from library.options.resolve import resolve_options
from library.preflight.disk_space import (
    BESIDE,
    DiskRequirement,
    OutputSize,
    cache_requirements,
    output_problems,
    saving_requirement,
    space_problems,
)
from library.preflight.run_length import RunLength
from library.preflight.settings.plan import (
    latent_cache_settings,
    optimizer_settings,
    output_settings,
    text_cache_settings,
)
from tests.caching.test_caches import Encoders, datasets_of, folder_of_images

WORDS = [
    "--pretrained_model_name_or_path",
    "m.safetensors",
    "--train_data_dir",
    "d",
    "--network_module",
    "networks.lora_sd3",
]
ON_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")


def options(folder: Path, *more: str):
    return resolve_options([*WORDS, "--output_dir", str(folder), *more]).args


def required(args, index: DatasetIndex, seed: int, caption_bytes: int) -> list[DiskRequirement]:
    latents = latent_cache_settings(args) if args.cache_latents_to_disk else None
    return cache_requirements(index, latents, text_cache_settings(args, seed=seed, bytes_each=caption_bytes))


def test_the_bytes_of_missing_caches_are_those_of_the_files_that_are_made(tmp_path: Path):
    datasets = datasets_of(folder_of_images(tmp_path), flip_aug=True)
    index, args = DatasetIndex(datasets, [], []), options(tmp_path, *ON_DISK)
    outputs = {"t5": torch.zeros(100, 64)}
    size = 4 * 100 * 64
    (need,) = required(args, index, 0, size)
    cache = LatentCache(datasets, LatentCacheSettings("", on_disk=True))
    cache.fill(cache.missing(), Encoders().encode_images, 2, lambda batches, title: batches)
    texts = TextCache(datasets, TextCacheSettings("", on_disk=True))
    texts.fill(texts.missing(), lambda captions: [outputs] * len(captions))
    made = sum(path.stat().st_size for path in need.folder.glob("*.safetensors"))
    assert need.folder == tmp_path / "2_thing" and 0.8 * made < need.size < 1.05 * made
    assert required(args, index, 0, size) == []


def test_variants_of_a_caption_count_as_often_as_they_differ(tmp_path: Path):
    changes = {"caption_extension": ".txt", "shuffle_caption": True}
    for captions, times in (("a, b, c, d, e, f, g, h", 3), ("one", 1)):
        folder = folder_of_images(tmp_path / captions[:3])
        for path in folder.rglob("*.txt"):
            path.write_text(captions, encoding="utf-8")
        index = DatasetIndex(datasets_of(folder, **changes), [], [])
        args = options(tmp_path, *ON_DISK, "--text_cache_variants", "3")
        args.cache_latents_to_disk = False
        (need,) = required(args, index, 0, 1000)
        assert need.size == 5 * times * 1000


def test_nothing_is_needed_for_caches_in_memory(tmp_path: Path):
    index = DatasetIndex(datasets_of(folder_of_images(tmp_path)), [], [])
    assert required(options(tmp_path, "--cache_latents", "--cache_text_encoder_outputs"), index, 0, 1000) == []


def test_no_cache_file_is_opened_to_reckon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def opened(*given):
        raise AssertionError("a cache file was opened")

    monkeypatch.setattr("library.caching.latents.read_cache_key", opened)
    monkeypatch.setattr("library.caching.text.read_cache_key", opened)
    datasets = datasets_of(folder_of_images(tmp_path))
    for path in list((tmp_path / "2_thing").glob("*.png")):
        path.with_name(f"{path.name}.text.safetensors").write_bytes(b"")
    (need,) = required(options(tmp_path, *ON_DISK), DatasetIndex(datasets, [], []), 0, 1000)
    assert (
        need.size
        == LatentCache(datasets, LatentCacheSettings("", on_disk=True)).bytes_needed(
            list(LatentCache(datasets, LatentCacheSettings("")).entries.values())
        )[need.folder]
    )


LENGTH = RunLength(steps_per_epoch=10, max_steps=100, epochs=10)


@pytest.mark.parametrize(
    ("words", "files", "states"),
    [
        ("", 1, 0),
        ("--save_state_on_train_end", 1, 1),
        ("--save_every_n_epochs 2", 5, 0),
        ("--save_every_n_epochs 2 --save_last_n_epochs 2 --save_state", 4, 4),
        ("--save_every_n_steps 10 --save_last_n_steps 20 --save_state --save_last_n_steps_state 10", 5, 4),
        ("--save_every_n_steps 10 --save_format both --ema_decay 0.9", 11 * 4, 0),
        ("--save_precision fp16", 0.5, 0),
    ],
)
def test_the_files_that_are_kept_together_are_counted(tmp_path: Path, words: str, files: float, states: int):
    million = OutputSize(numbers=10**6, bytes_each=4)
    args = options(tmp_path, *words.split())
    need = saving_requirement(output_settings(args), optimizer_settings(args), LENGTH, million)
    state = 4e6 * 3 + (4e6 if args.ema_decay else 0)  # the weights and AdamW's two moments
    assert need.size - BESIDE == pytest.approx(files * 4e6 + states * state, rel=0.01)
    assert (
        saving_requirement(output_settings(args), optimizer_settings(args), LENGTH, replace(million, numbers=0)).size
        == BESIDE
    )


def test_a_disk_is_told_once_with_all_that_is_to_be_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 << 30))
    needs = [
        DiskRequirement(tmp_path / "out" / "new", 2 << 30, "LoRA files and states"),
        DiskRequirement(tmp_path, 1 << 30, "caches"),
    ]
    assert space_problems(needs) == []
    (problem,) = space_problems([*needs, DiskRequirement(tmp_path / "b", 1 << 29, "caches")])
    assert "3.00 GiB free" in problem and "about 3.50 GiB: 1.50 for caches, 2.00 for LoRA files and states" in problem


def test_an_output_dir_below_a_file_or_a_closed_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    (problem,) = output_problems(tmp_path / "file" / "out")
    assert "is a file, not a folder" in problem
    assert output_problems(tmp_path / "new") == []
    monkeypatch.setattr("library.preflight.disk_space.os", SimpleNamespace(access=lambda path, mode: False, W_OK=2))
    (problem,) = output_problems(tmp_path / "closed")
    assert "is not writable" in problem
