"""Networks of every kind act the same on a model whose weights are shared out over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from library.common.transformer import call_block
from library.distributed.fsdp import ShardedModel, ShardSettings
from library.memory.checkpointing import CheckpointSettings, checkpointed
from networks.lora_sd3 import first_block
from tests.networks.models import tiny_mmdit
from tests.networks.test_with_memory_savers import NETWORKS, attached, step
from tests.warm_processes import run_ranks


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name in NETWORKS:
        whole, shared = tiny_mmdit(depth=3), tiny_mmdit(depth=3)
        plain, network = attached(name, whole), attached(name, shared)
        shared.run_block = checkpointed(call_block, CheckpointSettings(blocks=2), None)
        ShardedModel(shared, ShardSettings(), torch.device("cpu"), [2, 2], first_block(network.layers))
        for _ in range(2):
            plain.zero_grad()
            network.zero_grad()
            expected, gradients = step(whole, plain)
            out, ours = step(shared, network)
        results[name] = (
            torch.equal(out, expected)
            and any(gradient is not None for gradient in gradients.values())
            and all(
                ours[key] is None if value is None else torch.equal(ours[key], value)
                for key, value in gradients.items()
            )
        )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bool]]:
    folder: Path = tmp_path_factory.mktemp("shared_base")
    run_ranks(_work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NETWORKS)
def test_sharing_the_base_changes_nothing(results: list[dict[str, bool]], name: str):
    assert [process[name] for process in results] == [True, True]


def test_the_first_block_with_layers_is_known_by_their_names():
    later = ["lora_unet_joint_blocks_7_x_block_mlp_fc1", "lora_unet_joint_blocks_12_context_block_attn_qkv"]
    assert first_block(later) == 7
    assert first_block([*later, "lora_te1_text_model_encoder_layers_0_mlp_fc1"]) == 0
    assert first_block([*later, "lora_unet_context_embedder"]) == 0
