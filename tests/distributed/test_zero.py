"""An optimizer shared out over two processes steps as a whole one does, holds half of its state, and saves it whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from library.distributed.gradients import GradientReducer
from library.distributed.zero import partition_parameters
from library.training.optimizer_names import can_be_sharded
from library.training.optimizers import OptimizerBundle, build_optimizer, build_sharded_optimizer
from tests.warm_processes import run_ranks

SIZES = (4096, 128, 64, 4096, 4224)  # 8-bit states begin at 4096
NAMES = ("AdamW", "AdamW8bit", "SGDNesterov", "Lion")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def groups_of(made: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": made[:2], "lr": 0.1, "name": "a"}, {"params": made[2:], "lr": 0.05, "name": "b"}]


def step(bundle: OptimizerBundle, made: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    bundle.optimizer.step()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        whole, shared, resumed = parameters(), parameters(), parameters()
        plain = build_optimizer(name, groups_of(whole), 0.1)
        ours, later = (
            build_sharded_optimizer(name, groups_of(made), 0.1, None, GradientReducer(made, 2), rank)
            for made in (shared, resumed)
        )
        for number in range(2):
            step(plain, whole, number)
            step(ours, shared, number)
        saved = ours.state_dict()
        with torch.no_grad():
            for new, old in zip(resumed, shared):
                new.copy_(old)
        later.load_state_dict(copy.deepcopy(plain.state_dict()))
        for bundle, made in ((plain, whole), (ours, shared), (later, resumed)):
            step(bundle, made, 2)
        found[name] = {
            "same": all(torch.equal(a, b) for a, b in zip(whole, shared)),
            "resumed": all(torch.equal(a, b) for a, b in zip(whole, resumed)),
            "states": len(ours.optimizer.state),
            "saved": saved,
        }
        if rank == 0:
            again = parameters()
            plain = build_optimizer(name, groups_of(again), 0.1)
            for number in range(2):
                step(plain, again, number)
            found[name]["whole"] = plain.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("optimizer")
    run_ranks(_work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_every_process_has_the_weights_of_a_whole_optimizer(found: list[dict[str, Any]], name: str):
    assert all(process[name]["same"] for process in found)


@pytest.mark.parametrize("name", NAMES)
def test_each_parameters_state_is_on_one_process(found: list[dict[str, Any]], name: str):
    assert sorted(process[name]["states"] for process in found) == [2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_the_state_of_a_whole_optimizer(found: list[dict[str, Any]], name: str):
    assert found[1][name]["saved"] == {}
    assert equal(found[0][name]["saved"], found[0][name]["whole"])


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_optimizers_state_is_continued_exactly(found: list[dict[str, Any]], name: str):
    assert all(process[name]["resumed"] for process in found)


def test_shares_are_neighbours_of_about_equal_size():
    assert partition_parameters([4, 4, 4, 4], 2) == [0, 0, 1, 1]
    assert partition_parameters([1, 1, 1, 9], 2) == [0, 0, 0, 1]
    assert partition_parameters([100], 4) == [2]
    owners = partition_parameters([7] * 100, 4)
    assert owners == sorted(owners) and [owners.count(rank) for rank in range(4)] == [25] * 4


@pytest.mark.parametrize(
    ("name", "shared"),
    [("AdamW", True), ("RAdam", True), ("PagedAdamW8bit", True), ("Prodigy", False), ("AdamWScheduleFree", False)],
)
def test_optimizers_that_look_at_all_weights_stay_whole(name: str, shared: bool):
    assert can_be_sharded(name) is shared


def test_where_a_process_would_have_nothing_to_step_all_keep_the_whole_state():
    """It could not do as the others do with a step that is skipped."""
    made = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    given = ("AdamW", [{"params": made, "lr": 0.1}], 0.1, None)
    bundle = build_sharded_optimizer(*given, GradientReducer(made, world_size=3), rank=0)
    assert bundle.shards is None
    assert [len(group["params"]) for group in bundle.optimizer.param_groups] == [2]
