"""What training writes and what the tools make of it, on real runs of the real commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.options.errors import UserError
from networks.diffusers_layout import to_diffusers
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train
from tests.tools.loras import changes
from tools import check_lora, convert_lora, extract_lora, generate, merge_lora, resize_lora


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


def test_generate_makes_the_image_that_a_preview_of_the_same_lora_is(workshop: Workshop, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --n a dog --w 64 --h 96 --s 4 --l 3 --d 11 --ss heun\n", encoding="utf-8")
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "learning_rate": "1e-2"}
    run = train(workshop, tmp_path / "run", **options)
    words = ["--ckpt_path", workshop.model, "--lora_weights", run.folder / "lora.safetensors", "--from_file", prompts]
    assert generate.main([str(word) for word in [*words, "--output_dir", tmp_path, "--device", "cpu"]]) == 0
    (preview,) = run.folder.glob("sample/*.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "00001.png", preview))
    assert abs(ours - theirs).max() <= 1
    plain = [
        "--ckpt_path",
        workshop.model,
        "--from_file",
        prompts,
        "--output_dir",
        tmp_path / "plain",
        "--device",
        "cpu",
    ]
    assert generate.main([str(word) for word in plain]) == 0
    assert abs(np.asarray(Image.open(tmp_path / "plain" / "00001.png")).astype(int) - theirs).max() > 2


def test_a_trained_file_passes_the_check_and_survives_every_tool(workshop: Workshop, tmp_path: Path):
    """train -> check -> diffusers' layout -> resize -> merge into the checkpoint -> extract: the change is the same at the end."""
    run = train(workshop, tmp_path / "run", network_dim=4, learning_rate="1e-2")
    file = {name: str(tmp_path / f"{name}.safetensors") for name in ("theirs", "same", "merged", "out")}
    lora, base = str(run.folder / "lora.safetensors"), str(workshop.model)
    assert check_lora.main([lora, "--base_model", base]) == 0
    assert convert_lora.main(["--model", lora, "--save_to", file["theirs"]]) == 0
    assert resize_lora.main(["--model", file["theirs"], "--save_to", file["same"], "--new_rank", "3"]) == 0
    merged = ["--models", file["same"], "--base_model", base, "--save_to", file["merged"]]
    assert merge_lora.main(merged) == 0
    models = ["--model_org", base, "--model_tuned", file["merged"]]
    assert extract_lora.main([*models, "--dim", "3", "--save_to", file["out"], "--min_diff", "0"]) == 0
    before, after = changes(load_file(file["same"])), changes(load_file(file["out"]))
    assert before.keys() == after.keys() and len(before) > 40
    for name, change in before.items():
        assert (after[name] - change).norm() < 1e-2 * change.norm() + 1e-6, name
