"""--base_weights: files of every kind change weights as readers do, in float32, or are refused as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.common.errors import UserError
from networks.merging import merge_into, merge_layers, merged_weight
from tests.networks import readers


def random_file(kind: str, out: int = 12, size: int = 8, kernel: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) * 0.3

    ones = (1,) * len(kernel)
    alpha = {"alpha": torch.tensor(3.0)}
    return {
        "lora": {"lora_down.weight": randn(4, size, *kernel), "lora_up.weight": randn(out, 4, *ones), **alpha},
        "lora without alpha": {"lora_down.weight": randn(4, size, *kernel), "lora_up.weight": randn(out, 4, *ones)},
        "dora by input": {
            "lora_down.weight": randn(4, size, *kernel),
            "lora_up.weight": randn(out, 4, *ones),
            "dora_scale": randn(1, size, *ones).abs(),
            **alpha,
        },
        "loha": {
            "hada_w1_a": randn(out, 4),
            "hada_w1_b": randn(4, size * torch.Size(kernel).numel()),
            "hada_w2_a": randn(out, 4),
            "hada_w2_b": randn(4, size * torch.Size(kernel).numel()),
            **alpha,
        },
        "lokr": {"lokr_w1": randn(3, 2), "lokr_w2": randn(out // 3, size // 2, *kernel), **alpha},
        "lokr factored": {
            "lokr_w1_a": randn(3, 2),
            "lokr_w1_b": randn(2, 2),
            "lokr_w2_a": randn(out // 3, 2),
            "lokr_w2_b": randn(2, size // 2 * torch.Size(kernel).numel()),
            **alpha,
        },
        "glora": {
            "a1.weight": randn(size, 4, *ones),
            "a2.weight": randn(4, size, *ones),
            "b1.weight": randn(out, 4, *ones),
            "b2.weight": randn(4, size, *kernel),
            **alpha,
        },
        "full": {"diff": randn(out, size, *kernel), "diff_b": randn(out)},
        "oft": {"oft_blocks": randn(3, 4, 4), "alpha": torch.tensor(0.0)},
        "boft": {"oft_blocks": randn(2, 6, 2, 2), "alpha": torch.tensor(0.0)},
    }[kind]


KINDS = ["lora", "lora without alpha", "dora by input", "loha", "lokr", "lokr factored", "glora", "full", "oft", "boft"]


@pytest.mark.parametrize("kernel", [(), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_comfyui_reads_it(kind: str, kernel: tuple[int, ...]):
    weight = torch.randn(12, 8, *kernel)
    file = random_file(kind, kernel=kernel)
    torch.testing.assert_close(merged_weight(weight, file), readers.read(weight, file), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "boft"])
def test_strength_goes_from_the_base_to_the_whole_change(kind: str):
    weight, file = torch.randn(12, 8), random_file(kind)
    full, half, none = (merged_weight(weight, file, strength) for strength in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none, weight)
    torch.testing.assert_close(half, (weight + full) / 2)


def test_magnitudes_by_output_are_read_with_the_merged_norm():
    weight = torch.randn(12, 8)
    file = random_file("lora") | {"dora_scale": torch.rand(12, 1) + 0.5}
    merged = weight + readers.lora(weight, file)
    expected = file["dora_scale"] * merged / merged.norm(dim=1, keepdim=True)
    torch.testing.assert_close(merged_weight(weight, file), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_made_in_float32_and_the_dtype_is_kept():
    layer = nn.Linear(8, 12).bfloat16().requires_grad_(False)
    before = layer.weight.float()
    file = {key: tensor.half() for key, tensor in random_file("lora").items()}
    merge_into(layer, file, 0.7)
    exact = before.double() + 0.7 * readers.lora(before.double(), {k: v.double() for k, v in file.items()})
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight, exact.bfloat16())
    assert not layer.weight.requires_grad


def test_several_files_with_strengths_add_up():
    layer = nn.Linear(8, 12).requires_grad_(False)
    before = layer.weight.clone()
    first, second = random_file("lora"), random_file("loha")
    assert merge_layers({"a": first}, {"a": layer}, 0.5, "first") == 1
    merge_layers({"a": second}, {"a": layer}, -1.0, "second")
    expected = before + 0.5 * readers.lora(before, first) - readers.loha(before, second)
    torch.testing.assert_close(layer.weight, expected)


def test_difference_of_the_bias_is_added():
    layer = nn.Linear(8, 12).requires_grad_(False)
    before, file = layer.bias.clone(), random_file("full")
    merge_into(layer, file, 0.5)
    torch.testing.assert_close(layer.bias, before + 0.5 * file["diff_b"])


def test_misfits_are_all_named_and_nothing_is_merged():
    layers = {name: nn.Linear(8, 12).requires_grad_(False) for name in "abcd"}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    changes = {
        "a": random_file("lora"),
        "b": random_file("lora", out=9),
        "c": {"w_norm": torch.zeros(12)},
        "d": random_file("oft") | {"alpha": torch.tensor(1.0)},
        "e": random_file("lora"),
    }
    with pytest.raises(UserError) as error:
        merge_layers(changes, layers, 1.0, "some.safetensors")
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert "e is no layer of this model" in text
    assert "b does not fit a layer of [12, 8]" in text
    assert "c has tensors of a kind" in text
    assert "d is a rotation with a constraint" in text
    assert all(torch.equal(layers[name].weight, before[name]) for name in layers)


@pytest.mark.parametrize("missing", ["lora_up.weight", "hada_w2_b", "lokr_w2", "b2.weight"])
def test_incomplete_layers_are_named(missing: str):
    for kind in ("lora", "loha", "lokr", "glora"):
        file = random_file(kind)
        if missing in file:
            del file[missing]
            with pytest.raises(UserError, match="does not fit"):
                merge_layers({"a": file}, {"a": nn.Linear(8, 12)}, 1.0, "x")
            return
    raise AssertionError("the parameter names no tensor")


def test_a_quantized_weight_is_not_merged_into():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64).to("cpu")
    with pytest.raises(TypeError, match="before it is quantised"):
        merge_into(layer, random_file("lora", 64, 64))
