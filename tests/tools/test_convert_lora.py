"""convert_lora.py: either layout to the other, and nothing lost on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from networks.diffusers_layout import to_diffusers
from tests.networks.models import QKV, tiny_t5
from tests.tools.loras import changes, lora_for_checkpoint, lora_tensors, run_script, write_lora
from tools.convert_lora import main


def test_there_and_back_by_the_real_command_and_by_main(tmp_path: Path):
    tensors = lora_tensors(alpha=4.0)
    kohya = write_lora(tmp_path / "kohya.safetensors", tensors, ss_network_dim="4", sshs_model_hash="of another file")
    theirs, back = tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    ran = run_script("convert_lora", "--model", kohya, "--save_to", theirs)
    assert ran.returncode == 0, ran.stderr
    assert "layers in diffusers's layout" in ran.stdout
    actual = load_file(theirs)
    assert actual.keys() == to_diffusers(tensors).keys()
    assert main(["--model", str(theirs), "--save_to", str(back)]) == 0
    again = load_file(back)
    assert again.keys() == tensors.keys()
    for name, change in changes(tensors).items():
        torch.testing.assert_close(changes(again)[name], change)
    metadata = safe_open(theirs, "pt").metadata()
    body = theirs.read_bytes()
    body = body[8 + int.from_bytes(body[:8], "little") :]
    assert metadata["ss_network_dim"] == "4"
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


def test_precision_of_the_output_can_be_chosen(tmp_path: Path):
    kohya = write_lora(tmp_path / "kohya.safetensors", lora_tensors())
    assert (
        main(["--model", str(kohya), "--save_to", str(tmp_path / "out.safetensors"), "--save_precision", "bf16"]) == 0
    )
    assert {tensor.dtype for tensor in load_file(tmp_path / "out.safetensors").values()} == {torch.bfloat16}


def test_t5_layers_are_converted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = lora_for_checkpoint(encoders=(None, None, tiny_t5()), train_t5xxl="True")
    kohya = write_lora(tmp_path / "kohya.safetensors", tensors)
    with caplog.at_level("WARNING", "tools.convert_lora"):
        assert main(["--model", str(kohya), "--save_to", str(tmp_path / "out.safetensors")]) == 0
    assert "14 layers are T5's" in caplog.text
    assert any(key.startswith("text_encoders.t5xxl.transformer.") for key in load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{kohya}", "--save_to", "{kohya}", "--force"], "is one of the files that are read"),
        (["--model", "{kohya}", "--save_to", "{other}"], "is there already. Give another name, or --force"),
        (["--model", "{kohya}", "--save_to", "{new}", "--to", "kohya"], "is in kohya's layout already"),
        (["--model", "{dora}", "--save_to", "{new}"], "is a DoRA, which diffusers does not read"),
        (["--model", "{damaged}", "--save_to", "{new}"], "is damaged, in lora_unet_joint_blocks_0_x_block_attn_qkv"),
        (["--model", "{missing}", "--save_to", "{new}"], "does not exist"),
        (["--model", "{kohya}", "--save_to", "out.ckpt"], "give a name that ends so"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damaged = lora_tensors() | {QKV + ".alpha": torch.ones(3)}
    files = {
        "damaged": write_lora(tmp_path / "damaged.safetensors", damaged),
        "kohya": write_lora(tmp_path / "kohya.safetensors", lora_tensors()),
        "dora": write_lora(tmp_path / "dora.safetensors", lora_tensors(use_dora="True")),
        "other": tmp_path / "other.safetensors",
        "new": tmp_path / "new.safetensors",
        "missing": tmp_path / "missing.safetensors",
    }
    files["other"].write_bytes(b"precious")
    before = files["kohya"].read_bytes()
    assert main([word.format(**files) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not files["new"].exists() and files["kohya"].read_bytes() == before
    assert files["other"].read_bytes() == b"precious"
