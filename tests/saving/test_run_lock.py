"""One run at a time under one name, and nothing of killed ones is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from library.common.files import temporary_name
from library.common.processes import FOREIGN_AGE, remove_stale_temporaries, this_process
from library.saving import run_lock
from library.saving.run_lock import Holder, RunLock


@pytest.fixture
def other():
    """A process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def holder_of(pid: int) -> Holder:
    return replace(Holder.this(), pid=pid, process_start=psutil.Process(pid).create_time())


def write_lock(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    path = folder / ".x.lock"
    path.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_second_run_is_refused_with_the_first_ones_name(tmp_path: Path, other) -> None:
    path = write_lock(tmp_path, holder_of(other.pid))
    with RunLock() as lock:
        (problem,) = lock.acquire(tmp_path, "x")
        assert f"process {other.pid} on {Holder.this().host}" in problem and str(path) in problem
        assert lock.acquire(tmp_path, "another name") == []
    assert [each.name for each in tmp_path.iterdir()] == [".x.lock"]


def test_a_dead_runs_lock_is_taken_over_and_removed_at_the_end(tmp_path: Path, other) -> None:
    path = write_lock(tmp_path, holder_of(other.pid))
    other.kill()
    other.wait()
    with RunLock() as lock:
        assert lock.acquire(tmp_path, "x") == []
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_dead_ones_number_holds_nothing(tmp_path: Path, other) -> None:
    write_lock(tmp_path, replace(holder_of(other.pid), process_start=1000.0))
    with RunLock() as lock:
        assert lock.acquire(tmp_path, "x") == []


def test_a_run_on_another_machine_counts_by_its_signs_of_life(tmp_path: Path, monkeypatch) -> None:
    elsewhere = replace(Holder.this(), machine="0" * 8, host="node7")
    write_lock(tmp_path, elsewhere, age=60)
    with RunLock() as lock:
        (problem,) = lock.acquire(tmp_path, "x")
        assert "on node7" in problem
    write_lock(tmp_path, elsewhere, age=run_lock.SILENCE + 10)
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    with RunLock() as lock:
        assert lock.acquire(tmp_path, "x") == []
        os.utime(tmp_path / ".x.lock", (0, 0))
        time.sleep(0.5)
        assert (tmp_path / ".x.lock").stat().st_mtime > 0  # it shows that it lives


def test_a_lock_that_was_cut_short_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").write_text('{"pid"')
    os.utime(tmp_path / ".x.lock", (0, 0))
    with RunLock() as lock:
        assert lock.acquire(tmp_path, "x") == []


def test_states_that_a_killed_run_was_writing_go_and_one_it_was_replacing_comes_back(tmp_path: Path) -> None:
    for name in (".x-state.old", ".x-000001-state.tmp", ".x-step00000004-state.old", "x-step00000004-state"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".other-state.tmp").mkdir()  # of another run, which may live
    with RunLock() as lock:
        assert lock.acquire(tmp_path, "x") == []
    assert {path.name for path in tmp_path.iterdir()} == {"x-state", "x-step00000004-state", ".other-state.tmp"}


def temporary_of(folder: Path, machine: str, pid: int, age: float = 0.0) -> Path:
    own = this_process()
    name = temporary_name(folder / "lora.safetensors").name
    path = folder / name.replace(f"{own.machine}-{own.pid}-", f"{machine}-{pid}-")
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_temporary_files_of_dead_processes_go_and_those_of_others_stay(tmp_path: Path, other) -> None:
    own = this_process()
    stays = {
        temporary_of(tmp_path, own.machine, own.pid),
        temporary_of(tmp_path, own.machine, other.pid),
        temporary_of(tmp_path, "0" * 8, 7, age=3600),
        tmp_path / ".somebody.else.1234abcd.tmp",
    }
    (tmp_path / ".somebody.else.1234abcd.tmp").touch()
    gone = {
        temporary_of(tmp_path, own.machine, 2**22 + 5),
        temporary_of(tmp_path, own.machine, other.pid, age=3600),  # made before the process that has the number now
        temporary_of(tmp_path, "0" * 8, 7, age=FOREIGN_AGE + 60),
    }
    assert set(remove_stale_temporaries([tmp_path, tmp_path / "absent"])) == gone
    assert set(tmp_path.iterdir()) == stays


def test_a_name_that_is_nearly_too_long_has_a_temporary_one_too(tmp_path: Path) -> None:
    name = temporary_name(tmp_path / ("猫" * 80 + ".safetensors"))
    name.touch()
    assert len(os.fsencode(name.name)) <= 255
