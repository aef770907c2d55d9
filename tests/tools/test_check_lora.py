"""check_lora.py: a good file passes, and each kind of damage is named and ends with exit code 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from networks.diffusers_layout import to_diffusers
from tests.networks.models import tiny_t5
from tests.sd3.tiny import tiny_checkpoint, tiny_clip
from tests.tools.loras import changes, lora_for_checkpoint, run_script, write_lora
from tools.check_lora import bars, check_layer, main, position_of
from tools.norm_plot import COLOURS

QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors", "5-medium")


def everything() -> dict[str, Tensor]:
    return lora_for_checkpoint(encoders=[tiny_clip("clip_l"), tiny_clip("clip_g")])


def test_the_real_command_passes_a_good_file_and_draws_it(base: Path, tmp_path: Path):
    file, plot = write_lora(tmp_path / "good.safetensors", everything()), tmp_path / "norms.png"
    ran = run_script("check_lora", file, "--base_model", base, "--plot", plot)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No problems found." in ran.stdout and "MMDiT, image 1" in ran.stdout
    image = Image.open(plot)
    actual = {colour for _, colour in image.getcolors(1 << 20)}
    assert image.width == 1200
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS.values()} <= actual


def test_norms_are_those_of_the_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = everything()
    file = write_lora(tmp_path / "lora.safetensors", to_diffusers(tensors))
    assert main([str(file), "--json"]) == 0
    actual = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    for name, change in changes(tensors).items():
        assert actual[name]["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
    reports = [check_layer(QKV, {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(QKV)}, None)]
    assert bars(reports)[0].norm == pytest.approx(actual[QKV]["norm"], rel=1e-5)


def test_every_block_layer_has_its_place():
    names = {key.partition(".")[0] for key in everything()}
    t5 = lora_for_checkpoint(encoders=(None, None, tiny_t5()), train_t5xxl="True")
    names |= {key.partition(".")[0] for key in t5}
    without = {name for name in names if position_of(name) is None}
    assert without and all("embedder" in name or "final_layer" in name for name in without)
    assert position_of("lora_te3_encoder_block_12_layer_1_DenseReluDense_wi_0") == ("T5", 12, "mlp")
    assert position_of("lora_te1_text_model_encoder_layers_3_self_attn_q_proj") == ("CLIP-L", 3, "attn")
    assert position_of("lora_unet_joint_blocks_7_x_block_attn2_qkv") == ("MMDiT, image", 7, "attn2")


def with_(name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = everything()
    tensors = {key: tensor for key, tensor in tensors.items() if key != name}
    return tensors if value is None else {**tensors, name: value}


DAMAGE = {
    "NaN": (f"{QKV}.lora_up.weight", torch.full((384, 4), torch.nan), "NaN or infinite values"),
    "alpha": (f"{QKV}.alpha", torch.tensor(0.0), "alpha is 0"),
    "alphas": (f"{QKV}.alpha", torch.ones(2), "is not one number"),
    "rank": (f"{QKV}.lora_up.weight", torch.ones(384, 3), "do not fit each other"),
    "no up": (f"{QKV}.lora_up.weight", None, "has no lora_up"),
    "zero": (f"{QKV}.lora_up.weight", torch.zeros(384, 4), "changes nothing"),
    "unknown": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", torch.ones(2, 2), "is no layer of SD3"),
    "kind": (f"{QKV}.lora_sideways", torch.ones(2, 2), "no known kind of change"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    key, value, message = DAMAGE[damage]
    file = write_lora(tmp_path / "bad.safetensors", with_(key, value))
    assert main([str(file), "--layers", "--plot", str(tmp_path / "plot.png")]) == 1
    out = capsys.readouterr().out
    assert message in out.partition("Problems:")[2] and (tmp_path / "plot.png").exists()


def test_a_file_for_another_model_is_told_by_its_shapes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_lora(tmp_path / "bad.safetensors", with_(f"{QKV}.lora_up.weight", torch.ones(96, 4)))
    assert main([str(file)]) == 0
    capsys.readouterr()
    assert main([str(file), "--base_model", str(base)]) == 1
    assert f"{QKV} does not fit a layer of [384, 128]" in capsys.readouterr().out


def test_what_can_t_be_read_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "bad.safetensors").write_bytes(b"no file of tensors at all")
    assert main([str(tmp_path / "bad.safetensors")]) == 2
    good = write_lora(tmp_path / "good.safetensors", everything())
    (tmp_path / "precious.png").write_bytes(b"precious")
    assert main([str(good), "--plot", str(tmp_path / "precious.png")]) == 2
    assert (tmp_path / "precious.png").read_bytes() == b"precious"
    assert "--force" in capsys.readouterr().err


def test_a_checkpoint_is_no_lora(base: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(base)]) == 2
    assert "is a checkpoint, not a LoRA" in capsys.readouterr().err


def whole(file: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The clients that read everything."""
    main([str(file), "--json"])
    return {client for client, reason in json.loads(capsys.readouterr().out)["clients"].items() if not reason}


def test_the_clients_that_read_all_of_a_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    comfy = "ComfyUI 0.3.64 or later"
    plain = everything()
    t5 = lora_for_checkpoint(encoders=(None, None, tiny_t5()), train_t5xxl="True")
    cases = {
        "plain": (plain, {comfy, "Forge", "sd-scripts"}),
        "dora": (lora_for_checkpoint(use_dora="True"), {comfy, "Forge"}),
        "diffusers": (to_diffusers(plain), {comfy, "diffusers", "SD.Next in diffusers mode"}),
        "t5": (to_diffusers(t5), {comfy}),
        "oft": ({f"{QKV}.oft_blocks": torch.randn(2, 3, 3), f"{QKV}.alpha": torch.tensor(0.0)}, set()),
        "loha": (
            {
                f"{QKV}.hada_w{n}_{side}": torch.randn(*((384, 4) if side == "a" else (4, 128)))
                for n in (1, 2)
                for side in "ab"
            },
            {comfy, "Forge"},
        ),
    }
    for name, (tensors, expected) in cases.items():
        assert whole(write_lora(tmp_path / f"{name}.safetensors", tensors), capsys) == expected, name
    main([str(tmp_path / "plain.safetensors")])
    out = capsys.readouterr().out
    assert f"Read whole by: {comfy}, Forge, sd-scripts." in out
    assert "diffusers: loads nothing, without an error" in out
