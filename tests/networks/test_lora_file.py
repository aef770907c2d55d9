"""LoRA files of diffusers' and PEFT's layout are read wherever one of kohya's is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.common.errors import UserError
from networks.base_weights import BaseWeights
from networks.diffusers_layout import to_diffusers
from networks.lora_file import check_lora_file, names_in_file, read_lora
from networks.lora_sd3 import create_network, create_network_from_weights
from networks.weight_files import write_network_file
from tests.networks.models import tiny_clip, tiny_mmdit, trained

EXTENSIONS = [".safetensors", ".pt"]


def models() -> tuple[list[nn.Module | None], nn.Module]:
    torch.manual_seed(3)
    return [tiny_clip(), None, None], tiny_mmdit()


@pytest.fixture
def original() -> dict[str, Tensor]:
    return trained(create_network(1.0, 4, 4.0, None, *models())).state_dict_for_saving()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_diffusers_file_is_read_as_the_kohya_file_that_it_was(original, tmp_path: Path, extension: str):
    path = tmp_path / f"theirs{extension}"
    write_network_file(path, to_diffusers(original))
    lora = read_lora(path)
    assert lora.layout == "diffusers" and lora.tensors.keys() == original.keys()
    assert all(torch.equal(lora.tensors[key], tensor) for key, tensor in original.items())
    assert names_in_file(path) == {key.partition(".")[0] for key in original}
    assert check_lora_file(path) == []


def test_networks_and_base_weights_take_both_layouts_alike(original, tmp_path: Path):
    write_network_file(tmp_path / "kohya.safetensors", original)
    write_network_file(tmp_path / "theirs.safetensors", to_diffusers(original))
    states = []
    for name in ("kohya", "theirs"):
        path = str(tmp_path / f"{name}.safetensors")
        encoders, model = models()
        fresh = create_network(1.0, 4, 4.0, None, encoders, model)
        fresh.load_weights(path)
        by_file, _ = create_network_from_weights(1.0, path, None, encoders, model)
        assert BaseWeights([(path, 0.7)]).merge(encoders, model) == len(fresh.layers)
        merged = {f"model.{key}": value for key, value in model.state_dict().items()}
        states.append(fresh.state_dict_for_saving() | merged)
        assert by_file.state_dict_for_saving().keys() == fresh.state_dict_for_saving().keys()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_preflight_reads_the_header_alone_and_names_what_is_unknown(tmp_path: Path):
    problems = {}
    for name, key in {
        "kohya": "lora_unet_joint_blocks_0_x_block_attn_proj.lora_up.weight",
        "peft": "base_model.model.transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "flux": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "checkpoint": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    }.items():
        save_file({key: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
        problems[name] = " ".join(check_lora_file(tmp_path / f"{name}.safetensors"))
    assert problems["kohya"] == problems["peft"] == ""
    assert "no layer of SD3: transformer.single_transformer_blocks.0.attn.to_q" in problems["flux"]
    assert "no part of a plain LoRA in kohya's, diffusers' or PEFT's layout" in problems["checkpoint"]
    assert "does not exist" in check_lora_file(tmp_path / "absent.safetensors")[0]
    assert "does not exist" in check_lora_file(tmp_path / "absent.pt")[0]


def test_a_file_of_pairs_that_do_not_fit_is_refused(original, tmp_path: Path):
    theirs = to_diffusers(original)
    del theirs["transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight"]
    write_network_file(tmp_path / "a.safetensors", theirs)
    with pytest.raises(UserError, match=r"missing, or they do not fit each other: transformer\.transformer_blocks\.0"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_pefts_own_counts_the_alphas_in_the_file_beside_it(original, tmp_path: Path, rslora: bool, caplog):
    """PEFT divides by the rank, or with rsLoRA by its root."""
    theirs = {
        f"base_model.model.{key.removeprefix('transformer.')}": tensor for key, tensor in to_diffusers(original).items()
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in theirs.items() if "text_encoder" not in key}, path)
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    assert read_lora(path).tensors[name + ".alpha"] == 4 and "alphas are taken to be the ranks" in caplog.text
    config = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "alpha_pattern": {"to_out.0": 2}, "rank_pattern": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors, root = read_lora(path).tensors, 2.0 if rslora else 1.0  # a file's own alpha is divided by the rank, 4
    assert tensors[name + ".alpha"] == 2 * root
    assert tensors["lora_unet_joint_blocks_0_x_block_mlp_fc2.alpha"] == 6 * root
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match="alphas that are no numbers"):
        read_lora(path)
