"""Schedules number by number against transformers' and diffusers', in the right unit, checked early, resumed exactly."""

import io

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from library.common.errors import UserError
from library.training.optimizers import build_optimizer
from library.training.schedulers import SCHEDULE_NAMES, SchedulerSettings, build_schedule, check_schedule, resolve_steps

TOTAL = 40


def optimizer(*rates):
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (1e-3,)]
    return torch.optim.SGD(groups, lr=groups[0]["lr"])


def curve(scheduler, optim, steps, group=0):
    """The rate at each of `steps` steps, stepping as the trainer does."""
    rates = []
    for _ in range(steps):
        rates.append(optim.param_groups[group]["lr"])
        optim.step()
        scheduler.step()
    return rates


def ours(steps=TOTAL + 5, rate=1e-3, **settings):
    optim = optimizer(rate)
    return curve(build_schedule(SchedulerSettings(TOTAL, **settings), optim), optim, steps)


# (our settings, transformers' name, its arguments)
CASES = [
    ({"name": "linear", "warmup_steps": 6}, "linear", {"num_warmup_steps": 6, "num_training_steps": TOTAL}),
    ({"name": "cosine", "warmup_steps": 6}, "cosine", {"num_warmup_steps": 6, "num_training_steps": TOTAL}),
    ({"name": "cosine", "num_cycles": 9}, "cosine", {"num_warmup_steps": 0, "num_training_steps": TOTAL}),
    (
        {"name": "cosine_with_restarts", "warmup_steps": 4, "num_cycles": 3},
        "cosine_with_restarts",
        {"num_warmup_steps": 4, "num_training_steps": TOTAL, "num_cycles": 3},
    ),
    (
        {"name": "polynomial", "warmup_steps": 0.1, "power": 2.5},
        "polynomial",
        {"num_warmup_steps": 4, "num_training_steps": TOTAL, "power": 2.5},
    ),
    ({"name": "constant"}, "constant", {}),
    ({"name": "constant_with_warmup", "warmup_steps": "25%"}, "constant_with_warmup", {"num_warmup_steps": 10}),
    ({"name": "inverse_sqrt", "warmup_steps": 6}, "inverse_sqrt", {"num_warmup_steps": 6}),
    ({"name": "inverse_sqrt", "timescale": 20}, "inverse_sqrt", {"num_warmup_steps": 0, "timescale": 20}),
    (
        {"name": "cosine_with_min_lr", "warmup_steps": 6, "min_lr_ratio": 0.2, "num_cycles": 3},
        "cosine_with_min_lr",
        {"num_warmup_steps": 6, "num_training_steps": TOTAL, "min_lr_rate": 0.2, "num_cycles": 1.5},
    ),
    (
        {"name": "cosine_with_min_lr", "args": ("min_lr=1e-4",)},
        "cosine_with_min_lr",
        {"num_warmup_steps": 0, "num_training_steps": TOTAL, "min_lr": 1e-4},
    ),
    (
        {"name": "cosine_warmup_with_min_lr", "warmup_steps": 6, "min_lr_ratio": 0.2},
        "cosine_warmup_with_min_lr",
        {"num_warmup_steps": 6, "num_training_steps": TOTAL, "min_lr_rate": 0.2},
    ),
    (
        {"name": "cosine_warmup_with_min_lr", "warmup_steps": 6, "min_lr_ratio": 0.2, "args": ("warmup_lr_rate=0.3",)},
        "cosine_warmup_with_min_lr",
        {"num_warmup_steps": 6, "num_training_steps": TOTAL, "min_lr_rate": 0.2, "warmup_lr_rate": 0.3},
    ),
    (
        {"name": "warmup_stable_decay", "warmup_steps": 6, "decay_steps": 0.5, "min_lr_ratio": 0.1},
        "warmup_stable_decay",
        {"num_warmup_steps": 6, "num_decay_steps": 20, "num_training_steps": TOTAL, "min_lr_ratio": 0.1},
    ),
]
CASES += [
    (
        {
            "name": "warmup_stable_decay",
            "warmup_steps": 6,
            "decay_steps": 12,
            "args": (f"warmup_type={kind}", f"decay_type={kind}"),
        },
        "warmup_stable_decay",
        {
            "num_warmup_steps": 6,
            "num_decay_steps": 12,
            "num_training_steps": TOTAL,
            "warmup_type": kind,
            "decay_type": kind,
        },
    )
    for kind in ("linear", "cosine", "1-sqrt")
]


@pytest.mark.parametrize(
    ("settings", "name", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_name_equals_transformers(settings, name, arguments):
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    optim = optimizer()
    theirs = curve(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)](optim, **arguments), optim, TOTAL + 5)
    assert ours(**settings) == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_no_name_of_transformers_is_missing():
    from transformers.trainer_utils import SchedulerType

    assert {each.value for each in SchedulerType} <= set(SCHEDULE_NAMES)


