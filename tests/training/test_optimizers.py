"""Every optimizer by name: takes steps, resumes to the bit, is checked before the run, and is logged truthfully."""

import copy
import importlib
import importlib.util
import io

import pytest
import torch
from torch import nn

from library.common.errors import UserError
from library.common.seeds import seed_everything
from library.training import optimizer_names
from library.training.optimizer_args import parse_keyword_args
from library.training.optimizer_names import CATALOGUE, choose_name, find_optimizer
from library.training.optimizers import build_optimizer, check_optimizer, logged_rates

TORCH_NAMES = ("Adam", "Adamax", "NAdam", "RAdam", "SGD", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Muon")
OTHER_NAMES = (
    "Adam8bit",
    "AdEMAMix8bit",
    "CAME",
    "ScheduleFreeAdamW",
    "StableAdamW",
    "torch.optim.Adafactor",
    "pytorch_optimizer.ADOPT",
    "prodigyplus.ProdigyPlusScheduleFree",
    "bitsandbytes.optim.AdEMAMix",
)
EVERY_NAME = (*(entry.name for entry in CATALOGUE.values()), *TORCH_NAMES, *OTHER_NAMES)


def rate_for(name):
    return 1.0 if name.startswith("DAdapt") or "Prodigy" in name else 1e-2


def make_parameters(dtype=torch.float32, rank=16, width=320):
    """Like a LoRA: a random Down of over 4096 elements (bitsandbytes keeps smaller ones in 32 bits), an Up of zeros."""
    generator = torch.Generator().manual_seed(0)
    down = nn.Parameter((torch.randn(rank, width, generator=generator) * 0.1).to(dtype))
    return [down, nn.Parameter(torch.zeros(width, rank, dtype=dtype))]


def build(name, parameters, args=()):
    rate = rate_for(name)
    groups = [{"params": [each], "lr": rate} for each in parameters]
    bundle = build_optimizer(name, groups, rate, args)
    bundle.train()
    return bundle


def take_steps(bundle, parameters, steps):
    """Steps downhill on |Up Down - 1|^2, whose gradients come from the weights alone."""
    for step in steps:
        seed_everything(step)  # for optimizers that draw numbers, as a training step does
        bundle.optimizer.zero_grad()
        down, up = parameters
        (up.float() @ down.float() - 1).square().mean().backward()
        bundle.optimizer.step()


def assert_same_state(first, original, resumed, restored):
    for old, new in zip(first, resumed, strict=True):
        before, after = original.optimizer.state[old], restored.optimizer.state[new]
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
            else:
                assert value == after[key], key


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EVERY_NAME)
def test_takes_steps_and_resumes_to_the_bit(name):
    unbroken = make_parameters()
    take_steps(build(name, unbroken), unbroken, range(8))
    assert all(torch.isfinite(each).all() for each in unbroken)
    assert all(not torch.equal(*pair) for pair in zip(unbroken, make_parameters(), strict=True))

    first = make_parameters()
    bundle = original = build(name, first)
    take_steps(bundle, first, range(5))
    saved = through_a_file({"weights": [each.detach() for each in first], "optimizer": bundle.state_dict()})

    resumed = make_parameters()
    bundle = build(name, resumed)
    bundle.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for parameter, weights in zip(resumed, saved["weights"], strict=True):
            parameter.copy_(weights)
    assert_same_state(first, original, resumed, bundle)
    take_steps(bundle, resumed, range(5, 8))
    assert all(torch.equal(*pair) for pair in zip(unbroken, resumed, strict=True))


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "Prodigy", "AdamWScheduleFree", "Adafactor", "CAME"])
def test_resumes_to_the_bit_with_bf16_weights(name):
    unbroken = make_parameters(torch.bfloat16)
    take_steps(build(name, unbroken), unbroken, range(8))
    first = make_parameters(torch.bfloat16)
    bundle = build(name, first)
    take_steps(bundle, first, range(5))
    resumed = [nn.Parameter(each.detach().clone()) for each in first]
    other = build(name, resumed)
    other.load_state_dict(through_a_file(bundle.state_dict()))
    take_steps(other, resumed, range(5, 8))
    assert all(torch.equal(*pair) for pair in zip(unbroken, resumed, strict=True))


