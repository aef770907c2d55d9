"""Activation checkpointing of every kind gives the gradients of the plain run, and keeps less."""

from __future__ import annotations

import pytest
import torch

from library.common.transformer import call_block
from library.memory.block_swap import BlockSwapper
from library.memory.checkpointing import ActivationOffloader, CheckpointSettings, checkpointed
from library.sd3.mmdit import MMDiT
from tests.memory.test_block_swap import CPU, DEPTH, model_with_adapter
from tests.sd3.test_mmdit import inputs

SETTINGS = {
    "all": CheckpointSettings(),
    "four": CheckpointSettings(blocks=4),
    "selective": CheckpointSettings(selective=True),
    "offload": CheckpointSettings(offload=True),
    "offload-selective": CheckpointSettings(offload=True, selective=True),
}


def with_settings(settings: CheckpointSettings) -> tuple[MMDiT, torch.nn.Parameter, ActivationOffloader | None]:
    model, adapter = model_with_adapter()
    offloader = ActivationOffloader(CPU) if settings.offload else None
    model.run_block = checkpointed(call_block, settings, offloader)
    return model, adapter, offloader


def saved_bytes(model: MMDiT) -> int:
    """Bytes that autograd keeps between forward and backward, weights left out."""
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(**inputs(model.config, 16, 16))
    out.sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("kind", SETTINGS)
def test_gradients_equal_the_plain_run(kind: str):
    plain, plain_adapter = model_with_adapter()
    model, adapter, _ = with_settings(SETTINGS[kind])
    given = inputs(plain.config, 8, 12)
    for _ in range(3):
        plain(**given).square().mean().backward()
        model(**given).square().mean().backward()
    torch.testing.assert_close(adapter.grad, plain_adapter.grad, rtol=1e-6, atol=1e-7)


def test_more_checkpointed_blocks_keep_fewer_activations():
    kept = [saved_bytes(with_settings(CheckpointSettings(blocks=n))[0]) for n in (0, 3, DEPTH)]
    assert kept[0] > 1.5 * kept[1] > 1.5 * 1.5 * kept[2]


def test_selective_keeps_attention_and_recomputes_the_rest():
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountAttention(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "scaled_dot_product" in name and "backward" not in name:
                CountAttention.calls += 1
            return function(*args, **(kwargs or {}))

    calls = {}
    for kind in ("all", "selective"):
        model, _, _ = with_settings(SETTINGS[kind])
        CountAttention.calls = 0
        with CountAttention():
            model(**inputs(model.config, 8, 8)).sum().backward()
        calls[kind] = CountAttention.calls
    attentions = DEPTH + len(model.config.dual_attention_blocks)
    assert calls == {"all": 2 * attentions, "selective": attentions}


def test_offloaded_inputs_reuse_their_host_buffers():
    model, _, offloader = with_settings(SETTINGS["offload"])
    given = inputs(model.config, 8, 8)
    model(**given).sum().backward()
    buffers = {b.data_ptr() for spare in offloader.spare.values() for b in spare}
    assert len(buffers) == 2 * DEPTH  # context and x of each block
    model(**given).sum().backward()
    assert {b.data_ptr() for spare in offloader.spare.values() for b in spare} == buffers


def test_images_of_many_sizes_share_host_buffers():
    """Pinned memory for every bucket of its own would fill a host."""
    model, _, offloader = with_settings(SETTINGS["offload"])
    for height, width in ((16, 16), (12, 20), (20, 12), (14, 18)):  # of about one area, as buckets are
        model(**inputs(model.config, height, width)).sum().backward()
    assert sum(len(spare) for spare in offloader.spare.values()) == 2 * DEPTH


def test_swap_and_checkpointing_and_offloading_work_together():
    plain, plain_adapter = model_with_adapter()
    model, adapter, offloader = with_settings(SETTINGS["offload"])
    model.run_block = BlockSwapper(model.joint_blocks, [0, 2, 4, 5], CPU).runner(model.run_block)
    given = inputs(plain.config, 8, 8)
    plain(**given).square().mean().backward()
    model(**given).square().mean().backward()
    torch.testing.assert_close(adapter.grad, plain_adapter.grad, rtol=1e-6, atol=1e-7)
    assert offloader is not None
