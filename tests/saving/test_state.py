"""States appear whole or not at all, and hold what they were given."""

from __future__ import annotations

import os
import random

import pytest
import torch

from library.common.errors import UserError
from library.saving.restore import restore
from library.saving.state import (
    Snapshot,
    changed_options,
    newest_state,
    open_state,
    random_states,
    restore_random_states,
    take_snapshot,
    write_state,
)
from library.training.ema import WeightEma
from library.training.optimizers import OptimizerBundle
from library.training.train_progress import TrainProgress


def snapshot(step: int = 7):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    options = {"seed": 3, "resolution": (64, 64)}
    return take_snapshot(
        TrainProgress(1, 4, step), options, {"a.lora_down.weight": weight}, {"optimizer": optimizer}
    ), optimizer


def test_a_state_comes_back_as_it_was(tmp_path):
    taken, optimizer = snapshot()
    write_state(tmp_path / "x-step00000007-state", taken)
    state = open_state(tmp_path / "x-step00000007-state")
    assert state.position == TrainProgress(1, 4, 7)
    assert torch.equal(state.weights()["a.lora_down.weight"], taken.weights["a.lora_down.weight"])
    again = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 2))], lr=0.9)
    again.load_state_dict(state.component("optimizer"))
    assert torch.equal(again.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert again.param_groups[0]["lr"] == 0.1
    assert state.component("scheduler") is None
    restore_random_states(state.random_states(0))
    first = (random.random(), torch.rand(1).item())
    restore_random_states(taken.random_states)
    assert (random.random(), torch.rand(1).item()) == first


def test_a_snapshot_shares_no_memory_with_the_run():
    weight = torch.ones(2)
    taken = take_snapshot(TrainProgress(), {}, {"w": weight}, {})
    weight.zero_()
    assert taken.weights["w"].sum() == 2


def test_the_newest_whole_state_is_found_and_broken_ones_are_passed_over(tmp_path):
    for step, name in ((5, "x-000001-state"), (9, "x-step00000009-state"), (20, "other-state")):
        write_state(tmp_path / name, snapshot(step)[0])
    write_state(tmp_path / "x-step00000012-state", snapshot(12)[0])
    (tmp_path / "x-step00000012-state" / "train_state.json").write_text("{")
    (tmp_path / ".x-step00000013-state.tmp").mkdir()
    assert newest_state(tmp_path, "x").position.step == 9
    assert newest_state(tmp_path, "none") is None
    assert newest_state(tmp_path / "absent", "x") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "random_states_0.pt"])
def test_a_state_with_a_file_that_is_cut_short_is_passed_over_with_its_reason(tmp_path, name, caplog):
    """As a machine leaves it that vanishes, on a disk that does not keep its promises."""
    for step in (5, 9):
        write_state(tmp_path / f"x-step{step:08d}-state", snapshot(step)[0])
    broken = tmp_path / "x-step00000009-state" / name
    broken.write_bytes(broken.read_bytes()[:-7])
    assert newest_state(tmp_path, "x").position.step == 5
    assert "passed over" in caplog.text and "cut short" in caplog.text and name in caplog.text
    with pytest.raises(UserError, match="cut short"):
        open_state(tmp_path / "x-step00000009-state")


def test_a_state_that_was_being_replaced_when_the_run_died_is_found(tmp_path):
    write_state(tmp_path / "x-state", snapshot(3)[0])
    os.replace(tmp_path / "x-state", tmp_path / ".x-state.old")
    assert newest_state(tmp_path, "x").position.step == 3


def test_writing_over_a_state_leaves_the_new_one_and_nothing_else(tmp_path):
    write_state(tmp_path / "x-state", snapshot(3)[0])
    write_state(tmp_path / "x-state", snapshot(4)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]
    assert open_state(tmp_path / "x-state").position.step == 4


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"position": {"nope": 1}, "options": {}}', '{"current_step": 5, "current_epoch": 1}']
)
def test_what_is_not_a_state_is_said_in_one_message(tmp_path, content):
    folder = tmp_path / "x-state"
    folder.mkdir()
    (folder / "train_state.json").write_text(content)
    with pytest.raises(UserError, match="not a state that can be continued"):
        open_state(folder)
    with pytest.raises(UserError, match="no such folder"):
        open_state(tmp_path / "absent-state")


def test_changed_options_are_named_with_both_values():
    assert changed_options({"a": 1, "b": [1, 2]}, {"a": 2, "b": (1, 2)}) == ["a: 1 -> 2"]


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "ema", "model"])
def test_a_whole_state_of_another_run_is_a_message(tmp_path, part):
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4)).sum().backward()
    optimizer.step()
    components = {
        "optimizer": OptimizerBundle(optimizer, "", False, None),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "ema": WeightEma(dict(network.named_parameters()), 0.9),
    }
    states = {name: component.state_dict() for name, component in components.items()}
    moments = {**states["optimizer"], "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}}
    wrong = {"optimizer": moments, "scheduler": [1], "ema": {"averages": 3}}
    weights = dict(network.state_dict()) if part != "model" else {"other": torch.zeros(2)}
    given = {name: wrong[name] if name == part else state for name, state in states.items()}
    write_state(tmp_path / "a-state", Snapshot(TrainProgress(), {"seed": 1}, weights, given, random_states()))
    with pytest.raises(UserError, match=part):
        restore(open_state(tmp_path / "a-state"), network, components)
