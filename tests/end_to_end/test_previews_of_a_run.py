"""Previews of real runs: they change nothing, and they show what the saved file will do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train

LINES = "a cat --w 64 --h 64 --s 3 --d 1\na dog on grass --w 64 --h 96 --s 2 --l 1 --d 2\na bird --w 64 --h 64 --s 2 --n grass --ss heun --d 3\n"
KINDS = {
    "plain": (),
    "block swap": ("--blocks_to_swap", "1", "--gradient_checkpointing"),
    "fp8": ("--fp8_base",),
    "ema": ("--ema_decay", "0.5"),
    "schedule-free": ("--optimizer_type", "AdamWScheduleFree"),
    "cached": ("--cache_text_encoder_outputs", "--cache_latents"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def pictures(folder: Path, when: str) -> list[np.ndarray]:
    found = sorted((folder / "sample").glob(f"lora_{when}_*.png"))
    assert len(found) == 3
    return [np.asarray(Image.open(path)).astype(int) for path in found]


@pytest.mark.parametrize("kind", KINDS)
def test_previews_and_validation_change_no_weight(workshop: Workshop, tmp_path: Path, prompts: Path, kind: str) -> None:
    """With dropout, random flips and every random thing of training in between."""
    more = (UNET, "--network_dropout", "0.2", "--t5_dropout_rate", "0.2", "--validation_split", "0.2", *KINDS[kind])
    flip = () if kind == "cached" else ("--flip_aug",)
    looked = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_at_first")
    with_them = train(
        workshop, tmp_path / "a", *more, *flip, *looked, "--validate_every_n_steps", "1", max_train_steps=3
    )
    without = train(workshop, tmp_path / "b", *more, *flip, "--validate_every_n_steps", "99", max_train_steps=3)
    a, b = with_them.weights(), without.weights()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(tensor.abs().max() > 0 for key, tensor in a.items() if "lora_up" in key)


@pytest.mark.parametrize("kind", ["plain", "ema", "schedule-free", "block swap"])
def test_the_last_previews_show_what_the_file_does(
    workshop: Workshop, tmp_path: Path, prompts: Path, kind: str
) -> None:
    """A new run that starts from the file draws the same pictures before its first step."""
    looked = ("--sample_prompts", str(prompts))
    options = {"max_train_steps": 3, "learning_rate": "2e-2"}
    first = train(
        workshop,
        tmp_path / "a",
        UNET,
        *looked,
        "--sample_every_n_steps",
        "3",
        "--sample_at_first",
        *KINDS[kind],
        **options,
    )
    name = "lora-ema.safetensors" if (first.folder / "lora-ema.safetensors").exists() else "lora.safetensors"
    again = train(
        workshop,
        tmp_path / "b",
        UNET,
        *looked,
        "--sample_at_first",
        "--network_weights",
        str(first.folder / name),
        max_train_steps=1,
    )
    last, start = pictures(first.folder, "000003"), pictures(again.folder, "000000")
    for drawn, wanted in zip(last, start, strict=True):
        assert np.abs(drawn - wanted).max() <= 1  # of 255
    untrained = pictures(first.folder, "000000")
    assert any(np.abs(before - after).max() > 4 for before, after in zip(untrained, last, strict=True))


def test_cached_texts_give_the_same_previews(workshop: Workshop, tmp_path: Path, prompts: Path) -> None:
    looked = (UNET, "--sample_prompts", str(prompts), "--sample_at_first")
    live = train(workshop, tmp_path / "live", *looked, max_train_steps=1)
    cached = train(workshop, tmp_path / "cached", *looked, "--cache_text_encoder_outputs", max_train_steps=1)
    for one, other in zip(pictures(live.folder, "000000"), pictures(cached.folder, "000000"), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("more", "stays"), [((), True), (("--cache_latents",), False), (("--cache_latents", "--highvram"), True)]
)
def test_a_vae_that_previews_alone_need_is_on_the_device_for_them_alone(
    workshop: Workshop,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    stays: bool,
) -> None:
    offloaded: list[nn.Module] = []
    monkeypatch.setattr("library.sd3.codec.offload_to_cpu", lambda model, device: offloaded.append(model))
    looked = ("--sample_prompts", str(prompts), "--sample_at_first")
    run = train(workshop, tmp_path, UNET, *looked, *more, max_train_steps=1)
    assert offloaded == (
        [] if stays else [run.trainer.codec.vae] * 4
    )  # after caching, and after each of three previews
