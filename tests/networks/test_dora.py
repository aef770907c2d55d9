"""DoRA is the paper's formula, in the form that readers of the file apply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.quantization import quantize
from networks.dora import DoRALayer
from networks.lora import LayerSettings, LoRALayer
from networks.lora_sd3 import create_network
from tests.networks.models import tiny_mmdit


def read_as_comfyui(weight: Tensor, file: dict[str, Tensor], strength: float) -> Tensor:
    """W' as ComfyUI's weight_decompose makes it, written independently: the shape decides the axis, and for one magnitude per output the
    norm is the unmerged weight's."""
    down, up = file["lora_down.weight"].flatten(1), file["lora_up.weight"].flatten(1)
    change = (up @ down).reshape(weight.shape) * (file["alpha"].item() / down.shape[0])
    merged = weight + change
    scale = file["dora_scale"]
    if scale.shape[0] == weight.shape[0]:
        norm = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True).reshape(-1, *[1] * (weight.dim() - 1))
    else:
        norm = merged.transpose(0, 1).reshape(merged.shape[1], -1).norm(dim=1, keepdim=True)
        norm = norm.reshape(merged.shape[1], *[1] * (merged.dim() - 1)).transpose(0, 1)
    result = merged * (scale / (norm + torch.finfo(weight.dtype).eps))
    return weight + strength * (result - weight)


def base_layer(kind: str) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(1)
    if kind == "conv":
        return nn.Conv2d(6, 10, 3, stride=2, padding=1).requires_grad_(False)
    return nn.Linear(12, 12 if kind == "square" else 18).requires_grad_(False)


def dora(layer: nn.Module, **settings) -> DoRALayer:
    torch.manual_seed(2)
    made = DoRALayer(layer, LayerSettings(**{"rank": 3, "alpha": 2.0, **settings}))
    made.attach()
    return made


def trained(made: DoRALayer) -> DoRALayer:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def inputs(layer: nn.Module) -> Tensor:
    return torch.randn(2, 6, 8, 6) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 12)


def apply(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    return F.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", ["wide", "square", "conv"])
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0])
def test_forward_is_what_readers_make_of_the_file(kind: str, strength: float):
    layer = base_layer(kind)
    made = trained(dora(layer))
    made.multiplier = strength
    x = inputs(layer)
    reference = apply(layer, read_as_comfyui(layer.weight, made.export_state(), strength), x)
    torch.testing.assert_close(layer(x), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"parts": 3}, {"init": "pissa"}, {"init": "pissa", "parts": 3}, {"rslora": True}])
def test_combinations_are_what_readers_make_of_the_file(settings: dict):
    layer = base_layer("wide")
    made = trained(dora(layer, **settings))
    x = inputs(layer)
    reference = apply(layer, read_as_comfyui(layer.weight, made.export_state(), 1.0), x)
    torch.testing.assert_close(layer(x), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["wide", "conv"])
def test_training_starts_at_the_base_model(kind: str):
    layer = base_layer(kind)
    x = inputs(layer)
    before = layer(x)
    dora(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_magnitude_is_one_number_per_input():
    assert dora(base_layer("wide")).dora_scale.shape == (1, 12)
    assert dora(base_layer("conv")).dora_scale.shape == (1, 6, 1, 1)


def test_gradients_are_the_formulas_with_the_norm_held_constant():
    """Section 4.3 of the paper, against autograd through a float64 merged weight."""
    layer = base_layer("wide").double()
    made = trained(dora(layer)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 18, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    ours = [parameter.grad.clone() for parameter in made.parameters()] + [x.grad.clone()]
    parameters = dict(made.named_parameters())
    down, up, scale = (
        parameters[name].detach().clone().requires_grad_()
        for name in ("lora_down.weight", "lora_up.weight", "dora_scale")
    )
    x2 = x.detach().clone().requires_grad_()
    merged = layer.weight + 2.0 / 3 * up @ down
    weight = scale * merged / merged.detach().norm(dim=0, keepdim=True)
    (F.linear(x2, weight, layer.bias) * upstream).sum().backward()
    theirs = {"lora_down.weight": down.grad, "lora_up.weight": up.grad, "dora_scale": scale.grad}
    for (name, _), gradient in zip(made.named_parameters(), ours):
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[-1], x2.grad, rtol=1e-5, atol=1e-6)


def test_norm_without_the_merged_weight_equals_the_norm_of_it():
    layer = base_layer("wide")
    made = trained(dora(layer))
    factors = LoRALayer.export_state(made)
    merged = (
        layer.weight.double() + made.scale * factors["lora_up.weight"].double() @ factors["lora_down.weight"].double()
    )
    torch.testing.assert_close(made.merged_norm().double(), merged.norm(dim=0, keepdim=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_norm_of_a_quantized_layer_is_that_of_its_effective_weight(kind: str):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128)).requires_grad_(False)
    quantize(model, kind, lambda path: True)
    layer = model[0]
    made = trained(dora(layer))
    identity = torch.eye(64)
    effective = (layer.forward(identity) - layer.bias).t()  # [out, in]
    factors = LoRALayer.export_state(made)
    merged = effective + made.scale * factors["lora_up.weight"] @ factors["lora_down.weight"]
    torch.testing.assert_close(made.merged_norm(), merged.norm(dim=0, keepdim=True), rtol=2e-2, atol=1e-2)
    layer(torch.randn(2, 3, 64)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in made.parameters())


def test_disabled_layer_is_the_base():
    layer = base_layer("wide")
    made = trained(dora(layer))
    x = inputs(layer)
    made.enabled = False
    assert torch.equal(layer(x), apply(layer, layer.weight, x))


def test_dropped_module_is_the_base():
    layer = base_layer("wide")
    made = trained(dora(layer, module_dropout=0.5)).train()
    x = inputs(layer)
    base, full = apply(layer, layer.weight, x), None
    outputs = [layer(x) for _ in range(40)]
    made.eval()
    full = layer(x)
    at_base = [torch.allclose(out, base, atol=1e-6) for out in outputs]
    assert 5 < sum(at_base) < 35
    assert all(b or torch.allclose(out, full, atol=1e-6) for b, out in zip(at_base, outputs))


def test_small_magnitude_changes_act_in_bfloat16():
    layer = base_layer("wide").bfloat16()
    made = dora(layer)
    with torch.no_grad():
        made.dora_scale.mul_(1.003)
    x = torch.randn(400, 12).bfloat16()
    ratio = (layer(x).float() - layer.bias.float()).norm() / (layer.forward(x).float() - layer.bias.float()).norm()
    assert ratio.item() == pytest.approx(1.003, abs=1.5e-3)


def test_training_starts_at_the_base_model_when_factors_are_bfloat16():
    layer = base_layer("wide")
    made = dora(layer).to(torch.bfloat16)
    assert made.lora_down.weight.dtype == torch.bfloat16
    assert made.dora_scale.dtype == torch.float32
    x = inputs(layer)
    torch.testing.assert_close(layer(x), layer.forward(x), rtol=1e-6, atol=1e-6)


def test_magnitudes_and_alphas_of_a_file_stay_float32():
    torch.manual_seed(3)
    network = create_network(1.0, 4, 1.0, None, [], tiny_mmdit(), use_dora="True")
    saved = network.state_dict_for_saving(torch.bfloat16)
    exact = network.state_dict_for_saving()
    for key, tensor in saved.items():
        kept = key.endswith((".alpha", ".dora_scale"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), key
        assert not kept or torch.equal(tensor, exact[key])