def test_eight_bit_states_are_bytes():
    parameters = make_parameters()
    bundle = build("AdamW8bit", parameters)
    take_steps(bundle, parameters, range(1))
    assert bundle.optimizer.state[parameters[0]]["state1"].dtype == torch.uint8


def test_names_are_found_in_any_case_and_empty_means_adamw():
    assert find_optimizer("adamw8BIT").class_name == "AdamW8bit"
    assert find_optimizer("").name == "AdamW" and find_optimizer("came").class_name == "CAME"
    assert find_optimizer("sgdnesterov").defaults == {"momentum": 0.9, "nesterov": True}
    assert choose_name("") == "AdamW" and choose_name("lion", use_lion_optimizer=True) == "lion"
    assert choose_name("", use_8bit_adam=True) == "AdamW8bit" and choose_name("", False, True) == "Lion"
    with pytest.raises(UserError, match="--optimizer_type and --use_8bit_adam"):
        choose_name("Lion", use_8bit_adam=True)


def test_unknown_names_get_the_nearest_ones():
    with pytest.raises(UserError, match=r"AdamWW is not known\. Did you mean AdamW"):
        find_optimizer("AdamWW")
    with pytest.raises(UserError, match="Did you mean ProdigyPlusScheduleFree"):
        find_optimizer("prodigy_plus_schedule_free")
    with pytest.raises(UserError, match="has no Nothing"):
        find_optimizer("torch.optim.Nothing").load()


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("Lion", "lion_pytorch", "lion-pytorch"),
        ("AdamW8bit", "bitsandbytes", "bitsandbytes"),
        ("PagedAdam8bit", "bitsandbytes", "bitsandbytes"),
        ("Prodigy", "prodigyopt", "prodigyopt"),
        ("DAdaptAdam", "dadaptation", "dadaptation"),
        ("RAdamScheduleFree", "schedulefree", "schedulefree"),
        ("ProdigyPlusScheduleFree", "prodigyplus", "prodigy-plus-schedule-free"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigyplus", "prodigy-plus-schedule-free"),
        ("CAME", "pytorch_optimizer", "pytorch-optimizer"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, name, module, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else real(wanted))
    (problem,) = check_optimizer(name, [])
    assert f"pip install {package}" in problem and "\n" not in problem
    with pytest.raises(UserError, match=f"pip install {package}"):
        build_optimizer(name, [{"params": make_parameters()}], 1e-4)


def test_checking_a_catalogued_optimizer_imports_nothing(monkeypatch):
    def refuse(name):
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(optimizer_names.importlib, "import_module", refuse)
    for entry in CATALOGUE.values():
        assert check_optimizer(entry.name, []) == []


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("AdamW", ["weight_decai=0.1"], "weight_decai"),
        ("AdamW", ["betas=0.9,1.5"], "beta"),
        ("AdamW8bit", ["blocks=3"], "blocks"),
        ("LBFGS", [], "closure"),
        ("AdaHessian", [], "cannot be used"),
        ("AdamW", ["weight_decay"], "key=value"),
        ("AdamW", ["lr=1e-3"], "--learning_rate"),
        ("no_such_module.Optimizer", [], "no_such_module"),
    ],
)
def test_what_cannot_work_is_found_before_the_run(name, args, words):
    before = torch.get_rng_state()
    (problem,) = check_optimizer(name, args)
    assert words in problem
    assert torch.equal(before, torch.get_rng_state())


def test_good_arguments_pass_the_check_and_reach_the_optimizer():
    args = ["weight_decay=0.01", "betas=0.9,0.99"]
    assert check_optimizer("AdamW", args) == []
    assert check_optimizer("Prodigy", ["decouple=True", "d_coef=2.0"]) == []
    group = build("AdamW", make_parameters(), args).optimizer.param_groups[0]
    assert group["weight_decay"] == 0.01 and group["betas"] == (0.9, 0.99)


def test_arguments_are_python_literals_divided_at_the_first_equals_sign():
    parsed = parse_keyword_args(
        "--x", ["a=1e-3", "b=True", "c=0.9,0.99", "d='p=q'", "e=None", " f = [1, 2]", "g='']"][:6]
    )
    assert parsed == {"a": 1e-3, "b": True, "c": (0.9, 0.99), "d": "p=q", "e": None, "f": [1, 2]}
    assert parse_keyword_args("--x", None) == {}
    assert parse_keyword_args("--x", ["rule=1:10,0.1"], text_keys=("rule",)) == {"rule": "1:10,0.1"}


