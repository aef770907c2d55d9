"""What training writes and what the tools make of it, on real runs of the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.options.errors import UserError
from networks.diffusers_layout import to_diffusers
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train


def test_save_format_both_writes_a_file_of_each_layout_and_prunes_both(workshop: Workshop, tmp_path: Path):
    run = train(
        workshop, tmp_path, UNET, save_format="both", save_every_n_steps=1, save_last_n_steps=1, max_train_steps=4
    )
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    steps = [f"lora-step{step:08d}{end}.safetensors" for step in (3, 4) for end in ("", "-diffusers")]
    assert names == sorted(["lora.safetensors", "lora-diffusers.safetensors", *steps])
    converted, theirs = to_diffusers(run.weights()), run.weights("lora-diffusers.safetensors")
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[key], theirs[key]) for key in converted)
    hashes = {safe_open(tmp_path / name, "pt").metadata()["sshs_model_hash"] for name in names if "step" not in name}
    assert len(hashes) == 2


def test_save_format_diffusers_alone_has_the_usual_name(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, UNET, save_format="diffusers")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora.safetensors"]
    assert all(key.startswith("transformer.transformer_blocks.") for key in run.weights())


def test_save_format_diffusers_with_dora_is_refused_before_the_first_step(workshop: Workshop, tmp_path: Path):
    with pytest.raises(UserError, match="--save_format both: this network is a DoRA, which diffusers does not read"):
        train(workshop, tmp_path, UNET, "--network_args", "use_dora=True", save_format="both")
    assert not list(tmp_path.glob("*.safetensors"))
