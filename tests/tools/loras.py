"""LoRA files for the tools' tests, and a way to call a tool's main and see what it prints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor

from library.common.files import save_safetensors
from library.sd3.mmdit import MMDiT
from networks.lora_sd3 import create_network
from networks.weight_files import group_by_layer
from tests.networks.models import tiny_mmdit, trained
from tests.sd3.tiny import tiny_mmdit_config
from tests.warm_processes import run_python

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {"emb_dims": "[2,3,4,2,3,2]"}


def lora_tensors(seed: int = 5, rank: int = 4, alpha: float = 3.0, dtype=None, **arguments: str) -> dict[str, Tensor]:
    """A trained LoRA for tests.networks.models.tiny_mmdit, embedders and all."""
    torch.manual_seed(seed)
    network = create_network(1.0, rank, alpha, None, [], tiny_mmdit(), **{**EVERYTHING, **arguments})
    return trained(network, seed=seed).state_dict_for_saving(dtype)


def lora_for_checkpoint(kind: str = "5-medium", seed: int = 5, encoders=(), **arguments: str) -> dict[str, Tensor]:
    """A trained LoRA for tests.sd3.tiny.tiny_checkpoint of this kind. encoders: CLIP-L, CLIP-G, T5 or None for each."""
    mmdit = MMDiT(tiny_mmdit_config(kind)).requires_grad_(False)
    arguments = {**EVERYTHING, **arguments}
    torch.manual_seed(seed)
    return trained(
        create_network(1.0, 4, 3.0, None, list(encoders), mmdit, **arguments), seed=seed
    ).state_dict_for_saving()


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each plain LoRA adds to its layer's weight, as a matrix [out, in * kernel] in float64."""
    return {
        name: t["lora_up.weight"].double().flatten(1)
        @ t["lora_down.weight"].double().flatten(1)
        * (float(t["alpha"]) / t["lora_down.weight"].shape[0])
        for name, t in group_by_layer(tensors, "test").items()
    }


def write_lora(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_safetensors(path, tensors, metadata)
    return path


def run_script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return run_python([str(ROOT / "tools" / f"{name}.py"), *map(str, words)])
