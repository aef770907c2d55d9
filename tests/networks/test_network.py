"""The network as a whole: attached = merged = reloaded, strength, norms, and files that don't fit."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.common.errors import UserError
from networks.lora_sd3 import create_network
from networks.network import Network
from networks.weight_files import read_network_file
from tests.networks.models import QKV, mmdit_inputs, relative_error, tiny_clip, tiny_mmdit, trained

VARIANTS = {
    "plain": {},
    "embedders": {"emb_dims": "[2,3,4,5,6,7]", "conv_dim": "3"},
    "split_qkv": {"split_qkv": "True"},
    "dora": {"use_dora": "True"},
    "rslora": {"use_rslora": "True"},
    "pissa": {"init": "pissa"},
    "orthogonal": {"init": "orthogonal"},
    "all": {"use_dora": "1", "use_rslora": "yes", "init": "pissa", "split_qkv": "true", "emb_dims": "1,1,1,1,1,1"},
}


def made(variant: str = "plain", **changes) -> tuple[torch.nn.Module, Network]:
    mmdit = tiny_mmdit()
    network = create_network(1.0, 4, 2.0, None, [], mmdit, **{**VARIANTS[variant], **changes})
    return mmdit, trained(network).eval()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_attached(variant: str, strength: float):
    mmdit, network = made(variant)
    base = mmdit(**mmdit_inputs())
    network.attach()
    network.set_multiplier(strength)
    attached = mmdit(**mmdit_inputs())
    network.merge()
    merged = mmdit(**mmdit_inputs())
    assert relative_error(merged, attached) < 1e-5
    assert relative_error(base, attached) > 1e-2


@pytest.mark.parametrize("variant", [name for name, args in VARIANTS.items() if "use_dora" not in args])
def test_plain_arithmetic_on_the_file_equals_attached(variant: str, tmp_path):
    """alpha / rank * up @ down on the fused weight, as any reader without DoRA does."""
    mmdit, network = made(variant)
    network.save_weights(tmp_path / "a.safetensors")
    reader = copy.deepcopy(mmdit)
    network.attach()
    attached = mmdit(**mmdit_inputs())
    file = read_network_file(tmp_path / "a.safetensors")
    weights = {name.replace(".", "_"): weight for name, weight in reader.named_parameters()}
    for name in {key.split(".")[0] for key in file}:
        down, up = file[f"{name}.lora_down.weight"].flatten(1), file[f"{name}.lora_up.weight"].flatten(1)
        weight = weights[name.removeprefix("lora_unet_") + "_weight"]
        weight += (file[f"{name}.alpha"].item() / down.shape[0] * up @ down).view_as(weight)
    assert relative_error(reader(**mmdit_inputs()), attached) < 1e-5


@pytest.mark.parametrize(
    ("variant", "suffix"),
    [*((variant, ".safetensors") for variant in VARIANTS), ("all", ".pt"), ("split_qkv", ".ckpt")],
)
def test_reloaded_equals_saved(variant: str, suffix: str, tmp_path):
    mmdit, network = made(variant)
    path = tmp_path / f"lora{suffix}"
    network.save_weights(path, torch.float32, {"ss_network_dim": "4"})
    network.attach()
    expected = mmdit(**mmdit_inputs())
    other_model, other = made(variant)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    other.load_weights(path)
    other.attach()
    assert relative_error(other_model(**mmdit_inputs()), expected) < 1e-6
    again, saved = other.state_dict_for_saving(), network.state_dict_for_saving()
    assert again.keys() == saved.keys()
    assert all(torch.allclose(again[key], saved[key], rtol=0, atol=1e-6) for key in saved)


def test_saved_metadata_and_dtype(tmp_path):
    _, network = made(use_rslora="True")
    network.save_weights(tmp_path / "a.safetensors", torch.bfloat16, {"ss_network_dim": "4"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"ss_network_dim": "4"}
        assert file.get_tensor(f"{QKV}.lora_up.weight").dtype == torch.bfloat16
        assert file.get_tensor(f"{QKV}.alpha").shape == ()


def test_alpha_that_the_dtype_cannot_hold_stays_exact():
    mmdit = tiny_mmdit()
    saved = create_network(1.0, 4, 1.2345, None, [], mmdit).state_dict_for_saving(torch.bfloat16)
    assert saved[f"{QKV}.alpha"].dtype == torch.float32
    assert saved[f"{QKV}.alpha"].item() == pytest.approx(1.2345, rel=1e-7)
    assert saved[f"{QKV}.lora_down.weight"].dtype == torch.bfloat16


def test_split_qkv_file_has_the_strength_that_was_trained():
    _, network = made("split_qkv")
    file = network.state_dict_for_saving()
    down, up, alpha = (file[f"{QKV}.{suffix}"] for suffix in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (12, 64) and up.shape == (192, 12) and alpha.item() == 6.0
    thirds = network.layers[QKV].lora_up.weight.chunk(3)
    for i in range(3):
        for j in range(3):
            block = up[64 * i : 64 * (i + 1), 4 * j : 4 * (j + 1)]
            assert torch.equal(block, thirds[i]) if i == j else not block.any()


def test_split_qkv_trains_with_rank_dropout_and_norm_cap():
    mmdit, network = made("split_qkv", rank_dropout="0.3")
    network.train().attach()
    mmdit(**mmdit_inputs()).square().mean().backward()
    up = network.layers[QKV].lora_up.weight
    assert up.grad.any()
    before = up.clone()
    network.scale_weight_norms(0.05)
    assert (up.norm() < before.norm()).item()


def test_a_plain_file_is_no_split_file():
    _, network = made("split_qkv")
    plain = network.state_dict_for_saving()
    plain[f"{QKV}.lora_up.weight"][0, 11] = 0.1  # q's rows with v's ranks
    with pytest.raises(UserError, match=f"{QKV} is not a file of split_qkv=True"):
        network.load_tensors(plain, "a.safetensors")


def test_files_that_do_not_fit_are_listed():
    mmdit = tiny_mmdit()
    network = create_network(1.0, 4, 2.0, None, [], mmdit)
    good = network.state_dict_for_saving()
    wrong = dict(good)
    del wrong[f"{QKV}.lora_up.weight"]
    wrong["lora_unet_something.lora_up.weight"] = torch.zeros(3, 4)
    proj = "lora_unet_joint_blocks_1_x_block_attn_proj.lora_down.weight"
    wrong[proj] = torch.zeros(9, 64)
    with pytest.raises(UserError) as error:
        network.load_tensors(wrong, "some.safetensors")
    text = str(error.value)
    assert f"lacks {QKV}.lora_up.weight" in text
    assert "lora_unet_something.lora_up.weight" in text
    assert f"{proj} is [9, 64], here [4, 64]" in text
    assert "--dim_from_weights" in text
    assert all(torch.equal(good[key], value) for key, value in network.state_dict_for_saving().items())


def test_file_of_another_layout_is_an_error():
    network = create_network(1.0, 4, 2.0, None, [], tiny_mmdit())
    with pytest.raises(UserError, match="not those of the kohya layout"):
        network.load_tensors({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 64)}, "x")


def test_the_files_alpha_counts():
    mmdit = tiny_mmdit()
    made = create_network(1.0, 4, 3.0, None, [], mmdit)
    other = create_network(1.0, 4, 1.0, None, [], mmdit)
    other.load_tensors(made.state_dict_for_saving(), "x")
    assert {layer.scale for layer in other.layers.values()} == {0.75}
    without = {key: value for key, value in made.state_dict_for_saving().items() if not key.endswith("alpha")}
    other.load_tensors(without, "x")
    assert {layer.scale for layer in other.layers.values()} == {1.0}


def test_untrained_parts_of_a_file_are_left_out_with_a_warning(caplog):
    mmdit = tiny_mmdit()
    both = create_network(1.0, 4, 3.0, None, [tiny_clip()], mmdit).state_dict_for_saving()
    create_network(1.0, 4, 3.0, None, [], mmdit).load_tensors(both, "some.safetensors")
    assert "some.safetensors also has textencoder 1" in caplog.text


def test_multiplier_scales_the_change():
    mmdit, network = made()
    network.attach()
    outputs = {}
    for strength in (0.0, 1.0):
        network.set_multiplier(strength)
        outputs[strength] = mmdit(**mmdit_inputs())
    network.detach()
    assert torch.equal(outputs[0.0], mmdit(**mmdit_inputs()))
    assert relative_error(outputs[1.0], outputs[0.0]) > 1e-2


@pytest.mark.parametrize("variant", ["plain", "dora", "pissa"])
def test_base_model_inside_disable_adapters_and_back(variant: str):
    mmdit, network = made(variant)
    base = mmdit(**mmdit_inputs())
    network.attach()
    with_lora = mmdit(**mmdit_inputs())
    with network.disable_adapters():
        assert torch.equal(mmdit(**mmdit_inputs()), base)
        with network.disable_adapters():
            assert torch.equal(mmdit(**mmdit_inputs()), base)
        assert torch.equal(mmdit(**mmdit_inputs()), base)
    assert torch.equal(mmdit(**mmdit_inputs()), with_lora)
    network.detach()
    assert torch.equal(mmdit(**mmdit_inputs()), base)


def test_the_base_models_state_dict_and_parameters_are_untouched():
    mmdit, network = made()
    keys, numbers = list(mmdit.state_dict()), sum(1 for _ in mmdit.parameters())
    network.attach()
    assert list(mmdit.state_dict()) == keys and sum(1 for _ in mmdit.parameters()) == numbers
    assert type(mmdit.joint_blocks[0].x_block.attn.qkv) is torch.nn.Linear
    assert all(name.startswith("lora_unet_") for name in network.state_dict())


def test_given_weights_are_saved_in_place_of_the_live_ones():
    _, network = made("split_qkv")
    average = {name: torch.full_like(parameter, 0.5) for name, parameter in network.named_parameters()}
    saved = network.state_dict_for_saving(None, average)
    assert (saved[f"{QKV}.lora_down.weight"] == 0.5).all()
    assert (saved[f"{QKV}.lora_up.weight"][:64, :4] == 0.5).all()
    assert network.layers[QKV].lora_down.weight.unique().numel() > 1
    with pytest.raises(KeyError, match=r"module\."):
        network.state_dict_for_saving(None, {f"module.{QKV}.lora_down.weight": torch.zeros(1)})


def test_saved_tensors_do_not_follow_training():
    _, network = made()
    saved = network.state_dict_for_saving()
    before = saved[f"{QKV}.lora_up.weight"].clone()
    with torch.no_grad():
        network.layers[QKV].lora_up.weight.zero_()
    assert torch.equal(saved[f"{QKV}.lora_up.weight"], before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_resumes_exactly(variant: str):
    mmdit, network = made(variant)
    network.attach()
    expected = mmdit(**mmdit_inputs())
    other_model, other = made(variant)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(2.0)
    other.load_state_dict(network.state_dict(), strict=True)
    other.attach()
    assert torch.equal(other_model(**mmdit_inputs()), expected)


@pytest.mark.parametrize("variant", ["plain", "split_qkv", "embedders"])
def test_norm_cap_equals_the_spec_on_the_full_matrices(variant: str):
    """n = ||scale Up Down|| clamped below by M / 2; both factors times sqrt(min(n, M) / n), in float64 on the file's tensors."""
    _, network = made(variant)
    before = {name: {k: t.double() for k, t in layer.export_state().items()} for name, layer in network.layers.items()}
    exact = {}
    for name, tensors in before.items():
        down, up = tensors["lora_down.weight"].flatten(1), tensors["lora_up.weight"].flatten(1)
        exact[name] = (tensors["alpha"] / down.shape[0] * up @ down).norm()
    limit = sorted(norm.item() for norm in exact.values())[len(exact) // 2] * 1.01
    norms, shrunk = [], 0
    reference = {}
    for name, norm in exact.items():
        ratio = min(max(norm.item(), limit / 2), limit) / max(norm.item(), limit / 2)
        reference[name] = before[name]["lora_down.weight"] * ratio**0.5
        norms.append(norm.item() * ratio)
        shrunk += ratio < 1
    report = network.scale_weight_norms(limit)
    assert 0 < shrunk < len(norms)
    assert report.keys_scaled.item() == shrunk
    assert report.average_norm.item() == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert report.maximum_norm.item() == pytest.approx(max(norms), rel=1e-4)
    for name, down in reference.items():
        torch.testing.assert_close(
            network.layers[name].export_state()["lora_down.weight"].double(), down, rtol=1e-4, atol=1e-7
        )


def test_norm_cap_never_asks_the_device_for_a_number(monkeypatch):
    """`item`, `float()` and `bool()` of a tensor wait for the device."""
    _, network = made()

    def forbidden(*args):
        raise AssertionError("a tensor was read on the hot path")

    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, forbidden)
    network.scale_weight_norms(0.5)


