"""Processes act together: what one notices, all do, at the same step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from library.distributed.consensus import Agreement
from tests.warm_processes import run_ranks


def test_a_single_process_acts_at_once() -> None:
    agreement = Agreement(1)
    assert agreement.any_rank([True, False]) == [True, False]
    assert agreement.any_rank([False, True]) == [False, True]


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    agreement = Agreement(2)
    noticed = {0: [(2, 0)], 1: [(4, 1)]}[rank]  # (step, which question): each process notices something else
    found = [agreement.any_rank([(step, 0) in noticed, (step, 1) in noticed]) for step in range(7)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_one_process_notices_all_do_one_step_later(tmp_path: Path) -> None:
    run_ranks(_work, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    assert [step for step, answers in enumerate(found[0]) if answers[0]] == [3]
    assert [step for step, answers in enumerate(found[0]) if answers[1]] == [5]


def test_answers_travel_between_hosts_whatever_the_training_is_on(tmp_path: Path, monkeypatch) -> None:
    """NCCL's would be behind the step that a GPU is still computing, and reading them would wait for it."""
    sent: list[tuple[str, str]] = []
    reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: object, group: dist.ProcessGroup | None = None, **more: object) -> object:
        sent.append((tensor.device.type, "the training's own" if group is None else dist.get_backend(group)))
        return reduce(tensor, *args, group=group, **more)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "all_reduce", noted)
        agreement = Agreement(2)
        assert [agreement.any_rank([True]), agreement.any_rank([False]), agreement.any_rank([False])] == [
            [False],
            [True],
            [False],
        ]
    finally:
        dist.destroy_process_group()
    assert sent == [("cpu", "gloo")] * 3
