"""Lean activations: the gradients of a plain run to the bit, with much less kept."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from library.memory.apply import MemorySettings, apply_memory_optimizations
from library.memory.checkpointing import CheckpointSettings
from library.memory.estimator.tracker import StorageTracker
from library.sd3.mmdit import MMDiT
from networks.network_modules import network_module
from tests.sd3.tiny import fill_with_noise, tiny_mmdit_config

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def model_and_network(kind: str, settings: MemorySettings, module: str = "networks.lora_sd3", **arguments: str):
    model = MMDiT(tiny_mmdit_config(kind, depth=4))
    fill_with_noise(model)
    apply_memory_optimizations(model, settings, torch.device("cpu"))
    torch.manual_seed(1)
    network = network_module(module).create_network(1.0, 4, 4, None, [None] * 3, model, None, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.train().attach()
    return model, network


def given() -> Given:
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, 16, 8, 8), (2,), (2, 20, 192), (2, 192))
    x, t, context, pooled = (torch.randn(size, generator=generator) for size in sizes)
    return x, t.abs() * 300, context, pooled


def gradients(model: MMDiT, network: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of the LoRA's dropout
    model(*given()).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("medium", "networks.lora_sd3", {}),
        ("5-medium", "networks.lora_sd3", {}),
        ("5-large", "networks.lora_sd3", {"split_qkv": "True", "rank_dropout": "0.3", "module_dropout": "0.2"}),
        ("5-medium", "networks.lora_sd3", {"train_block_indices": "2", "context_mod_dim": "0", "x_mod_dim": "0"}),
        ("5-medium", "networks.lora_sd3", {"use_dora": "True"}),
        ("5-medium", "lycoris.kohya", {"algo": "loha"}),
    ],
)
def test_gradients_are_those_of_a_plain_run_to_the_bit(kind: str, module: str, arguments: dict[str, str]):
    plain = gradients(*model_and_network(kind, MemorySettings(), module, **arguments))
    lean = gradients(*model_and_network(kind, MemorySettings(recompute_pointwise=True), module, **arguments))
    assert plain.keys() == lean.keys() and plain
    for name, gradient in plain.items():
        assert torch.equal(gradient, lean[name]), name
        assert gradient.abs().max() > 0 or "dora" in name or arguments.get("module_dropout")


@pytest.mark.parametrize(
    "settings",
    [
        MemorySettings(recompute_pointwise=True, blocks_to_swap=2),
        MemorySettings(recompute_pointwise=True, checkpointing=CheckpointSettings(blocks=2)),
        MemorySettings(
            recompute_pointwise=True, checkpointing=CheckpointSettings(blocks=1, selective=True), blocks_to_swap=2
        ),
        MemorySettings(recompute_pointwise=True, checkpointing=CheckpointSettings(blocks=2, offload=True)),
    ],
    ids=["swap", "checkpointing", "selective and swap", "offload"],
)
def test_it_goes_with_the_other_savers(settings: MemorySettings):
    plain = gradients(*model_and_network("5-medium", MemorySettings()))
    together = gradients(*model_and_network("5-medium", settings))
    for name, gradient in plain.items():
        assert torch.allclose(gradient, together[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_it_goes_with_quantised_weights(quantization: str):
    plain = gradients(*model_and_network("5-large", MemorySettings(quantization=quantization)))
    lean = gradients(*model_and_network("5-large", MemorySettings(quantization=quantization, recompute_pointwise=True)))
    assert all(torch.equal(plain[name], lean[name]) for name in plain)


def kept(settings: MemorySettings) -> int:
    """Bytes between a forward and its backward."""
    model, network = model_and_network("5-large", settings)
    batch = given()
    tracker = StorageTracker()
    tracker.watch([*model.parameters(), *model.buffers(), *network.parameters(), *batch])
    start = tracker.live
    with tracker:
        velocity = model(*batch)
    bytes_kept = tracker.live - start
    del velocity
    return bytes_kept


def test_about_half_is_kept():
    assert kept(MemorySettings(recompute_pointwise=True)) < 0.65 * kept(MemorySettings())


def test_nothing_is_left_over_after_backward():
    model, network = model_and_network("5-medium", MemorySettings(recompute_pointwise=True))
    gradients(model, network)
    network.zero_grad()
    gc.collect()
    tracker = StorageTracker()
    tracker.watch([*model.parameters(), *model.buffers(), *network.parameters()])
    start = tracker.live
    with tracker:
        gradients(model, network)
        network.zero_grad()
    assert tracker.live == start


def test_without_gradients_and_after_an_error_blocks_are_plain():
    model, _ = model_and_network("5-medium", MemorySettings(recompute_pointwise=True))
    with torch.no_grad():
        quiet = model(*given())
    assert torch.equal(quiet, model(*given()))
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 16, 8, 8), torch.zeros(1), torch.zeros(1, 5, 7), torch.zeros(1, 192))
    assert not any("forward" in vars(module) for module in model.modules())
