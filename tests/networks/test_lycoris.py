"""Each LyCORIS algorithm is trained, saved, reloaded and merged, and its file means to ComfyUI what was trained."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.seeds import preserve_rng_state
from library.sd3.mmdit import MMDiT
from networks.lora_sd3 import layers_by_name
from networks.merging import merge_layers
from networks.network import Network
from networks.network_modules import network_module
from networks.parameter_groups import LearningRates
from networks.weight_files import group_by_layer, read_network_file
from tests.networks import readers
from tests.networks.models import QKV, mmdit_inputs, relative_error, tiny_clip, tiny_mmdit, tiny_t5
from tests.sd3 import real_sizes

lycoris = network_module("lycoris.kohya")
EVERYTHING = "full"  # LyCORIS's preset that also takes PatchEmbed (a convolution) and FinalLayer
CASES = {
    "locon": {"algo": "locon"},
    "locon conv tucker": {"algo": "locon", "preset": EVERYTHING, "use_tucker": "True"},
    "locon scalar": {"algo": "lora", "use_scalar": "True"},
    "locon rs": {"algo": "lora", "rs_lora": "True"},
    "locon rebuilt": {"algo": "lora", "bypass_mode": "False"},
    "locon dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "loha conv tucker": {"algo": "loha", "preset": EVERYTHING, "use_tucker": "True"},
    "loha dora": {"algo": "loha", "dora_wd": "True"},
    "loha scalar": {"algo": "loha", "use_scalar": "True"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "lokr both": {"algo": "lokr", "factor": "16", "decompose_both": "True"},
    "lokr conv": {"algo": "lokr", "factor": "4", "preset": EVERYTHING},
    "lokr full matrix": {"algo": "lokr", "factor": "8", "full_matrix": "True"},
    "lokr dora": {"algo": "lokr", "factor": "4", "dora_wd": "True"},
    "glora": {"algo": "glora"},
    "glora conv rs": {"algo": "glora", "preset": EVERYTHING, "rs_lora": "True"},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"},
}
ROTATED = ("diag-oft", "boft")
ONE_OF_EACH = [
    "locon conv tucker",
    "locon scalar",
    "loha dora",
    "lokr both",
    "glora conv rs",
    "full",
    "diag-oft",
    "boft",
]


def small_mmdit() -> torch.nn.Module:
    return tiny_mmdit(depth=2, dual_attention_blocks=())


def made(case: str, model: torch.nn.Module | None = None) -> tuple[torch.nn.Module, Network]:
    model = model or small_mmdit()
    torch.manual_seed(3)
    network = lycoris.create_network(1.0, 8 if case == "boft" else 4, 2.0, None, [], model, **CASES[case])
    return model, network


@functools.cache
def trained_state(case: str) -> tuple[dict[str, Tensor], list[float]]:
    """The state after three steps, and the losses on the way."""
    model, network = made(case)
    network.train().attach()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    target = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = (model(**mmdit_inputs()) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}, losses


def after_training(case: str) -> tuple[torch.nn.Module, Network]:
    model, network = made(case)
    network.load_state_dict(trained_state(case)[0], strict=True)
    network.eval().attach()
    return model, network


@pytest.mark.parametrize("case", CASES)
def test_train_save_read_reload_and_merge(case: str, tmp_path):
    losses = trained_state(case)[1]
    model, network = after_training(case)
    assert losses[-1] < losses[0]
    base_model = small_mmdit()
    base = base_model(**mmdit_inputs())
    attached = model(**mmdit_inputs())
    assert relative_error(attached, base) > 1e-3
    network.save_weights(tmp_path / "a.safetensors", torch.float32)
    file = read_network_file(tmp_path / "a.safetensors")

    assert relative_error(as_comfyui(base_model, file)(**mmdit_inputs()), attached) < 2e-5

    merged_file = copy.deepcopy(base_model)
    merge_layers(group_by_layer(file, "a"), layers_by_name([], merged_file), 1.0, "a")
    assert relative_error(merged_file(**mmdit_inputs()), attached) < 2e-5

    other_model, other = made(case)
    other.load_weights(tmp_path / "a.safetensors")
    other.eval().attach()
    assert relative_error(other_model(**mmdit_inputs()), attached) < 2e-5

    again = other.state_dict_for_saving(torch.float32)
    assert again.keys() == file.keys()
    assert all(torch.allclose(again[key], file[key], atol=1e-7) for key in file)

    network.merge()
    assert relative_error(model(**mmdit_inputs()), attached) < 2e-5


def as_comfyui(model: torch.nn.Module, file: dict[str, Tensor]) -> torch.nn.Module:
    """A copy of the model with the file applied the way ComfyUI finds and applies it."""
    changed = copy.deepcopy(model)
    names = {
        "lora_unet_" + path.removesuffix(".weight").replace(".", "_"): parameter
        for path, parameter in changed.named_parameters()
        if path.endswith(".weight")
    }
    for name, tensors in group_by_layer(file, "file").items():
        names[name].data = readers.read(names[name].data, tensors)
        if "diff_b" in tensors:
            layer = layers_by_name([], changed)[name]
            layer.bias.data = layer.bias.data + tensors["diff_b"]
    return changed


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_dim_from_weights_rebuilds_the_network(case: str):
    model, network = after_training(case)
    attached = model(**mmdit_inputs())
    network.detach()
    again, tensors = lycoris.create_network_from_weights(1.0, None, None, [], model, network.state_dict_for_saving())
    again.eval().attach()
    assert relative_error(model(**mmdit_inputs()), attached) < 2e-5
    assert again.state_dict_for_saving().keys() == tensors.keys()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_resumed_training_equals_unbroken_training(case: str):
    """To the bit: state_dict folds and rounds nothing."""

    def steps(network: Network, model: torch.nn.Module) -> dict[str, Tensor]:
        network.train().attach()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        model(**mmdit_inputs()).square().mean().backward()
        optimizer.step()
        return {name: parameter.clone() for name, parameter in network.named_parameters()}

    model, network = after_training(case)
    other_model, other = made(case)
    other.load_state_dict(network.state_dict(), strict=True)
    unbroken, resumed = steps(network, model), steps(other, other_model)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_averages_holds_averages_alone(case: str):
    """An EMA's weights are given in place of the live ones: what is saved is what a network with them would save."""
    _, network = made(case)
    live = network.state_dict_for_saving()
    averages = {name: parameter.detach() + 0.1 for name, parameter in network.named_parameters()}
    saved = network.state_dict_for_saving(None, averages)
    assert all(torch.equal(live[key], value) for key, value in network.state_dict_for_saving().items())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(averages[name])
    wanted = network.state_dict_for_saving()
    assert saved.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(saved[key], wanted[key])] == []


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_works_on_a_bfloat16_model(case: str):
    model = small_mmdit()
    reference_model, reference = after_training(case)
    reference.set_multiplier(8.0)  # well above bfloat16's rounding
    expected = reference_model(**mmdit_inputs())
    reference.detach()
    base = reference_model(**mmdit_inputs())
    _, network = made(case, model.bfloat16())
    network.load_tensors(reference.state_dict_for_saving(), "x")
    network.set_multiplier(8.0)
    base16 = model(**mmdit_inputs(dtype=torch.bfloat16))
    network.attach()
    actual = model(**mmdit_inputs(dtype=torch.bfloat16))
    change, wanted = (actual - base16).float(), expected - base
    assert actual.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.9
    actual.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case != "boft"])
