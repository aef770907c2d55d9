"""Saving beside training: whole files, in order, and errors that are not lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.common.errors import UserError
from library.saving import saver
from library.saving.saver import MAX_PENDING_JOBS, BackgroundSaver, remove, write_weights


def test_jobs_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with BackgroundSaver() as saver:
        for number in range(20):
            saver.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == list(range(20))


def test_flush_waits_until_everything_is_written() -> None:
    done: list[str] = []
    with BackgroundSaver() as saver:
        saver.submit(lambda: (time.sleep(0.1), done.append("slow"))[0])
        saver.flush()
        assert done == ["slow"]


def test_handing_over_does_not_wait_for_the_disk() -> None:
    hold = threading.Event()
    with BackgroundSaver() as saver:
        started = time.monotonic()
        for _ in range(MAX_PENDING_JOBS):
            saver.submit(lambda: hold.wait(10) and None)
        assert time.monotonic() - started < 5
        hold.set()


def test_an_error_of_the_thread_is_raised_at_the_next_call_and_later_jobs_are_left_out() -> None:
    done: list[str] = []

    def fails() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk is full"), BackgroundSaver() as saver:
        saver.submit(fails)
        saver.submit(lambda: done.append("a file that would replace a good one"))
        saver.flush()
    assert done == []


def test_an_error_of_the_last_job_is_raised_when_the_run_ends() -> None:
    def fails() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"), BackgroundSaver() as saver:
        saver.submit(fails)


def test_an_error_of_training_is_not_hidden_by_one_of_the_saver() -> None:
    def fails() -> None:
        raise OSError("disk")

    with pytest.raises(RuntimeError, match="training"), BackgroundSaver() as saver:
        saver.submit(fails)
        raise RuntimeError("training")


@pytest.mark.parametrize("ending", ["safetensors", "pt", "ckpt"])
def test_weights_come_back_from_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"lora.{ending}"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_weights(path, tensors, {"ss_x": "é"})
    found = load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    if ending == "safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"ss_x": "é"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lora.safetensors"
    write_weights(path, {"a": torch.zeros(3)}, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "save_safetensors", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_weights(path, {"a": torch.ones(3)}, {})
    assert torch.equal(load_file(path)["a"], torch.zeros(3))


def test_removing_takes_files_and_folders_and_forgives_what_is_gone(tmp_path: Path) -> None:
    file, folder = tmp_path / "old.safetensors", tmp_path / "old-state"
    file.touch()
    folder.mkdir()
    (folder / "model.safetensors").touch()
    remove([file, folder, tmp_path / "gone"])
    assert list(tmp_path.iterdir()) == []
