"""One LoRA layer computes what the paper says, to float rounding, whatever dropout, checkpointing or storage do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks.dora import DoRALayer
from networks.lora import LayerSettings, LoRALayer


def frozen_linear(size_in: int = 12, size_out: int = 18, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(size_in, size_out).to(dtype).requires_grad_(False)


def lora(layer: nn.Module, kind: type[LoRALayer] = LoRALayer, **settings) -> LoRALayer:
    torch.manual_seed(2)
    made = kind(layer, LayerSettings(**{"rank": 3, "alpha": 2.0, **settings}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.attach()
    return made


@pytest.mark.parametrize("shape", [(4, 12), (2, 5, 12)])
@pytest.mark.parametrize("parts", [1, 3])
def test_linear_equals_a_float64_reference(shape: tuple[int, ...], parts: int):
    layer = frozen_linear()
    made = lora(layer, parts=parts)
    made.multiplier = 0.7
    x = torch.randn(*shape)
    down, up = made.lora_down.weight.double(), made.lora_up.weight.double()
    changes = [
        up[i * 18 // parts : (i + 1) * 18 // parts] @ down[i * 3 : (i + 1) * 3] for i in range(parts)
    ]  # each part's own pair
    weight = layer.weight.double() + 0.7 * 2.0 / 3 * torch.cat(changes)
    reference = F.linear(x.double(), weight, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), reference, rtol=1e-5, atol=1e-6)


def test_convolution_equals_a_float64_reference():
    torch.manual_seed(1)
    layer = nn.Conv2d(5, 7, 3, stride=2, padding=1).requires_grad_(False)
    made = lora(layer)
    x = torch.randn(2, 5, 8, 6)
    change = torch.einsum("or,rihw->oihw", made.lora_up.weight.double()[:, :, 0, 0], made.lora_down.weight.double())
    weight = layer.weight.double() + 2.0 / 3 * change
    reference = F.conv2d(x.double(), weight, layer.bias.double(), stride=2, padding=1)
    torch.testing.assert_close(layer(x).double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "parts"), [(nn.Linear, 1), (nn.Linear, 3), (nn.Conv2d, 1)])
def test_gradients_equal_finite_differences(kind: type[nn.Module], parts: int):
    torch.manual_seed(1)
    layer = nn.Linear(4, 6) if kind is nn.Linear else nn.Conv2d(4, 6, 2, stride=2)
    layer = layer.double().requires_grad_(False)
    made = lora(layer, rank=2, parts=parts).double()
    x = torch.randn((2, 3, 4) if kind is nn.Linear else (2, 4, 4, 4), dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        values = {"lora_down.weight": down, "lora_up.weight": up}
        return torch.func.functional_call(made, values, (x, layer.forward(x)))

    parameters = (made.lora_down.weight, made.lora_up.weight)
    assert torch.autograd.gradcheck(output, (x, *parameters))


def test_frozen_layer_gets_no_gradient_and_float32_masters_do():
    layer = frozen_linear(dtype=torch.bfloat16)
    made = lora(layer)
    x = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad is None and layer.bias.grad is None
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_the_reference(dtype: torch.dtype):
    layer = frozen_linear(64, 48)
    x = torch.randn(2, 9, 64)
    made = lora(layer)
    reference = layer(x)
    layer.to(dtype)
    error = (layer(x.to(dtype)).float() - reference).abs().max() / reference.abs().max()
    assert error < 8 * torch.finfo(dtype).eps
    made.detach()


def test_a_new_layer_changes_nothing_and_draws_the_published_distributions():
    layer = frozen_linear(400, 300)
    x = torch.randn(3, 400)
    before = layer(x)
    made = LoRALayer(layer, LayerSettings(rank=64, alpha=1.0))
    made.attach()
    assert torch.equal(layer(x), before)
    bound = 400**-0.5
    samples = made.lora_down.weight.detach().flatten().numpy()
    assert stats.kstest(samples, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4
    assert not made.lora_up.weight.any()


def test_orthogonal_start_has_orthogonal_rows_of_the_usual_length():
    made = LoRALayer(frozen_linear(400, 300), LayerSettings(rank=16, init="orthogonal"))
    down = made.lora_down.weight.detach()
    torch.testing.assert_close(down @ down.t(), torch.eye(16) / 3, rtol=1e-4, atol=1e-5)
    assert not made.lora_up.weight.any()
    usual = LoRALayer(frozen_linear(400, 300), LayerSettings(rank=16)).lora_down.weight.detach()
    assert usual.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.02)


@pytest.mark.parametrize("parts", [1, 3])
def test_pissa_starts_at_the_base_with_the_weights_principal_part(parts: int):
    layer = frozen_linear(40, 60)
    with torch.no_grad():  # a spectrum that falls, as real weights have
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(u * (s * 0.7 ** torch.arange(40)) @ v)
    weight = layer.weight.clone()
    x = torch.randn(3, 40)
    before = layer(x)
    made = LoRALayer(layer, LayerSettings(rank=4, alpha=2.0, init="pissa", parts=parts))
    made.attach()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight, weight)
    downs, ups = made.lora_down.weight.chunk(parts), made.lora_up.weight.chunk(parts)
    for part, down, up in zip(weight.chunk(parts), downs, ups):
        u, s, v = torch.linalg.svd(part, full_matrices=False)
        best = u[:, :4] * s[:4] @ v[:4]
        torch.testing.assert_close(made.scale * up @ down, best, rtol=1e-3, atol=1e-3 * best.abs().max().item())


def test_pissas_small_changes_survive_low_precision():
    """Both as computed and as saved in bfloat16, where U itself could not hold a change of one part in a thousand."""
    layer = frozen_linear(40, 60)
    made = LoRALayer(layer, LayerSettings(rank=4, init="pissa"))
    with torch.no_grad():
        made.lora_up.weight.mul_(1.001)
    x = torch.randn(50, 40)
    exact = F.linear(F.linear(x, made.lora_down.weight), made.lora_up.weight) * (1 - 1 / 1.001)
    zero = torch.zeros(50, 60)
    low = made(x.bfloat16(), zero.bfloat16()).float()
    assert (low - exact).norm() < 0.02 * exact.norm()
    file = {key: tensor.bfloat16().float() for key, tensor in made.export_state().items()}
    saved = file["lora_up.weight"] @ file["lora_down.weight"] * (file["alpha"] / 8)
    assert (F.linear(x, saved) - exact).norm() < 0.02 * exact.norm()


def test_pissa_of_a_rank_above_the_layers_own_still_trains_every_rank():
    layer = frozen_linear(4, 6)
    made = LoRALayer(layer, LayerSettings(rank=7, init="pissa"))
    made.attach()
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    assert (made.lora_up.weight.grad.abs().sum(0) > 0).all()


def test_rank_stabilised_scale_and_the_alpha_that_readers_need():
    made = LoRALayer(frozen_linear(), LayerSettings(rank=16, alpha=8.0, rslora=True))
    assert made.scale == 2.0  # 8 / sqrt(16)
    assert made.export_state()["alpha"].item() / 16 == 2.0


@pytest.mark.parametrize("kind", [LoRALayer, DoRALayer])
def test_dropouts_act_in_training_alone(kind: type[LoRALayer]):
    layer = frozen_linear()
    made = lora(layer, kind, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    x = torch.randn(4, 5, 12)
    made.eval()
    reference = layer(x)
    assert torch.equal(layer(x), reference)
    made.train()
    assert not torch.allclose(layer(x), reference)


def changes(made: LoRALayer, layer: nn.Linear, x: torch.Tensor, count: int) -> torch.Tensor:
    base = F.linear(x, layer.weight, layer.bias)
    return torch.stack([layer(x) - base for _ in range(count)])


@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout"])
@pytest.mark.parametrize("parts", [1, 3])
def test_rescaled_dropouts_keep_the_mean(dropout: str, parts: int):
    layer = frozen_linear()
    made = lora(layer, **{dropout: 0.4}, parts=parts)
    x = torch.randn(2, 3, 12)
    made.eval()
    expected = changes(made, layer, x, 1)[0]
    made.train()
    torch.manual_seed(0)
    mean = changes(made, layer, x, 4000).mean(0)
    assert (mean - expected).abs().max() < 0.12 * expected.abs().max()


def test_rank_dropout_drops_the_same_ranks_at_all_tokens_of_a_sample():
    layer = frozen_linear()
    made = lora(layer, rank_dropout=0.5)
    z = made.train()._dropout(torch.ones(64, 5, 3))
    assert set(z.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(z, z[:, :1].expand_as(z))
    assert not torch.equal(z[0], z[1]) or not torch.equal(z[0], z[2]) or not torch.equal(z[0], z[3])


def test_module_dropout_drops_the_whole_change_without_rescaling():
    layer = frozen_linear()
    made = lora(layer, module_dropout=0.3)
    x = torch.randn(2, 3, 12)
    expected = changes(made.eval(), layer, x, 1)[0]
    torch.manual_seed(0)
    actual = changes(made.train(), layer, x, 300)
    dropped = [not change.any() for change in actual]
    kept = [torch.allclose(change, expected, atol=1e-6) for change in actual]
    assert all(a != b for a, b in zip(dropped, kept))
    assert 60 <= sum(dropped) <= 120  # 300 draws at 0.3: 90 +- 4 deviations


@pytest.mark.parametrize("kind", [LoRALayer, DoRALayer])
def test_gradients_under_checkpointing_equal_those_without(kind: type[LoRALayer]):
    layer = frozen_linear()
    made = lora(layer, kind, dropout=0.3, rank_dropout=0.3, module_dropout=0.3).train()
    x = torch.randn(4, 5, 12, requires_grad=True)

    def gradients(run, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        made.zero_grad()
        run().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in made.parameters()])

    plain = [gradients(lambda: layer(x), seed) for seed in range(8)]
    recomputed = [gradients(lambda: checkpoint(layer, x, use_reentrant=False), seed) for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))
    assert 0 < sum(bool(gradient.any()) for gradient in plain) < 8  # the module was dropped at some seeds, not at all


def test_the_hook_keeps_nothing_of_the_frozen_weight():
    """Block swap repoints `weight.data` between forwards."""
    layer = frozen_linear()
    made = lora(layer)
    x = torch.randn(2, 12)
    layer.weight.data = torch.randn(18, 12)
    change = 2.0 / 3 * F.linear(F.linear(x, made.lora_down.weight), made.lora_up.weight)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + change)
    made.detach()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", ["Linear4bit", "Linear8bitLt"])
def test_quantized_layers_train(name: str):
    import bitsandbytes as bnb

    torch.manual_seed(1)
    layer = nn.Linear(64, 128).requires_grad_(False)
    kind = getattr(bnb.nn, name)
    quantized = kind(64, 128, **({"has_fp16_weights": False} if name == "Linear8bitLt" else {}))
    quantized.load_state_dict(layer.state_dict())
    quantized = quantized.to("cpu").requires_grad_(False)
    made = lora(quantized)
    x = torch.randn(2, 5, 64)
    difference = quantized(x) - quantized.forward(x)
    expected = 2.0 / 3 * F.linear(F.linear(x, made.lora_down.weight), made.lora_up.weight)
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-3)
    quantized(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in made.parameters())


def test_attaching_twice_adds_the_change_once():
    layer = frozen_linear()
    made = lora(layer)
    x = torch.randn(2, 12)
    once = layer(x)
    made.attach()
    assert torch.equal(layer(x), once)


def test_alpha_stays_exact_when_the_factors_become_bfloat16():
    made = LoRALayer(frozen_linear(), LayerSettings(rank=3, alpha=1.2345))
    made.to(torch.bfloat16)
    assert made.alpha.dtype == torch.float32 and made.lora_up.weight.dtype == torch.bfloat16
    other = LoRALayer(frozen_linear(), LayerSettings(rank=3, alpha=9.0)).to(torch.bfloat16)
    other.load_state_dict(made.state_dict())
    assert other.scale == made.scale == pytest.approx(1.2345 / 3, rel=1e-7)
