"""Processes act together: what one notices, all do, at the same step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from library.training.agreement import Agreement

CPU = torch.device("cpu")


def test_a_single_process_acts_at_once() -> None:
    agreement = Agreement(1, CPU)
    assert agreement.ask([True, False]) == [True, False]
    assert agreement.ask([False, True]) == [False, True]


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    agreement = Agreement(2, CPU)
    noticed = {0: [(2, 0)], 1: [(4, 1)]}[rank]  # (step, which question): each process notices something else
    found = [agreement.ask([(step, 0) in noticed, (step, 1) in noticed]) for step in range(7)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_one_process_notices_all_do_one_step_later(tmp_path: Path) -> None:
    mp.spawn(_work, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1]
    assert [step for step, answers in enumerate(found[0]) if answers[0]] == [3]
    assert [step for step, answers in enumerate(found[0]) if answers[1]] == [5]
