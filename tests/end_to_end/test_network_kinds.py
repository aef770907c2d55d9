"""Every kind of network, trained by the real command, saved, gone on from and merged: all three are the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.common.errors import UserError
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train

LYCORIS = "lycoris.kohya"
KINDS = {
    "plain": ("networks.lora_sd3", ()),
    "everywhere": ("networks.lora_sd3", ("emb_dims=[2,3,4,5,6,7]", "conv_dim=3", "train_block_indices=1")),
    "split": ("networks.lora_sd3", ("split_qkv=True", "rank_dropout=0.1", "module_dropout=0.1")),
    "plus": ("networks.lora_sd3", ("loraplus_lr_ratio=4", "use_rslora=True", "context_mod_dim=0")),
    "dora": ("networks.lora_sd3", ("use_dora=True",)),
    "pissa": ("networks.lora_sd3", ("init=pissa",)),
    "orthogonal": ("networks.lora_sd3", ("init=orthogonal",)),
    "locon": (LYCORIS, ("algo=locon",)),
    "loha": (LYCORIS, ("algo=loha",)),
    "lokr": (LYCORIS, ("algo=lokr", "factor=4")),
    "full": (LYCORIS, ("algo=full",)),
    "glora": (LYCORIS, ("algo=glora",)),
    "oft": (LYCORIS, ("algo=diag-oft",)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_network_goes_on_and_merges_as_it_was_trained(workshop: Workshop, tmp_path: Path, kind: str):
    module, arguments = KINDS[kind]
    if module == LYCORIS:
        pytest.importorskip("lycoris")
    words = (UNET, "--network_args", *arguments)
    made = {"network_module": module, "network_dim": 4, "network_alpha": 2, "learning_rate": "0.02"}
    trained = train(workshop, tmp_path / "a", *words, **made)
    file = tmp_path / "a" / "lora.safetensors"
    assert all(torch.isfinite(tensor.float()).all() for tensor in trained.weights().values())
    still = {"max_train_steps": 1, "learning_rate": "1e-9"}  # the first loss is that of the weights as loaded
    from_file = train(
        workshop, tmp_path / "b", UNET, "--dim_from_weights", network_module=module, network_weights=file, **still
    )
    merged = train(workshop, tmp_path / "c", UNET, base_weights=file, **still)
    bare = train(workshop, tmp_path / "d", UNET, **still)
    assert from_file.losses == pytest.approx(merged.losses, rel=1e-4)
    assert abs(merged.losses[0] - bare.losses[0]) > 1e-5
    if kind in ("plain", "split", "dora", "pissa", "loha"):  # the same arguments make a network that the file fits
        again = train(
            workshop, tmp_path / "e", *words[:-1], words[-1].replace("0.1", "0"), **(made | still), network_weights=file
        )
        assert again.weights().keys() == trained.weights().keys()


@pytest.mark.parametrize("arguments", [("use_dora=True",), ("init=pissa",)], ids=["dora", "pissa"])
@pytest.mark.parametrize("memory", [("--fp8_base_unet",), ("--base_quantization", "nf4")], ids=["fp8", "nf4"])
def test_dora_and_pissa_start_from_quantised_weights(workshop: Workshop, tmp_path: Path, arguments, memory):
    """Neither changes the model before its first step."""
    still = {"max_train_steps": 1, "learning_rate": "1e-9"}
    plain = train(workshop, tmp_path / "a", UNET, *memory, **still)
    kind = train(workshop, tmp_path / "b", UNET, *memory, "--network_args", *arguments, **still)
    assert kind.losses == pytest.approx(plain.losses, rel=1e-3)


def test_norms_are_capped_and_logged(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, UNET, scale_weight_norms="0.01", network_args="split_qkv=True", learning_rate="0.1")
    weights = run.weights()
    for name in {key.split(".")[0] for key in weights}:
        down, up = weights[f"{name}.lora_down.weight"], weights[f"{name}.lora_up.weight"]
        assert (up @ down * (weights[f"{name}.alpha"] / len(down))).norm() < 0.0101
    assert run.values("max_norm/max_key_norm")[-1] == pytest.approx(0.01, rel=0.01)
    with pytest.raises(UserError, match="scale_weight_norms can't cap a LoRA with init=pissa"):
        train(workshop, tmp_path, UNET, scale_weight_norms="0.01", network_args="init=pissa")
