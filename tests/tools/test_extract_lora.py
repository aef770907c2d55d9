"""extract_lora.py: what was merged into a checkpoint comes out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.sd3.tiny import PREFIXES, tiny_checkpoint, tiny_clip
from tests.tools.loras import changes, lora_for_checkpoint, run_script, write_lora
from tools import merge_lora
from tools.extract_lora import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors, and tuned.safetensors: the same with a LoRA of MMDiT and CLIP-L merged in."""
    folder = tmp_path_factory.mktemp("extract")
    base = tiny_checkpoint(folder / "base.safetensors", "5-medium")
    lora = write_lora(folder / "lora.safetensors", lora_for_checkpoint(encoders=[tiny_clip("clip_l")]))
    words = ["--models", str(lora), "--base_model", str(base), "--save_to", str(folder / "tuned.safetensors")]
    assert merge_lora.main(words) == 0
    return folder


def words(folder: Path, *more: object) -> list[str]:
    models = ["--model_org", folder / "base.safetensors", "--model_tuned", folder / "tuned.safetensors"]
    return [str(word) for word in [*models, *more]]


def test_the_real_command_gives_back_the_lora_that_was_merged(folder: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    ran = run_script("extract_lora", *words(folder, "--save_to", out, "--dim", 4))
    assert ran.returncode == 0, ran.stderr
    original, actual = load_file(folder / "lora.safetensors"), load_file(out)
    assert changes(actual).keys() == changes(original).keys()
    for name, change in changes(original).items():
        torch.testing.assert_close(
            changes(actual)[name], change, rtol=1e-3, atol=1e-5 * float(change.abs().max()) + 1e-6
        )
    assert safe_open(out, "pt").metadata()["ss_base_model_version"] == "5-medium"
    total = next(line for line in ran.stdout.splitlines() if "mean rank" in line)
    assert total.split()[-2] == "100.00"


def test_rank_by_energy_and_text_encoders_left_out(folder: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    more = ["--save_to", out, "--dim", 4, "--dynamic_method", "energy", "--dynamic_param", 0.5, "--unet_only"]
    assert main(words(folder, *more)) == 0
    actual = load_file(out)
    assert all(key.startswith("lora_unet_") for key in actual)
    original = changes(load_file(folder / "lora.safetensors"))
    for name, change in changes(actual).items():
        rank = actual[name + ".lora_down.weight"].shape[0]
        s = torch.linalg.svdvals(original[name])
        energy = s.square().cumsum(0) / s.square().sum()
        assert energy[rank - 1] > 0.5 - 1e-4 and (rank == 1 or energy[rank - 2] < 0.5 + 1e-4)
        assert (change - original[name]).norm() == pytest.approx(float(s[rank:].norm()), rel=1e-3)


def test_what_no_lora_can_hold_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tuned = load_file(folder / "tuned.safetensors")
    tuned[PREFIXES["mmdit"] + "final_layer.linear.bias"] += 1
    save_file(tuned, str(tmp_path / "tuned.safetensors"))
    (tmp_path / "base.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    with caplog.at_level("WARNING", "tools.extract_lora"):
        assert main(words(tmp_path, "--save_to", tmp_path / "out.safetensors")) == 0
    assert "1 tensors differ that no LoRA can hold" in caplog.text and "final_layer.linear.bias" in caplog.text


@pytest.mark.parametrize(
    ("tuned", "message"),
    [("base.safetensors", "have the same weights"), ("other.safetensors", "models of different kinds or sizes")],
)
def test_models_without_a_difference_are_told(
    tuned: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny_checkpoint(folder / "other.safetensors", "medium")
    files = ["--model_org", str(folder / "base.safetensors"), "--model_tuned", str(folder / tuned)]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / tuned).read_bytes())
    assert main([*files[:3], str(copy), "--save_to", str(tmp_path / "out.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
