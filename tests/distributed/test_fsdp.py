"""A denoiser shared out over two processes computes what a whole one computes, to the bit, from half of the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.distributed.fsdp import ShardedModel, ShardSettings, mesh_shape, weight_bytes
from library.memory.apply import MemorySettings, apply_memory_optimizations
from library.memory.checkpointing import CheckpointSettings
from library.sd3.mmdit import MMDiT
from tests.sd3.tiny import fill_with_noise, tiny_mmdit_config
from tests.warm_processes import run_ranks

CPU = torch.device("cpu")
RECOMPUTED = CheckpointSettings()
CASES = {
    "plain": (MemorySettings(), ShardSettings(), torch.float32),
    "kept after forward": (MemorySettings(), ShardSettings(reshard_after_forward=False), torch.float32),
    "in host memory": (MemorySettings(checkpointing=RECOMPUTED), ShardSettings(offload=True), torch.bfloat16),
    "recomputed": (MemorySettings(checkpointing=RECOMPUTED), ShardSettings(), torch.float32),
    "some recomputed": (MemorySettings(checkpointing=CheckpointSettings(blocks=2)), ShardSettings(), torch.float32),
    "selective": (MemorySettings(checkpointing=CheckpointSettings(selective=True)), ShardSettings(), torch.float32),
    "inputs offloaded": (
        MemorySettings(checkpointing=CheckpointSettings(offload=True)),
        ShardSettings(),
        torch.float32,
    ),
    "fp8": (MemorySettings(quantization="fp8", checkpointing=RECOMPUTED), ShardSettings(), torch.bfloat16),
    "int8": (MemorySettings(quantization="int8"), ShardSettings(), torch.float32),
    "nf4": (MemorySettings(quantization="nf4", checkpointing=RECOMPUTED), ShardSettings(), torch.float32),
    "lean, and some recomputed": (
        MemorySettings(recompute_pointwise=True, checkpointing=CheckpointSettings(blocks=2)),
        ShardSettings(),
        torch.float32,
    ),
    "float16": (MemorySettings(checkpointing=RECOMPUTED), ShardSettings(), torch.float16),
}


def model_of(settings: MemorySettings, dtype: torch.dtype, sharded: bool) -> tuple[MMDiT, list[nn.Parameter]]:
    """A frozen model, and a trained vector in each block."""
    model = MMDiT(tiny_mmdit_config("5-medium", depth=4, hidden_size=64)).requires_grad_(False)
    fill_with_noise(model)
    model = model.to(dtype)
    apply_memory_optimizations(model, MemorySettings(**{**vars(settings), "sharded": sharded}), CPU)
    trained = []
    for block in model.joint_blocks:
        vector = nn.Parameter(torch.full((64,), 0.1))
        trained.append(vector)
        layer = block.get_submodule("x_block.attn.proj")
        layer.register_forward_hook(lambda layer, args, out, v=vector: out + v.to(out.dtype))
    return model, trained


def inputs(model: MMDiT, height: int, width: int) -> dict[str, Tensor]:
    """A batch of two for `MMDiT.forward`."""
    generator, config = torch.Generator().manual_seed(height * width), model.config
    shapes = {"x": (2, 16, height, width), "context": (2, 5, config.context_size), "pooled": (2, config.pooled_size)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "timestep": torch.tensor([250.0, 700.0])}


def steps(model: MMDiT, trained: list[nn.Parameter], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Two accumulated micro-batches of each process's own size: outputs and gradients."""
    outputs = []
    for number in range(2):
        out = model(**inputs(model, 8 + 2 * rank, 8 + 2 * number))
        out.float().square().mean().backward()
        outputs.append(out.detach())
    return outputs, [vector.grad for vector in trained if vector.grad is not None]


def _compare(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, (memory, settings, dtype) in CASES.items():
        whole, shared = model_of(memory, dtype, sharded=False), model_of(memory, dtype, sharded=True)
        sharded = ShardedModel(shared[0], settings, CPU, [2, 2])
        a, b = steps(*whole, rank), steps(*shared, rank)
        given, previews = inputs(whole[0], 8, 8), []
        with torch.no_grad(), sharded.join_uneven_inputs():
            for _ in range(3 * rank):  # the first process has none to make
                previews.append(torch.equal(whole[0](**given), shared[0](**given)))
        c, d = steps(*whole, rank), steps(*shared, rank)
        found[name] = {
            "outputs": all(torch.equal(x, y) for x, y in zip(a[0] + c[0], b[0] + d[0])),
            "gradients": len(c[1]) == 4 and all(torch.equal(x, y) for x, y in zip(c[1], d[1])),
            "moved": min(float(gradient.abs().max()) for gradient in c[1]),
            "previews": previews,
            "bytes": (sharded.local_bytes, weight_bytes(shared[0]), weight_bytes(whole[0]), sharded.whole_bytes),
        }
    found["dropped out"] = _with_a_block_dropped_out(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _with_a_block_dropped_out(rank: int) -> bool:
    """The second process's first blocks have nothing trained: it takes part in their backward nevertheless."""
    model, trained = model_of(MemorySettings(checkpointing=RECOMPUTED), torch.float32, sharded=True)
    whole, _ = model_of(MemorySettings(), torch.float32, sharded=False)
    ShardedModel(model, ShardSettings(), CPU, [2, 2])
    if rank == 1:
        for vector in trained[:2]:
            vector.requires_grad_(False)
    outputs, gradients = steps(model, trained, rank)
    again, _ = steps(copy.deepcopy(whole), [], rank)
    return len(gradients) == (2 if rank else 4) and all(torch.equal(x, y) for x, y in zip(outputs, again))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharding")
    run_ranks(_compare, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_a_whole_model(found: list[dict[str, Any]], name: str):
    for process in found:
        assert process[name]["outputs"] and process[name]["gradients"]
        assert process[name]["moved"] > 0


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half_of_the_weights_between_the_passes(found: list[dict[str, Any]], name: str):
    shares = [process[name]["bytes"] for process in found]
    for at_first, after_training, whole, told in shares:
        assert at_first == after_training and whole == told
        assert at_first <= 0.51 * whole
    assert sum(share[0] for share in shares) >= shares[0][2]  # nothing is lost; padding may come on top


@pytest.mark.parametrize("name", CASES)
def test_processes_may_make_different_numbers_of_previews(found: list[dict[str, Any]], name: str):
    assert found[0][name]["previews"] == [] and found[1][name]["previews"] == [True] * 3


def test_a_block_without_trained_layers_on_one_process_holds_up_nobody(found: list[dict[str, Any]]):
    assert [process["dropped out"] for process in found] == [True, True]


@pytest.mark.parametrize(
    ("world_size", "local_sizes", "shape"),
    [
        (2, [2, 2], (1, 2)),
        (2, [1, 1], (1, 2)),  # two machines of one device share one copy
        (8, [4] * 8, (2, 4)),  # two machines of four: a copy on each
        (6, [4, 4, 4, 4, 2, 2], (1, 6)),
        (3, [1, 2, 2], (1, 3)),
    ],
)
def test_machines_of_equal_size_hold_a_copy_each(world_size: int, local_sizes: list[int], shape: tuple[int, int]):
    assert mesh_shape(world_size, local_sizes) == shape
