"""Quantised base weights: small errors, right gradients, and they work under swap and checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.memory.block_swap import BlockSwapper
from library.memory.checkpointing import CheckpointSettings, checkpointed
from library.memory.quantize import FP8_MAX, Fp8Linear, in_joint_blocks, quantise
from library.sd3.mmdit import call_block
from tests.memory.test_block_swap import CPU, model_with_adapter
from tests.sd3.test_mmdit import inputs

# Relative error of the velocity of a small random model, and of a layer's weight for fp8 (half a unit in 3 mantissa bits).
LARGEST_ERROR = {"fp8": 0.06, "int8": 0.06, "nf4": 0.25}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_fp8_rows_are_within_half_a_unit_and_use_the_whole_range():
    weight = torch.randn(32, 200) * torch.logspace(-4, 3, 32)[:, None]
    quantised, scale = Fp8Linear.quantise(weight)
    assert quantised.dtype == torch.float8_e4m3fn and scale.shape == (32, 1)
    assert torch.equal(quantised.float().abs().amax(1), torch.full((32,), FP8_MAX))
    error = (Fp8Linear.widen(quantised, scale, weight.shape, torch.float32) - weight).abs()
    assert (error <= weight.abs() / 16 * 1.0001 + scale * 2**-9).all()


def test_fp8_gradient_is_that_of_the_widened_layer_and_keeps_no_wide_copy():
    layer = nn.Linear(24, 40).requires_grad_(False)
    quantised = Fp8Linear.of(copy.deepcopy(layer))
    wide = nn.Linear(24, 40).requires_grad_(False)
    wide.weight.data = quantised.widen(quantised.weight, quantised.weight_scale, quantised.shape, torch.float32)
    wide.bias.data = layer.bias.data
    x, x2 = (torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = quantised(x)
    wide_out = wide(x2)
    assert torch.equal(out, wide_out)
    out.square().sum().backward()
    wide_out.square().sum().backward()
    assert torch.equal(x.grad, x2.grad)
    assert {t.dtype for t in saved if t.numel() == 24 * 40} == {torch.float8_e4m3fn}


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_output_and_gradient_are_near_those_of_the_full_base(kind: str):
    plain, plain_adapter = model_with_adapter()
    model, adapter = model_with_adapter()
    count = quantise(model, kind, in_joint_blocks)
    assert count == sum(isinstance(m, nn.Linear) for n, m in plain.named_modules() if in_joint_blocks(n))
    given = inputs(plain.config, 8, 8)
    wanted, found = plain(**given), model(**given)
    assert 1e-4 < relative_error(found, wanted) < LARGEST_ERROR[kind]
    wanted.square().mean().backward()
    found.square().mean().backward()
    assert relative_error(adapter.grad, plain_adapter.grad) < 2 * LARGEST_ERROR[kind]


def test_a_float8_checkpoint_is_taken_as_it_is():
    layer = nn.Linear(8, 8).requires_grad_(False)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    stored = layer.weight.data.clone()
    quantised = Fp8Linear.of(layer)
    assert torch.equal(quantised.weight.view(torch.uint8), stored.view(torch.uint8))
    torch.testing.assert_close(quantised(torch.eye(8)) - layer.bias, stored.float().T)


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_swapping_and_checkpointing_quantised_blocks_changes_nothing(kind: str):
    results = []
    for swapped in ([], [0, 2, 3]):
        model, adapter = model_with_adapter()
        quantise(model, kind, in_joint_blocks)
        run = checkpointed(call_block, CheckpointSettings(), None)
        model.run_block = BlockSwapper(model.joint_blocks, swapped, CPU).runner(run) if swapped else run
        out = model(**inputs(model.config, 8, 8))
        out.square().mean().backward()
        results.append((out.detach(), adapter.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", LARGEST_ERROR)
def test_using_a_quantised_layer_asks_the_host_for_no_table(kind: str, monkeypatch):
    """On a GPU a tensor made from Python's numbers is sent by a copy that waits for all work under way."""
    model = nn.Sequential(nn.Linear(64, 128)).requires_grad_(False)
    quantise(model, kind, lambda path: True)

    def refuse(*args, **more):
        raise AssertionError("a table is sent to the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    x = torch.randn(3, 64).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