@pytest.mark.parametrize("rules", ["1:10,0.1:20,0.01:30,0.005", "0.5:3,2", "0.3"])
def test_piecewise_constant_equals_diffusers(rules):
    from diffusers.optimization import get_piecewise_constant_schedule

    optim = optimizer()
    theirs = curve(get_piecewise_constant_schedule(optim, rules), optim, TOTAL)
    for pair in (f"step_rules={rules}", f"step_rules='{rules}'"):
        assert ours(TOTAL, name="piecewise_constant", args=(pair,)) == pytest.approx(theirs)


def test_each_group_keeps_its_own_rate_and_an_absolute_end_is_absolute():
    optim = optimizer(1e-3, 1e-5)
    schedule = build_schedule(SchedulerSettings(TOTAL, "polynomial", args=("lr_end=1e-6",)), optim)
    curve(schedule, optim, TOTAL // 2)
    assert [group["lr"] for group in optim.param_groups] == pytest.approx([(1e-3 + 1e-6) / 2, (1e-5 + 1e-6) / 2])
    curve(schedule, optim, TOTAL // 2)
    assert [group["lr"] for group in optim.param_groups] == pytest.approx([1e-6, 1e-6])


def test_one_call_is_one_optimiser_step():
    """Two processes with accumulation 4: each calls step() once an optimiser step, and the rate ends at 0 with the run."""
    for _process in range(2):
        optim = optimizer()
        schedule = build_schedule(SchedulerSettings(TOTAL, "linear"), optim)
        for batch in range(TOTAL * 4):
            if batch % 4 == 3:
                optim.step()
                schedule.step()
            if batch == TOTAL * 2 - 1:
                assert optim.param_groups[0]["lr"] == pytest.approx(0.5e-3)
        assert optim.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (0.0, 0),
        (1, 1),
        (1.0, 400),
        (0.1, 40),
        (100, 100),
        (250.0, 250),
        ("10%", 40),
        ("100%", 400),
        ("7", 7),
        ("0.5", 200),
    ],
)
def test_steps_are_counts_or_shares(value, steps):
    assert resolve_steps(value, 400) == steps


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_count_is_itself_and_a_share_is_within_the_total(count, total):
    assert resolve_steps(count, total) == resolve_steps(str(count), total) == count
    assert 0 <= resolve_steps((count % 100) / 100, total) <= total


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, "150%", "-5%", "ten", "", "%", float("nan"), float("inf")])
def test_other_steps_are_refused(value):
    with pytest.raises(UserError, match="neither a number of steps"):
        resolve_steps(value, 400)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cosin"}, "Did you mean cosine"),
        ({"name": "constant", "warmup_steps": 10}, "constant_with_warmup"),
        ({"name": "piecewise_constant", "args": ("step_rules=1",), "warmup_steps": 10}, "has no warm-up"),
        ({"name": "reduce_lr_on_plateau", "warmup_steps": 10}, "has no warm-up"),
        ({"name": "linear", "warmup_steps": 1.5}, "--lr_warmup_steps"),
        ({"name": "warmup_stable_decay", "decay_steps": "200%"}, "--lr_decay_steps"),
        ({"name": "warmup_stable_decay", "warmup_steps": 30, "decay_steps": 20}, "together longer"),
        ({"name": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "cosine_warmup_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"name": "cosine_with_min_lr", "min_lr_ratio": 0.1, "args": ("min_lr=1e-4",)}, "not both"),
        ({"name": "linear", "args": ("power=2",)}, "no argument power"),
        ({"name": "polynomial", "args": ("lr_ned=1e-5",)}, "Did you mean lr_end"),
        ({"name": "polynomial", "args": ("lr_end=1e-2",)}, "below every learning rate"),
        ({"name": "warmup_stable_decay", "args": ("decay_type=square",)}, "decay_type=square"),
        ({"name": "piecewise_constant"}, "needs its rules"),
        ({"name": "piecewise_constant", "args": ("step_rules=1:2:3,4",)}, "cannot be read"),
        ({"name": "reduce_lr_on_plateau", "args": ("patients=3",)}, "patients"),
        ({"name": "adafactor:1e-4"}, "Adafactor"),
        ({"type": "no_such_module.Thing"}, "cannot be imported"),
        ({"type": "NoSuchScheduler"}, "cannot be imported"),
        ({"type": "StepLR"}, "step_size"),
        ({"type": "StepLR", "args": ("step_size",)}, "key=value"),
    ],
)
def test_what_cannot_work_is_found_before_the_run(settings, words):
    (problem,) = check_schedule(SchedulerSettings(TOTAL, **settings), 1e-3)
    assert words in problem


def test_all_that_is_wrong_is_said_at_once():
    settings = SchedulerSettings(
        TOTAL, "warmup_stable_decay", warmup_steps=30, decay_steps=20, args=("a=1", "decay_type=x")
    )
    assert len(check_schedule(settings, 1e-3)) == 3


