"""Names of files as sd-scripts has them, and which old ones go."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.saving.names import OutputNames, SaveSchedule, epochs_between_saves


def test_names_with_an_output_name(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "cat")
    assert names.epoch(3).name == "cat-000003.safetensors"
    assert names.step(250).name == "cat-step00000250.safetensors"
    assert names.final().name == "cat.safetensors"
    assert names.state_epoch(3).name == "cat-000003-state"
    assert names.state_step(250).name == "cat-step00000250-state"
    assert names.state_final().name == "cat-state"


def test_names_without_one_and_with_another_ending(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, None, "ckpt")
    assert [path.name for path in (names.epoch(1), names.step(1), names.final())] == [
        "epoch-000001.ckpt",
        "at-step00000001.ckpt",
        "last.ckpt",
    ]
    assert [path.name for path in (names.state_epoch(1), names.state_step(1), names.state_final())] == [
        "epoch-000001-state",
        "at-step00000001-state",
        "last-state",
    ]


def touch(*paths: Path) -> None:
    for path in paths:
        path.touch()


def test_steps_are_pruned_as_in_the_specifications_example(tmp_path: Path) -> None:
    """N = 10, last_n = 30: at 50, 10 goes and 20 to 50 stay."""
    names = OutputNames(tmp_path, "cat")
    touch(*(names.step(step) for step in (10, 20, 30, 40, 50)))
    assert names.old_steps(50, 30) == [names.step(10)]


def test_gaps_of_earlier_runs_are_pruned_too(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "cat")
    touch(*(names.step(step) for step in (3, 5, 20, 50)))
    assert names.old_steps(50, 30) == [names.step(3), names.step(5)]


def test_epochs_are_pruned_by_saves(tmp_path: Path) -> None:
    """Every second epoch is saved and three files are to stay: sd-scripts deletes epoch - 2 * 3."""
    names = OutputNames(tmp_path, "cat")
    touch(*(names.epoch(epoch) for epoch in (2, 4, 6, 8, 10)))
    assert names.old_epochs(10, 2 * 3) == [names.epoch(2), names.epoch(4)]


def test_files_of_others_are_never_old(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "cat")
    others = ["cats-000001.safetensors", "cat-000001.ckpt", "cat-000001-state.txt", "my cat-000001.safetensors"]
    others += ["cat-step00000001.txt", "cat-0000010.safetensors", "cat.safetensors", "at-step00000001.safetensors"]
    touch(*(tmp_path / other for other in others))
    assert names.old_epochs(100, 1) == [] and names.old_steps(100, 1) == []


def test_the_averages_beside_a_file_go_with_it(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "cat")
    touch(names.step(1), tmp_path / "cat-step00000001-ema.safetensors")
    assert [path.name for path in names.old_steps(5, 1)] == [
        "cat-step00000001-ema.safetensors",
        "cat-step00000001.safetensors",
    ]


def test_states_are_pruned_apart_from_files(tmp_path: Path) -> None:
    names = OutputNames(tmp_path, "c[a]t")  # a name with signs of patterns
    touch(names.epoch(1), names.epoch(2))
    names.state_epoch(1).mkdir()
    assert names.old_epochs(2, 1, states=True) == [names.state_epoch(1)]
    assert names.old_epochs(2, 1) == [names.epoch(1)]
    assert OutputNames(tmp_path / "not yet", "cat").old_epochs(2, 1) == []


@pytest.mark.parametrize(("every", "due"), [(None, []), (2, [2, 4]), (1, [1, 2, 3, 4, 5]), (7, [])])
def test_epochs_that_are_due_leave_out_the_last(every: int | None, due: list[int]) -> None:
    assert [epoch for epoch in range(1, 7) if SaveSchedule(every).epoch_is_due(epoch, 6)] == due


def test_steps_that_are_due() -> None:
    assert [step for step in range(1, 10) if SaveSchedule(None, 3).step_is_due(step)] == [3, 6, 9]
    assert not SaveSchedule().step_is_due(1)


@pytest.mark.parametrize(
    ("every", "ratio", "epochs", "result"), [(3, None, 10, 3), (None, 4, 10, 2), (None, 20, 10, 1)]
)
def test_a_ratio_becomes_epochs_between_saves(every: int | None, ratio: int | None, epochs: int, result: int) -> None:
    assert epochs_between_saves(every, ratio, epochs) == result
