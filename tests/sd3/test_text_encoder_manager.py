"""Encoders take turns in memory, and their fingerprint knows all that their outputs depend on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.sd3.checkpoint import locate_parts
from library.sd3.conditioning import TextSettings
from library.sd3.text_encoder_manager import ENCODERS, EncoderPlacement, TextEncoderManager
from library.sd3.tokenizers import Tokenizers, load_tokenizers
from tests.sd3.tiny import TOKENIZER_FOLDERS, tiny_checkpoint, tiny_model_folder

CPU = torch.device("cpu")
PLACEMENT = EncoderPlacement(CPU, torch.float32, CPU, torch.float32)
SETTINGS = TextSettings(t5_tokens=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def stage(
    model: Path, settings: TextSettings = SETTINGS, placement: EncoderPlacement = PLACEMENT
) -> TextEncoderManager:
    tokenizers = load_tokenizers(str(model.parent / "tokenizers"), model)
    return TextEncoderManager(locate_parts(str(model)), tokenizers, settings, placement)


@pytest.mark.parametrize(
    ("settings", "placement"),
    [
        (replace(SETTINGS, t5_tokens=21), PLACEMENT),
        (replace(SETTINGS, mask_clip=True), PLACEMENT),
        (replace(SETTINGS, mask_t5=True), PLACEMENT),
        (SETTINGS, replace(PLACEMENT, dtype=torch.bfloat16)),
        (SETTINGS, replace(PLACEMENT, t5_dtype=torch.bfloat16)),
        (SETTINGS, replace(PLACEMENT, t5_quantization="fp8")),
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
    assert TextEncoderManager(files, first.tokenizers, SETTINGS, PLACEMENT).fingerprint(ENCODERS) != first.fingerprint(
        ENCODERS
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_cache_of_another_tokenizer_is_stale(model: Path, tmp_path: Path, encoder: str):
    shutil.copytree(model.parent / "tokenizers", tmp_path / "tokenizers")
    path = tmp_path / "tokenizers" / TOKENIZER_FOLDERS[encoder] / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    if encoder == "t5xxl":
        rules["model"]["vocab"][20][1] -= 0.5  # other scores cut words elsewhere
    else:
        rules["model"]["merges"].reverse()
    path.write_text(json.dumps(rules), encoding="utf-8")
    first, others = stage(model), load_tokenizers(tmp_path / "tokenizers", None)
    second = TextEncoderManager(first.files, others, SETTINGS, PLACEMENT)
    assert second.fingerprint(ENCODERS) != first.fingerprint(ENCODERS)
    rest = [name for name in ENCODERS if name != encoder]
    assert second.fingerprint(rest) == first.fingerprint(rest)


def test_the_same_tokenizer_in_another_place_or_after_use_is_the_same(model: Path, tmp_path: Path):
    first = stage(model)
    before = first.fingerprint(ENCODERS)
    for name in ENCODERS:
        tokenizer = first.tokenizers.of(name)
        assert tokenizer is not None
        tokenizer(["a red cat"], 20)  # the library keeps the length of the last call
        tokenizer.inner.save_pretrained(str(tmp_path / TOKENIZER_FOLDERS[name]))
    moved = TextEncoderManager(first.files, load_tokenizers(tmp_path, None), SETTINGS, PLACEMENT)
    used = Tokenizers(*(replace(tokenizer) for name in ENCODERS if (tokenizer := first.tokenizers.of(name))))
    assert moved.fingerprint(ENCODERS) == before
    assert TextEncoderManager(first.files, used, SETTINGS, PLACEMENT).fingerprint(ENCODERS) == before


def test_ahead_and_live_say_the_same_and_nothing_stays_loaded(model: Path):
    texts = ["a red cat", "", "the blue house on the big square"]
    first = stage(model)
    ahead = first.precompute(texts, ENCODERS, 2)
    assert first.models == {} and len(ahead) == 3
    live = first.encode(texts, ENCODERS).rows()
    for one, other in zip(ahead, live):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-5)
