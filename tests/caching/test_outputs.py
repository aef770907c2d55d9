"""The text encoders are loaded once for previews, training and validation captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from library.caching.fill import Lookahead
from library.caching.outputs import cache_texts
from library.caching.text import TextCacheSettings
from tests.caching.test_caches import datasets_of, folder_of_images

PROMPTS = ["a preview", "", "another"]
ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)


class CountingEncoders:
    """One encoder, freed after each call that has loaded it, as TextEncoderManager does."""

    present = ("t5xxl",)

    def __init__(self) -> None:
        self.loads, self.loaded, self.encoded = 0, False, list[str]()

    def fingerprint(self, names: Sequence[str]) -> str:
        return "one"

    def model(self, name: str) -> nn.Module:
        self.loads += not self.loaded
        self.loaded = True
        return nn.Identity()

    def precompute(self, captions, names, batch_size, wrap=iter) -> list[dict[str, Tensor]]:
        alone = not self.loaded
        self.model(names[0])
        self.encoded += captions
        self.loaded = not alone
        return [{"t5": torch.tensor([float(len(text))])} for text in captions]


def cached(tmp_path: Path, encoders: CountingEncoders, on_disk: bool, is_cached: bool = True):
    if not (tmp_path / "train").exists():
        folder_of_images(tmp_path / "train")
        held_out = folder_of_images(tmp_path / "validation")
        for number in range(5):
            (held_out / "2_thing" / f"{number}.txt").write_text(f"held out {number % 2}", encoding="utf-8")
    index = SimpleNamespace(training=datasets_of(tmp_path / "train"), validation=datasets_of(tmp_path / "validation"))
    settings = TextCacheSettings("", on_disk=on_disk)
    return cache_texts(encoders, {"t5xxl": False}, is_cached, index, PROMPTS, settings, 2, ALONE, iter)


@pytest.mark.parametrize("on_disk", [False, True])
def test_one_load_serves_previews_training_and_validation(tmp_path: Path, on_disk: bool):
    encoders = CountingEncoders()
    texts = cached(tmp_path, encoders, on_disk)
    assert encoders.loads == 1
    assert sorted(encoders.encoded) == sorted({*PROMPTS, "thing 0, a, b", "thing 1, a, b", "held out 0", "held out 1"})
    assert texts.validation is not None and texts.training is not None
    for cache, text in ((texts.training, "thing 0, a, b"), (texts.validation, "held out 0")):
        assert cache.get(0, 0, 0, False)[0] == text
        assert float(cache.get(0, 0, 0, False)[1]["t5"]) == len(text)
    assert float(texts.prompts["another"]["t5"]) == len("another")
    again = CountingEncoders()
    cached(tmp_path, again, on_disk)
    assert again.loads == (0 if on_disk else 1)


def test_an_encoder_of_every_step_is_not_loaded_twice_for_previews(tmp_path: Path):
    encoders = CountingEncoders()
    cached(tmp_path, encoders, on_disk=False, is_cached=False)
    encoders.model("t5xxl")  # as the first training step does
    assert encoders.loads == 1


def test_many_texts_are_encoded_in_calls_of_bounded_size():
    calls: list[list[str]] = []

    def encode(texts: Sequence[str]) -> list[dict[str, Tensor]]:
        calls.append(list(texts))
        return [{"t5": torch.tensor(int(text))} for text in texts]

    texts = [str(number) for number in range(10)]
    together = Lookahead(encode, texts, 4)
    for start in (0, 3, 6, 9):
        part = texts[start : start + 3]
        assert [int(row["t5"]) for row in together(part)] == [int(text) for text in part]
    assert calls == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]
    assert [int(row["t5"]) for row in together(["0", "0"])] == [0, 0]
