"""Encoders take turns in memory, and their fingerprint knows all that their outputs depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.sd3.checkpoint import locate_parts
from library.sd3.conditioning import TextSettings
from library.sd3.text_stage import ENCODERS, EncoderPlacement, TextStage
from library.sd3.tokenizers import load_tokenizers
from tests.sd3.tiny import tiny_checkpoint, tiny_model_folder

CPU = torch.device("cpu")
PLACEMENT = EncoderPlacement(CPU, torch.float32, CPU, torch.float32)
SETTINGS = TextSettings(t5_tokens=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def stage(model: Path, settings: TextSettings = SETTINGS, placement: EncoderPlacement = PLACEMENT) -> TextStage:
    tokenizers = load_tokenizers(str(model.parent / "tokenizers"), model)
    return TextStage(locate_parts(str(model)), tokenizers, settings, placement)


@pytest.mark.parametrize(
    ("settings", "placement"),
    [
        (replace(SETTINGS, t5_tokens=21), PLACEMENT),
        (replace(SETTINGS, mask_clip=True), PLACEMENT),
        (replace(SETTINGS, mask_t5=True), PLACEMENT),
        (SETTINGS, replace(PLACEMENT, dtype=torch.bfloat16)),
        (SETTINGS, replace(PLACEMENT, t5_dtype=torch.bfloat16)),
        (SETTINGS, replace(PLACEMENT, t5_quantisation="fp8")),
    ],
)
def test_a_cache_of_other_settings_is_stale(model: Path, settings: TextSettings, placement: EncoderPlacement):
    assert stage(model).fingerprint(ENCODERS) == stage(model).fingerprint(ENCODERS)
    assert stage(model, settings, placement).fingerprint(ENCODERS) != stage(model).fingerprint(ENCODERS)


def test_a_cache_of_other_or_fewer_encoders_is_stale(model: Path, tmp_path: Path):
    first = stage(model)
    assert first.fingerprint(ENCODERS[:2]) != first.fingerprint(ENCODERS)
    other = tiny_checkpoint(tmp_path / "other.safetensors", seed=5)
    files = locate_parts(str(other))
    assert TextStage(files, first.tokenizers, SETTINGS, PLACEMENT).fingerprint(ENCODERS) != first.fingerprint(ENCODERS)


def test_ahead_and_live_say_the_same_and_nothing_stays_loaded(model: Path):
    texts = ["a red cat", "", "the blue house on the big square"]
    first = stage(model)
    ahead = first.encode_ahead(texts, ENCODERS, 2)
    assert first.models == {} and len(ahead) == 3
    live = first.encode_live(texts, ENCODERS).rows()
    for one, other in zip(ahead, live):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-5)
