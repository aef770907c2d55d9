"""Quantised base weights: small errors, right gradients, and they work under swap and checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.common.transformer import call_block
from library.memory.block_swap import BlockSwapper
from library.memory.checkpointing import CheckpointSettings, checkpointed
from library.memory.quantization import (
    FP8_MAX,
    Fp8Linear,
    Fp8MatmulLinear,
    fp8_matmul_problems,
    quantize,
    quantize_blocks,
)
from tests.memory.test_block_swap import CPU, model_with_adapter
from tests.sd3.test_mmdit import inputs

# Relative error of the velocity of a small random model, and of a layer's weight for fp8 (half a unit in 3 mantissa bits).
LARGEST_ERROR = {"fp8": 0.06, "int8": 0.06, "nf4": 0.25}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_fp8_rows_are_within_half_a_unit_and_use_the_whole_range():
    weight = torch.randn(32, 200) * torch.logspace(-4, 3, 32)[:, None]
    quantised, scale = Fp8Linear.quantize(weight)
    assert quantised.dtype == torch.float8_e4m3fn and scale.shape == (32, 1)
    assert torch.equal(quantised.float().abs().amax(1), torch.full((32,), FP8_MAX))
    error = (Fp8Linear.dequantize(quantised, scale, weight.shape, torch.float32) - weight).abs()
    assert (error <= weight.abs() / 16 * 1.0001 + scale * 2**-9).all()


def test_fp8_gradient_is_that_of_the_widened_layer_and_keeps_no_wide_copy():
    layer = nn.Linear(24, 40).requires_grad_(False)
    quantised = Fp8Linear.of(copy.deepcopy(layer))
    wide = nn.Linear(24, 40).requires_grad_(False)
    wide.weight.data = quantised.dequantize(quantised.weight, quantised.weight_scale, quantised.shape, torch.float32)
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
    count = quantize_blocks(model.blocks, kind)
    assert count == sum(isinstance(m, nn.Linear) for n, m in plain.named_modules() if n.startswith("joint_blocks."))
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
        quantize_blocks(model.blocks, kind)
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
    quantize(model, kind, lambda path: True)

    def refuse(*args, **more):
        raise AssertionError("a table is sent to the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    x = torch.randn(3, 64).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


# --- products of float8 numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_float8_product_is_that_of_the_rounded_numbers(shape: tuple[int, ...], bias: bool):
    """Against the same numbers widened to float64: only sums round."""
    layer = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    product = Fp8MatmulLinear.of(copy.deepcopy(layer))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, shape[-2])[:, None]
    tokens, scale = Fp8Linear.quantize(x.flatten(0, -2))
    rounded = (tokens.double() * scale.double()).view(shape)
    weight = product.weight.double() * product.weight_scale.double()
    wanted = rounded @ weight.T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(product(x).double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert relative_error(product(x), layer(x)) < 0.06


def test_the_gradient_through_a_float8_product_is_that_of_the_widened_layer_and_keeps_no_activations():
    layer = nn.Linear(64, 48).requires_grad_(False)
    product, widened = Fp8MatmulLinear.of(copy.deepcopy(layer)), Fp8Linear.of(copy.deepcopy(layer))
    x, x2 = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    gradient, saved = torch.randn(3, 5, 48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = product(x)
    out.backward(gradient)
    widened(x2).backward(gradient)
    assert torch.equal(x.grad, x2.grad)
    assert {t.numel() for t in saved} == {64 * 48, 48}


def test_with_float8_products_tokens_multiply_so_and_modulation_does_not():
    plain, plain_adapter = model_with_adapter()
    model, adapter = model_with_adapter()
    quantize_blocks(model.blocks, "fp8", fp8_matmul=True)
    kinds = {path: type(layer) for path, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert {path for path, kind in kinds.items() if kind is Fp8Linear} == {path for path in kinds if "adaLN" in path}
    given = inputs(plain.config, 8, 8)
    wanted, found = plain(**given), model(**given)
    assert 1e-4 < relative_error(found, wanted) < 0.08
    wanted.square().mean().backward()
    found.square().mean().backward()
    assert relative_error(adapter.grad, plain_adapter.grad) < 0.16


def test_swapping_and_checkpointing_blocks_with_float8_products_changes_nothing():
    results = []
    for swapped in ([], [0, 2, 3]):
        model, adapter = model_with_adapter()
        quantize_blocks(model.blocks, "fp8", fp8_matmul=True)
        run = checkpointed(call_block, CheckpointSettings(), None)
        model.run_block = BlockSwapper(model.joint_blocks, swapped, CPU).runner(run) if swapped else run
        out = model(**inputs(model.config, 8, 8))
        out.square().mean().backward()
        results.append((out.detach(), adapter.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_gpu_without_float8_products_is_told(monkeypatch):
    for capability, found in (((8, 6), 1), ((8, 9), 0), ((9, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        problems = fp8_matmul_problems(torch.device("cuda"))
        assert len(problems) == found and all("Some GPU" in problem for problem in problems)
    assert fp8_matmul_problems(CPU) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_float8_product_on_the_gpu_is_that_of_the_cpu(dtype: torch.dtype):
    if fp8_matmul_problems(torch.device("cuda")):
        pytest.skip("this GPU has no float8 products")
    product = Fp8MatmulLinear.of(nn.Linear(256, 512).requires_grad_(False))
    x = torch.randn(3, 33, 256, dtype=dtype)
    wanted = product(x)
    assert relative_error(product.cuda()(x.cuda()).cpu().float(), wanted.float()) < 0.01
