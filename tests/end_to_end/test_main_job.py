"""The main job, by the real command: the guide's own line, real photographs, the same file from the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.sd3.checkpoint import locate_parts
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop, run_command
from tests.warm_processes import QUIET

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1")
SCRIPT = ROOT / "sd3_train_network.py"


def test_the_guides_own_command_runs_as_it_stands(workshop: Workshop, tmp_path: Path):
    """Section 4 of the guide with its three paths filled in, by a launcher and a Python of its own. fp16 and 32 blocks are lowered with a warning each."""
    words = f"""
        --pretrained_model_name_or_path={workshop.model} --clip_l= --clip_g= --t5xxl= --dataset_config={workshop.dataset}
        --output_dir={tmp_path} --output_name=my_sd3_lora --save_model_as=safetensors --network_module=networks.lora
        --network_dim=16 --network_alpha=1 --learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa
        --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision=fp16 --gradient_checkpointing
        --weighting_scheme=sigma_sqrt --blocks_to_swap=32""".split()
    environment = {**os.environ, **QUIET}
    done = subprocess.run([*LAUNCH, SCRIPT, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bf16 is used instead" in done.stderr and "blocks_to_swap 32 is lowered" in done.stderr
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [*(f"my_sd3_lora-{epoch:06d}.safetensors" for epoch in range(1, 10)), "my_sd3_lora.safetensors"]
    tensors = load_file(tmp_path / "my_sd3_lora.safetensors")
    down = tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"]
    assert down.shape[0] == 16 and tensors["lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"].item() == 1
    assert any(t.abs().max() > 0 for key, t in tensors.items() if "lora_te2" in key and "lora_up" in key)


def test_the_file_has_just_the_keys_shapes_dtypes_and_alphas_of_the_format(workshop: Workshop, tmp_path: Path):
    assert main(workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=1, network_dim=4)) == 0
    tensors = load_file(tmp_path / "lora.safetensors")
    layers = {
        key.rsplit(".weight", 1)[0] for key in locate_parts(workshop.model).mmdit.tensors if key.endswith("weight")
    }
    parts = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    targets = [layer for layer in layers if layer.startswith("joint_blocks.") and layer.endswith(parts)]
    names = {"lora_unet_" + layer.replace(".", "_"): layer for layer in targets}
    suffixes = (".lora_down.weight", ".lora_up.weight", ".alpha")
    assert tensors.keys() == {name + suffix for name in names for suffix in suffixes}
    shapes = {key: info.shape for key, info in locate_parts(workshop.model).mmdit.tensors.items()}
    for name, layer in names.items():
        out_size, in_size = shapes[f"{layer}.weight"]
        assert tensors[f"{name}.lora_down.weight"].shape == (4, in_size)
        assert tensors[f"{name}.lora_up.weight"].shape == (out_size, 4)
        assert tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] == 1
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(workshop: Workshop, tmp_path: Path):
    for folder, seed, workers in (("a", 7, 0), ("b", 7, 2), ("c", 8, 0)):
        words = workshop.arguments(tmp_path / folder, max_train_steps=20, seed=seed, max_data_loader_n_workers=workers)
        assert main([*words, "--network_args", "rank_dropout=0.2", "--network_dropout", "0.1"]) == 0
    a, b, c = (load_file(tmp_path / folder / "lora.safetensors") for folder in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_training_lowers_the_validation_loss(workshop: Workshop, tmp_path: Path):
    words = workshop.arguments(
        tmp_path, "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", max_train_steps=40
    )
    more = [
        "--validation_split",
        "0.3",
        "--validate_every_n_steps",
        "20",
        "--network_dim",
        "8",
        "--lr_scheduler",
        "cosine",
    ]
    assert main([*words, *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss/validation/step_average"] for line in lines if "loss/validation/step_average" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    rates = [line["lr/unet"] for line in lines if "lr/unet" in line]
    assert len(rates) == 40 and rates[0] > rates[20] > rates[39] >= 0


def test_a_lora_of_real_photographs(workshop: Workshop, tmp_path: Path):
    """Photographs that scikit-image ships, with previews before and after."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path / "photos" / "1_photo"
    folder.mkdir(parents=True)
    for name in ("chelsea", "coffee", "astronaut", "rocket"):
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.jpg")
        (folder / f"{name}.caption").write_text(f"a photo of {name}", encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a photo of chelsea --w 64 --h 96 --s 3 --d 1\na cat --w 64 --h 64 --s 2 --l 1 --d 2\n", encoding="utf-8"
    )
    done = run_command(
        [
            *("--pretrained_model_name_or_path", str(workshop.model), "--train_data_dir", str(tmp_path / "photos")),
            *("--resolution", "96,64", "--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "32"),
            *(
                "--output_dir",
                str(tmp_path / "out"),
                "--output_name",
                "photos",
                "--network_module",
                "networks.lora_sd3",
            ),
            *(
                "--max_train_epochs",
                "2",
                "--sample_prompts",
                str(prompts),
                "--sample_at_first",
                "--sample_every_n_epochs",
                "2",
            ),
            *("--mixed_precision", "bf16", "--save_precision", "bf16", "--cache_latents", "--network_train_unet_only"),
            *("--learning_rate", "1e-3", "--cache_text_encoder_outputs"),
        ],
    )
    assert done.returncode == 0, done.stderr
    previews = sorted((tmp_path / "out" / "sample").glob("*.png"))
    assert [p.name.split("_202")[0] for p in previews] == [
        "photos_e000000_00",
        "photos_e000000_01",
        "photos_e000002_00",
        "photos_e000002_01",
    ]
    assert Image.open(previews[0]).size == (64, 96)
    assert (tmp_path / "out" / "photos_contact_sheet.png").exists()
    with safe_open(str(tmp_path / "out" / "photos.safetensors"), "pt") as file:
        assert file.get_tensor("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight").dtype == torch.bfloat16
