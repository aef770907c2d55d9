"""The outline of a text encoder gets the same LoRA as transformers' model, without transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.sd3.checkpoint import locate_parts
from library.sd3.text_encoders import empty_encoder, meta_text_encoder
from networks.lora_sd3 import layers_by_name
from tests.sd3 import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_layers_of_an_outline_are_those_of_the_model(tmp_path: Path, place: int):
    files = locate_parts(str(tiny.tiny_model_folder(tmp_path, "5-medium")), "", "", "", "")
    part = list(files.encoders().values())[place]
    assert part is not None
    given = {}
    for make in (meta_text_encoder, empty_encoder):
        encoders = [make(part) if number == place else None for number in range(3)]
        layers = layers_by_name(encoders, None)
        given[make] = {name: (layer.weight.shape, layer.bias is None) for name, layer in layers.items()}
    assert given[meta_text_encoder] == given[empty_encoder] and len(given[empty_encoder]) >= 12


def test_an_outline_is_made_without_loading_transformers(tmp_path: Path):
    model = tiny.tiny_model_folder(tmp_path, "5-medium")
    code = f"""
import sys
from library.sd3.checkpoint import locate_parts
from library.sd3.text_encoders import meta_text_encoder
assert list(meta_text_encoder(locate_parts({str(model)!r}, "", "", "", "").clip_l).modules())
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