def test_strength_is_linear_in_the_change(case: str):
    _, network = after_training(case)
    layer = network.layers[QKV].layer
    x = torch.randn(2, 5, 64)
    outputs = {}
    for strength in (0.0, 0.5, 1.0):
        network.set_multiplier(strength)
        outputs[strength] = layer(x)
    torch.testing.assert_close(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0.0], layer.forward(x), rtol=1e-5, atol=1e-5)


def test_base_model_inside_disable_adapters():
    model, network = after_training("lokr")
    with network.disable_adapters():
        inside = model(**mmdit_inputs())
    network.detach()
    assert torch.equal(inside, model(**mmdit_inputs()))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ROTATED])
def test_norm_cap(case: str):
    _, network = after_training(case)

    def norms() -> list[float]:
        actual = []
        for layer in network.layers.values():
            tensors = {key: value.detach() for key, value in layer.export_state().items() if key != "dora_scale"}
            actual.append((readers.read(layer.layer.weight, tensors) - layer.layer.weight).norm().item())
        return actual

    before = norms()
    limit = sorted(before)[len(before) // 2] * 1.01
    report = network.scale_weight_norms(limit)
    assert norms() == pytest.approx([min(norm, limit) for norm in before], rel=2e-3)
    assert report.keys_scaled.item() == sum(norm > limit for norm in before)
    assert report.maximum_norm.item() == pytest.approx(limit, rel=1e-3)


def test_norm_cap_of_a_rotation_is_refused():
    _, network = made("diag-oft")
    with pytest.raises(UserError, match="rotation"):
        network.scale_weight_norms(1.0)
    assert lycoris.check_network_args(["algo=boft"], None, 1.0)


def test_names_are_those_of_a_plain_lora():
    model, clip, t5 = tiny_mmdit(), tiny_clip(), tiny_t5()
    plain = network_module("networks.lora").create_network(1.0, 4, 1, None, [clip, None, t5], model, train_t5xxl="1")
    for algo in ("loha", "glora"):
        network = lycoris.create_network(1.0, 4, 1, None, [clip, None, t5], model, algo=algo, train_t5xxl="1")
        assert set(network.layers) == set(plain.layers)
        assert list(network.layers) == list(plain.layers)
    without_t5 = lycoris.create_network(1.0, 4, 1, None, [None, clip, t5], None, algo="loha")
    assert without_t5.trained_parts == {"lora_te2_"}


def test_presets_choose_layers():
    model = tiny_mmdit()
    everything = set(lycoris.create_network(1.0, 4, 1, None, [], model, preset="full").layers)
    usual = set(lycoris.create_network(1.0, 4, 1, None, [], model).layers)
    attention = set(lycoris.create_network(1.0, 4, 1, None, [], model, preset="attn-only").layers)
    assert everything - usual == {
        "lora_unet_x_embedder_proj",
        "lora_unet_final_layer_linear",
        "lora_unet_final_layer_adaLN_modulation_1",
    }
    assert attention == {name for name in usual if "_attn" in name}
    again = set(lycoris.create_network(1.0, 4, 1, None, [], model).layers)
    assert again == usual  # nothing of the last preset is left


def test_preset_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'unet_target_module = ["SingleDiTBlock"]\n[module_algo_map.Mlp]\nalgo = "lokr"\nfactor = 4\n', encoding="utf-8"
    )
    network = lycoris.create_network(1.0, 4, 1, None, [], tiny_mmdit(), algo="loha", preset=str(path))
    kinds = {name: layer.inner.name for name, layer in network.layers.items()}
    assert {kind for name, kind in kinds.items() if "mlp" in name} == {"kron"}  # LyCORIS's name of LoKr
    assert {kind for name, kind in kinds.items() if "mlp" not in name} == {"loha"}
    with pytest.raises(UserError, match="can't be read"):
        lycoris.create_network(1.0, 4, 1, None, [], tiny_mmdit(), preset=str(tmp_path / "absent.toml"))


