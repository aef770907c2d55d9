"""Networks act the same on models that are quantized, swapped and checkpointed by library.memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.common.transformer import call_block
from library.memory.block_swap import BlockSwapper
from library.memory.quantization import quantize, quantize_blocks
from library.sd3.mmdit import MMDiT
from networks.dora import DoRALayer
from networks.lora import LayerSettings
from networks.network import Network
from networks.network_layer import dense_weight, left_matmul
from networks.network_modules import network_module
from tests.networks.models import mmdit_inputs, relative_error, tiny_mmdit, trained

NETWORKS = {
    "lora": ("networks.lora", {}),
    "split_qkv": ("networks.lora", {"split_qkv": "1"}),
    "dora": ("networks.lora", {"use_dora": "1"}),
    "pissa": ("networks.lora", {"init": "pissa"}),
    "loha": ("lycoris.kohya", {"algo": "loha"}),
    "glora": ("lycoris.kohya", {"algo": "glora"}),
    "lokr dora": ("lycoris.kohya", {"algo": "lokr", "factor": "4", "dora_wd": "1"}),
    "diag-oft": ("lycoris.kohya", {"algo": "diag-oft"}),
}


def attached(name: str, model: nn.Module) -> Network:
    module, arguments = NETWORKS[name]
    torch.manual_seed(6)
    network = network_module(module).create_network(1.0, 4, 2.0, None, [], model, **arguments)
    trained(network, 0.1).train().attach()
    return network


def step(model: nn.Module, network: Network) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(**mmdit_inputs())
    out.square().mean().backward()
    return out.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_block_swap_changes_nothing(name: str):
    model = tiny_mmdit(depth=5)
    network = attached(name, model)
    expected, gradients = step(model, network)
    network.detach()
    model = tiny_mmdit(depth=5)
    network = attached(name, model)
    swapper = BlockSwapper(list(model.joint_blocks), [1, 2, 3], torch.device("cpu"), slots=2)
    model.run_block = swapper.runner(call_block)
    for _ in range(2):
        network.zero_grad()
        out, swapped = step(model, network)
    assert torch.equal(out, expected)
    assert all(torch.equal(swapped[key], gradients[key]) for key in gradients)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("name", ["lora", "split_qkv", "dora", "pissa", "loha", "glora"])
def test_quantized_base_acts_as_its_effective_weights(name: str, kind: str):
    """The network on quantized layers equals the network on plain layers that hold the same values."""
    quantized = tiny_mmdit()
    quantize_blocks(quantized.blocks, kind)
    plain = tiny_mmdit()
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("joint_blocks."):
            narrow = quantized.get_submodule(path)
            layer.weight.data = narrow.dequantize(narrow.weight, narrow.weight_scale, narrow.shape, torch.float32)
    wide_network, narrow_network = attached(name, plain), attached(name, quantized)
    narrow_network.load_state_dict(wide_network.state_dict())
    expected, gradients = step(plain, wide_network)
    actual, narrow_gradients = step(quantized, narrow_network)
    assert relative_error(actual, expected) < 1e-4
    for key, gradient in gradients.items():
        torch.testing.assert_close(narrow_gradients[key], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_quantized_weight_is_the_same_whatever_the_bias(kind: str):
    model = nn.Sequential(nn.Linear(64, 128)).to(torch.bfloat16).requires_grad_(False)
    model[0].bias.fill_(100.0)  # beside which bfloat16 holds little of the products
    quantize(model, kind, lambda path: True)
    layer = model[0]
    wide = layer.dequantize(layer.weight, layer.weight_scale, layer.shape, torch.bfloat16)
    assert torch.equal(dense_weight(layer), wide.float())
    u = torch.randn(3, 128).bfloat16().float()
    assert relative_error(left_matmul(u, layer), u @ wide.float()) < 1e-2


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_dora_on_a_quantized_layer_compiles_whole(kind: str):
    model = nn.Sequential(nn.Linear(64, 128)).requires_grad_(False)
    quantize(model, kind, lambda path: True)
    made = trained(DoRALayer(model[0], LayerSettings(rank=4, alpha=2.0)), 0.1)
    made.attach()
    x = torch.randn(2, 64, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def forward(x: Tensor) -> Tensor:
        return model(x)

    assert relative_error(forward(x), model(x)) < 1e-5


def test_algorithms_that_need_the_weight_say_so_on_a_quantized_base():
    from library.common.errors import UserError

    model: MMDiT = tiny_mmdit()
    quantize_blocks(model.blocks, "int8")
    for name in ("lokr dora", "diag-oft"):
        with pytest.raises(UserError, match="quantised"):
            attached(name, model)