def test_every_bad_argument_is_listed_at_once():
    with pytest.raises(UserError) as error:
        parse_keyword_args("--optimizer_args", ["a=true", "b", "a2=x y", "c=1", "c=2", "=3"])
    text = str(error.value)
    assert (
        len(error.value.problems) == 5 and "Write a=True" in text and "c is given twice" in text and "a2='x y'" in text
    )


def test_metadata_name_tells_class_and_arguments():
    assert build("AdamW", make_parameters()).name_for_metadata == "torch.optim.adamw.AdamW"
    got = build("AdamW8bit", make_parameters(), ["weight_decay=0.1", "betas=0.9,0.99"]).name_for_metadata
    assert got == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))"


def test_torch_optimizers_are_fused_unless_told_otherwise():
    assert build("AdamW", make_parameters()).optimizer.param_groups[0]["fused"] is True
    assert build("SGDNesterov", make_parameters()).optimizer.param_groups[0]["fused"] is True
    assert not build("AdamW", make_parameters(), ["foreach=True"]).optimizer.param_groups[0]["fused"]
    assert not build("AdamW", make_parameters(), ["fused=False"]).optimizer.param_groups[0]["fused"]


def test_a_device_without_fused_kernels_takes_the_ordinary_form():
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))  # has no fused kernel either
    assert not build_optimizer("AdamW", [{"params": [parameter]}], 1e-3).optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD", "SGDNesterov", "Adam", "AdamW", "Adagrad"])
def test_the_form_that_is_chosen_equals_the_plain_one(name: str, dtype: torch.dtype):
    """torch 2.13's fused SGD on a CPU steps only those weights of half precision that its vectors leave over."""
    ends = []
    for arguments in ((), ("fused=False", "foreach=False")):
        weights = nn.Parameter(torch.ones(1003, dtype=dtype))
        bundle = build_optimizer(name, [{"params": [weights]}], 0.05, arguments)
        for step in range(3):
            draw = torch.rand(1003, generator=torch.Generator().manual_seed(step))
            weights.grad = (1 + draw).to(dtype)
            bundle.optimizer.step()
        ends.append(weights.detach().float())
    assert (ends[0] < 0.95).all()
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_adafactor_sets_its_own_rate_by_default():
    parameters = make_parameters()
    bundle = build_optimizer("Adafactor", [{"params": parameters, "lr": 3e-4}], 1e-4)
    assert bundle.forced_schedule == "adafactor:0.0001" and bundle.optimizer.param_groups[0]["lr"] is None
    assert "relative_step=True" in bundle.name_for_metadata
    assert logged_rates(bundle.optimizer, ["unet"]) == {}
    take_steps(bundle, parameters, range(1))
    rms = make_parameters()[0].square().mean().sqrt().item()
    assert logged_rates(bundle.optimizer, ["unet"])["lr/unet"] == pytest.approx(1e-2 * rms, rel=1e-4)


def test_adafactor_with_a_given_rate_keeps_the_groups_rates_and_the_schedule():
    args = ["relative_step=False", "scale_parameter=False"]
    bundle = build_optimizer("adafactor", [{"params": make_parameters(), "lr": 3e-4}], 1e-4, args)
    assert bundle.forced_schedule is None and bundle.optimizer.param_groups[0]["lr"] == 3e-4
    warm = build_optimizer(
        "adafactor", [{"params": make_parameters(), "lr": 3e-4}], 1e-4, ["relative_step=False", "warmup_init=True"]
    )
    assert warm.optimizer.param_groups[0]["relative_step"] is True


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptAdan", "DAdaptation"])
def test_one_rate_for_all_groups_where_d_is_shared(name):
    down, up = make_parameters()
    groups = [{"params": [down], "lr": 1.0}, {"params": [up], "lr": 0.5}]
    assert check_optimizer(name, [], rates=[1.0, 1.0, 0.0]) == []
    assert "one learning rate for everything, not 0.5, 1" in check_optimizer(name, [], rates=[1.0, 0.5])[0]
    with pytest.raises(UserError, match="one learning rate"):
        build_optimizer(name, groups, 1.0)