def test_good_settings_pass_the_check():
    for settings, *_ in CASES:
        assert check_schedule(SchedulerSettings(TOTAL, **settings), 1e-3) == []
    assert check_schedule(SchedulerSettings(TOTAL, "adafactor"), 1e-3, "Adafactor") == []
    assert check_schedule(SchedulerSettings(TOTAL, "adafactor"), 1e-3, "Adafactor", ["relative_step=False"]) != []


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"name": "linear", "power": 2.0}, "--lr_scheduler_power"),
        ({"name": "cosine", "num_cycles": 4}, "--lr_scheduler_num_cycles"),
        ({"name": "cosine", "decay_steps": 4}, "--lr_decay_steps"),
        ({"name": "constant", "timescale": 4}, "--lr_scheduler_timescale"),
        ({"name": "constant", "min_lr_ratio": 0.1}, "--lr_scheduler_min_lr_ratio"),
        ({"type": "ExponentialLR", "args": ("gamma=0.9",), "warmup_steps": 5}, "--lr_warmup_steps"),
    ],
)
def test_an_option_without_effect_is_said(settings, option, caplog):
    ours(1, **settings)
    assert f"{option} has no effect" in caplog.text
    caplog.clear()
    ours(1, name="polynomial", power=2.0)
    assert "no effect" not in caplog.text


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_loss_schedules_step_on_what_they_observe_alone(name):
    optim = optimizer()
    args = ("patience=1", "factor=0.5", "min_lr=1e-6")
    schedule = build_schedule(SchedulerSettings(TOTAL, name, args=args), optim)
    curve(schedule, optim, 5)
    assert optim.param_groups[0]["lr"] == 1e-3
    for loss in (1.0, 2.0, 2.0, 2.0):
        schedule.observe(loss)
    assert optim.param_groups[0]["lr"] < 1e-3


def test_other_schedules_do_not_mind_the_loss():
    optim = optimizer()
    schedule = build_schedule(SchedulerSettings(TOTAL, "linear"), optim)
    schedule.observe(1.0)
    assert optim.param_groups[0]["lr"] == 1e-3


def test_a_dotted_path_takes_its_arguments():
    optim = optimizer()
    expected = curve(torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=10, eta_min=1e-5), optim, 20)
    for path in ("torch.optim.lr_scheduler.CosineAnnealingLR", "CosineAnnealingLR"):
        assert ours(20, type=path, args=("T_max=10", "eta_min=1e-5")) == expected
    optim = optimizer()
    schedule = build_schedule(SchedulerSettings(TOTAL, type="ReduceLROnPlateau", args=("patience=0",)), optim)
    schedule.step()
    assert schedule.watches_loss


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "Adafactor"])
def test_self_scheduling_optimizers_get_none(name, caplog):
    bundle = build_optimizer(name, [{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 1e-3}], 1e-3)
    caplog.clear()
    given = SchedulerSettings(TOTAL, "cosine", warmup_steps=5)
    schedule = build_schedule(given, bundle.optimizer, bundle.is_schedule_free, bundle.forced_schedule)
    assert "no effect" in caplog.text
    before = [dict(group) for group in bundle.optimizer.param_groups]
    schedule.step()
    schedule.observe(1.0)
    assert [dict(group) for group in bundle.optimizer.param_groups] == before and schedule.state_dict() == {}
    schedule.load_state_dict({})
    caplog.clear()
    build_schedule(SchedulerSettings(TOTAL), bundle.optimizer, bundle.is_schedule_free, bundle.forced_schedule)
    assert caplog.text == ""


RESUMED = [
    {"name": "cosine_with_restarts", "warmup_steps": 5, "num_cycles": 2},
    {"name": "warmup_stable_decay", "warmup_steps": 5, "decay_steps": 20},
    {"name": "polynomial", "power": 2.0},
    {"name": "reduce_lr_on_plateau", "args": ("patience=2", "factor=0.7")},
    {"type": "OneCycleLR", "args": ("max_lr=1e-2", f"total_steps={TOTAL + 1}")},
    {"type": "CosineAnnealingWarmRestarts", "args": ("T_0=7",)},
]


@pytest.mark.parametrize("settings", RESUMED, ids=lambda each: each.get("name") or each["type"])
def test_resumes_exactly(settings):
    def fresh():
        optim = optimizer(1e-3, 2e-3)
        return optim, build_schedule(SchedulerSettings(TOTAL, **settings), optim)

    def run(optim, schedule, steps):
        rates = []
        for step in steps:
            optim.step()
            schedule.step()
            schedule.observe(float(step % 7))
            rates.append([group["lr"] for group in optim.param_groups])
        return rates

    unbroken = run(*fresh(), range(TOTAL))
    optim, schedule = fresh()
    run(optim, schedule, range(17))
    file = io.BytesIO()
    torch.save((optim.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    saved_optimizer, saved_schedule = torch.load(file, weights_only=True)
    optim, schedule = fresh()
    optim.load_state_dict(saved_optimizer)
    schedule.load_state_dict(saved_schedule)
    assert run(optim, schedule, range(17, TOTAL)) == unbroken[17:]