def test_quantized_base_trains_with_factored_algorithms_and_refuses_the_others():
    import bitsandbytes as bnb

    for case in ("locon", "loha", "lokr", "glora"):
        model = quantized_mmdit(bnb)
        _, network = made(case, model)
        network.train().attach()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            model(**mmdit_inputs()).square().mean().backward()
            optimizer.step()
        assert any(p.grad.any() for p in network.parameters())
    for case in ("locon dora", "diag-oft", "full"):
        with pytest.raises(UserError, match="quantised"):
            made(case, quantized_mmdit(bnb))


def quantized_mmdit(bnb) -> torch.nn.Module:
    model = small_mmdit()
    for block in model.joint_blocks:
        plain = block.x_block.mlp.fc1
        layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4")
        layer.load_state_dict(plain.state_dict())
        block.x_block.mlp.fc1 = layer.to("cpu").requires_grad_(False)
    return model


def test_loraplus_and_rates():
    network = lycoris.create_network(1.0, 4, 1, None, [tiny_clip()], tiny_mmdit(), loraplus_lr_ratio="4")
    groups = network.parameter_groups(LearningRates.from_options(1e-3, None, [1e-4]))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("textencoder 1", 1e-4),
        ("textencoder 1 plus", 4e-4),
        ("unet", 1e-3),
        ("unet plus", 4e-3),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["algo=dylora"], "dylora is not supported"),
        (["algo=ia3"], "no client reads"),
        (["algo=lorra"], "one of lora, locon"),
        (["algoo=loha"], "Did you mean algo?"),
        (["train_norm=True"], "norms have no weights"),
        (["algo=boft", "bypass_mode=True"], "bypass_mode=True can't do algo=boft"),
        (["algo=glora", "dora_wd=True"], "dora_wd works with"),
        (["algo=full", "dropout=0.1"], "use module_dropout"),
        (["algo=lokr", "rank_dropout=0.1"], "lokr has no rank dropout"),
        (["wd_on_output=True"], "give dora_wd=True too"),
        (["algo=loha", "loraplus_lr_ratio=4"], "LoRA"),
        (["preset=everything"], "preset must be one of"),
    ],
)
def test_arguments_that_would_do_nothing_or_harm_are_errors(arguments: list[str], words: str):
    problems = lycoris.check_network_args(arguments)
    assert len(problems) == 1 and words in problems[0]