@pytest.mark.parametrize("variant", ["plain", "dora", "pissa"])
def test_training_forward_never_asks_the_device_for_a_number(variant: str, monkeypatch):
    mmdit, network = made(variant, rank_dropout="0.1", module_dropout="0.1", conv_dim="0")
    network.train().attach()
    given = mmdit_inputs()

    def forbidden(*args):
        raise AssertionError("a tensor was read on the hot path")

    for name in ("item", "__float__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, forbidden)
    mmdit(**given).square().mean().backward()


def test_norm_cap_of_pissa_is_refused():
    _, network = made("pissa")
    with pytest.raises(UserError, match="pissa"):
        network.scale_weight_norms(1.0)


def test_a_few_steps_bring_the_loss_down_and_twice_give_the_same_file():
    def run() -> tuple[list[float], dict[str, Tensor]]:
        mmdit = tiny_mmdit()
        torch.manual_seed(0)
        network = create_network(1.0, 4, 4.0, None, [], mmdit, rank_dropout="0.1", neuron_dropout=0.1)
        network.train().attach()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-2)
        target = torch.randn(2, 16, 6, 8)
        losses = []
        for _ in range(12):
            loss = (mmdit(**mmdit_inputs()) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, network.state_dict_for_saving(torch.float16)

    losses, first = run()
    _, second = run()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(first[key], second[key]) for key in first)
