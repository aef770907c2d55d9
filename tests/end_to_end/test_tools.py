"""What training writes and what the tools make of it, on real runs of the real commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.common.errors import UserError
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


def test_training_goes_on_from_a_converted_file_as_from_the_original(workshop: Workshop, tmp_path: Path):
    """Bit for bit, with --network_weights under both ways to choose the layers, and with --base_weights."""
    run = train(workshop, tmp_path / "run", network_dim=4, network_alpha=4, learning_rate="1e-2")
    theirs = tmp_path / "theirs.safetensors"
    assert convert_lora.main(["--model", str(run.folder / "lora.safetensors"), "--save_to", str(theirs)]) == 0
    for case, more in {"same_dim": (), "file_dim": ("--dim_from_weights",)}.items():
        ends = []
        for file in (run.folder / "lora.safetensors", theirs):
            folder = tmp_path / case / file.stem
            options = {"network_weights": file, "base_weights": file, "base_weights_multiplier": 0.5}
            ends.append(train(workshop, folder, *more, network_dim=4, network_alpha=4, **options).weights())
        assert ends[0].keys() == ends[1].keys() == run.weights().keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        assert any(not torch.equal(ends[0][key], value) for key, value in run.weights().items())


def test_an_encoder_without_a_lora_in_the_file_of_dim_from_weights_is_not_trained(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Its outputs are cached ahead and it is freed, as if its learning rate were 0."""
    first = train(workshop, tmp_path / "first")
    kept = {key: tensor for key, tensor in first.weights().items() if not key.startswith("lora_te2_")}
    save_file(kept, tmp_path / "without.safetensors")
    options = {"network_weights": tmp_path / "without.safetensors"}
    run = train(workshop, tmp_path / "run", "--dim_from_weights", "--cache_text_encoder_outputs", **options)
    assert run.trainer.texts.roles.trained == run.trainer.texts.roles.live == ["clip_l"]
    assert "clip_g" not in run.trainer.encoders.models
    assert run.moved().keys() == {"te1", "unet"}
    assert "has no LoRA for textencoder 2: it is not trained." in caplog.text