def test_a_small_rate_for_an_adaptive_optimizer_is_warned_about(caplog):
    assert check_optimizer("Prodigy", [], rates=[1e-4]) == []  # as a dry run does
    assert "1.0 is usual" in caplog.text


SCHEDULE_FREE = (
    "RAdamScheduleFree",
    "AdamWScheduleFree",
    "SGDScheduleFree",
    "ProdigyPlusScheduleFree",
    "ScheduleFreeAdamW",
)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_evaluation_leaves_training_as_it_was(name):
    plain, watched = make_parameters(), make_parameters()
    take_steps(build(name, plain), plain, range(12))
    bundle = build(name, watched)
    assert bundle.is_schedule_free
    for step in range(12):
        take_steps(bundle, watched, [step])
        training = [each.detach().clone() for each in watched]
        with bundle.evaluation_weights():
            averaged = [each.detach().clone() for each in watched]
        assert all(torch.equal(*pair) for pair in zip(training, watched, strict=True))
    assert all(torch.equal(*pair) for pair in zip(plain, watched, strict=True))
    assert not torch.equal(averaged[0], watched[0])
    bundle.eval()
    torch.testing.assert_close(averaged[0], watched[0].detach())


def test_others_have_one_set_of_weights():
    for name, args in (("AdamW", []), ("ProdigyPlusScheduleFree", ["use_schedulefree=False"])):
        parameters = make_parameters()
        bundle = build(name, parameters, args)
        assert not bundle.is_schedule_free
        take_steps(bundle, parameters, range(3))
        before = parameters[0].detach().clone()
        with bundle.evaluation_weights():
            assert torch.equal(before, parameters[0])
        bundle.eval()
        assert torch.equal(before, parameters[0])


def test_rates_are_logged_under_the_original_s_names():
    down, up = make_parameters()
    bundle = build_optimizer("AdamW", [{"params": [down], "lr": 2e-4}, {"params": [up], "lr": 1e-3}], 1e-4)
    assert logged_rates(bundle.optimizer, ["textencoder 1", "unet"]) == {"lr/textencoder 1": 2e-4, "lr/unet": 1e-3}
    for name in ("Prodigy", "DAdaptAdam"):
        parameters = make_parameters()
        bundle = build(name, parameters)
        take_steps(bundle, parameters, range(4))
        rates = logged_rates(bundle.optimizer, ["unet", "unet plus"])
        assert rates["lr/d*lr/unet"] == bundle.optimizer.param_groups[0]["d"] > 0 and rates["lr/unet plus"] == 1.0
    bundle = build("ProdigyPlusScheduleFree", make_parameters())
    assert logged_rates(bundle.optimizer, ["a", "b"])["lr/d*lr"] == pytest.approx(1e-6)
    with pytest.raises(ValueError):
        logged_rates(bundle.optimizer, ["only one"])


def test_a_schedule_free_warm_up_is_logged_as_it_acts():
    parameters = make_parameters()
    bundle = build("AdamWScheduleFree", parameters, ["warmup_steps=10"])
    take_steps(bundle, parameters, range(3))
    assert logged_rates(bundle.optimizer, ["a", "b"])["lr/a"] == pytest.approx(1e-2 * 3 / 10)


@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_of_pytorch_optimizer_resumes_or_is_refused_by_the_check():
    import pytorch_optimizer

    works, broken = [], []
    for name in pytorch_optimizer.get_supported_optimizers():
        path = f"pytorch_optimizer.{pytorch_optimizer.load_optimizer(name).__name__}"
        if check_optimizer(path, []):
            continue
        unbroken, resumed = make_parameters(rank=4, width=12), make_parameters(rank=4, width=12)
        take_steps(build(path, unbroken), unbroken, range(4))
        bundle = build(path, resumed)
        take_steps(bundle, resumed, range(2))
        other = build(path, resumed)
        other.load_state_dict(copy.deepcopy(bundle.state_dict()))
        take_steps(other, resumed, range(2, 4))
        (works if all(map(torch.equal, unbroken, resumed)) else broken).append(name)
    assert not broken and len(works) > 100