def test_rank_that_boft_cannot_take_is_an_error():
    with pytest.raises(UserError, match=r"--network_dim 7 is too small for algo=boft .* use 18 or more"):
        lycoris.create_network(1.0, 7, 1, None, [], tiny_mmdit(), algo="boft")


def test_module_dropout_drops_the_change():
    torch.manual_seed(0)
    network = lycoris.create_network(1.0, 4, 1, None, [], tiny_mmdit(), algo="loha", module_dropout="0.5")
    layer = network.layers[QKV]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    network.train().attach()
    x = torch.randn(2, 64)
    base = layer.layer.forward(x)
    dropped = sum(torch.equal(layer.layer(x), base) for _ in range(60))
    assert 12 < dropped < 48


@pytest.mark.parametrize("rank", [2, 4])
def test_a_share_of_no_ranks_at_all_is_never_divided_by(rank: int):
    """LyCORIS's rank_dropout_scale is NaN where a layer keeps none of its ranks."""
    arguments = {"algo": "locon", "rank_dropout": "0.1", "rank_dropout_scale": "True"}
    with pytest.raises(UserError, match="rank_dropout_scale divides by the share"):
        lycoris.create_network(1.0, rank, 1, None, [], tiny_mmdit(), **arguments)
    for kept in ({**arguments, "algo": "loha"}, {**arguments, "rank_dropout_scale": "False"}):
        lycoris.create_network(1.0, rank, 1, None, [], tiny_mmdit(), **kept)
    lycoris.create_network(1.0, 16, 1, None, [], tiny_mmdit(), **arguments)


@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_rank_dropout_acts_after_a_preview_as_before_it_and_not_inside(algo: str):
    torch.manual_seed(0)
    network = lycoris.create_network(1.0, 4, 1, None, [], tiny_mmdit(), algo=algo, rank_dropout="0.5")
    layer = network.layers[QKV]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    network.train().attach()
    x = torch.randn(2, 64)

    def drops() -> bool:
        return not all(torch.equal(layer.layer(x), layer.layer(x)) for _ in range(10))

    before = drops()
    with preserve_rng_state([network]):
        inside = drops()
    assert (before, inside, drops()) == (True, False, True)


def test_without_lycoris_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['lycoris'] = None; sys.modules['lycoris.kohya'] = None\n"
        "from networks.network_modules import network_module\n"
        "from library.common.errors import UserError\n"
        "module = network_module('lycoris.kohya')\n"
        "try:\n    module.create_network(1.0, 4, 1, None, [], None)\n"
        "except UserError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install lycoris-lora" in run.stdout


@pytest.mark.parametrize("case", ["locon dora", "loha dora", "lokr dora"])
def test_magnitudes_stay_float32_in_training_and_in_files(case: str):
    _, network = made(case)
    exact = {key: tensor for key, tensor in network.state_dict_for_saving().items() if key.endswith(".dora_scale")}
    saved = network.to(torch.bfloat16).state_dict_for_saving(torch.float16)
    assert exact and all(torch.equal(saved[key], tensor) for key, tensor in exact.items())
    assert {tensor.dtype for key, tensor in saved.items() if key.endswith(".alpha")} <= {torch.float32}


@pytest.mark.parametrize(
    ("algo", "kind", "rank", "smallest"),
    [
        ("boft", "sd35m", 16, 54),
        ("boft", "sd35l", 64, 114),
        ("diag-oft", "sd35m", 1, 2),
    ],
)
def test_a_rank_that_is_too_small_for_a_rotation_is_answered_with_the_smallest(
    algo: str, kind: str, rank: int, smallest: int
):
    with torch.device("meta"):
        model = MMDiT(real_sizes.MMDITS[kind])

    def create(dim: int) -> Network:
        return lycoris.create_network(1.0, dim, 1.0, None, [], model, algo=algo)

    with pytest.raises(UserError, match=f"--network_dim {rank} is too small for algo={algo} .* use {smallest} or more"):
        create(rank)
    with pytest.raises(UserError, match=f"use {smallest} or more"):
        create(smallest - 1)
    assert create(smallest).layers
