"""LoRA files are read with care and written whole."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from library.common.errors import UserError
from networks.lora_file import layers_of_file
from networks.merging import check_change
from networks.weight_files import group_by_layer, in_dtype, read_network_file, write_network_file

TENSORS = {"lora_unet_a.lora_up.weight": torch.randn(3, 2), "lora_unet_a.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin"])
def test_round_trip(suffix: str, tmp_path):
    path = tmp_path / "folder" / f"a{suffix}"
    write_network_file(path, TENSORS, {"key": "value"})
    actual = read_network_file(path)
    assert actual.keys() == TENSORS.keys()
    assert all(torch.equal(actual[key], TENSORS[key]) for key in TENSORS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_absent_files_are_named(tmp_path):
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(UserError, match="does not exist"):
            read_network_file(tmp_path / name)


def test_damaged_files_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    files = {
        "short.safetensors": struct.pack("<Q", len(header)) + header + b"\0" * 7,
        "huge.safetensors": struct.pack("<Q", 2**62) + b"{}",
        "text.safetensors": b"this is no file of weights at all",
        "text.pt": b"this is no file of weights at all",
        "empty.pt": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_network_file(tmp_path / name)


class Trap:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickles_that_would_run_code_are_refused(tmp_path, capsys):
    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match=r"trap\.pt"):
        read_network_file(tmp_path / "trap.pt")
    assert "never run" not in capsys.readouterr().out


def test_other_content_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="other things than tensors"):
        read_network_file(tmp_path / "a.pt")


def test_grouping_by_layer():
    assert group_by_layer(TENSORS, "x") == {
        "lora_unet_a": {"lora_up.weight": TENSORS["lora_unet_a.lora_up.weight"], "alpha": TENSORS["lora_unet_a.alpha"]}
    }


def test_a_file_of_another_layout_is_named(tmp_path):
    save_file({"text_encoder.layers.0.lora_A.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not those of the kohya layout"):
        group_by_layer(read_network_file(tmp_path / "a.safetensors"), "a.safetensors")
    with pytest.raises(UserError, match="holds no tensors"):
        group_by_layer({}, "a.safetensors")


@pytest.mark.parametrize("value", [0.0, 1.0, 48.0, 1.2345, 1e5])
def test_single_numbers_keep_their_value(value: float):
    tensor = torch.tensor(value)
    assert in_dtype("scalar", tensor, torch.float16).item() == tensor.item()
    assert in_dtype("lora_up.weight", torch.randn(3), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("suffix", ["dora_scale", "alpha"])
def test_magnitudes_and_alphas_stay_float32(suffix: str):
    tensor = torch.randn(1, 5)
    assert torch.equal(in_dtype(f"lora_unet_a.{suffix}", tensor, torch.bfloat16), tensor)


@pytest.mark.parametrize(
    ("down", "up", "alpha"), [((), (4,), ()), ((0, 64), (64, 0), ()), ((4,), (4, 4), ()), ((4, 64), (64, 4), (2,))]
)
def test_a_file_of_flat_tensors_is_refused(tmp_path, down, up, alpha):
    name = "lora_unet_layer"
    shapes = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    save_file({f"{name}.{key}": torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="too few dimensions"):
        layers_of_file(str(tmp_path / "a.safetensors"), None, {name: torch.nn.Linear(64, 64)})
    assert "alpha" in str(
        check_change(name, {"alpha": torch.zeros(2), "diff": torch.zeros(64, 64)}, torch.nn.Linear(64, 64))
    )
    assert check_change(name, {"diff": torch.zeros(())}, torch.nn.Linear(64, 64))
    assert check_change(name, {"diff": torch.zeros(64, 64), "dora_scale": torch.zeros(3)}, torch.nn.Linear(64, 64))
