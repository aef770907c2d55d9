"""A signal that reaches one process of two: both stop at the same step and save a whole state."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from library.saving.state import newest_state
from tests.end_to_end.conftest import ROOT, Workshop
from tests.end_to_end.test_resume import wait_for
from tests.warm_processes import start_python

LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_a_signal_to_one_process_stops_both_at_the_same_step(workshop: Workshop, tmp_path: Path) -> None:
    words = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=5000)
    command = [*LAUNCH, str(ROOT / "sd3_train_network.py"), *words]
    launcher = start_python(command, {"ACCELERATE_USE_CPU": "true"})
    metrics = tmp_path / "lora.metrics.jsonl"
    wait_for(lambda: launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda child: child.pid)  # in the order of their start
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGUSR1)  # to save and go on, which both do together too
    wait_for(lambda: launcher.poll() is not None or list(tmp_path.glob("lora-step*-state")))
    (first,) = tmp_path.glob("lora-step*-state")
    assert launcher.poll() is None and len(list(first.glob("random_states_*.pt"))) == 2
    ranks[1].send_signal(signal.SIGTERM)
    told = "".join(launcher.communicate(timeout=120))
    assert "--resume auto" in told, told[-3000:]
    state = newest_state(tmp_path, "lora")
    assert state is not None and state.position.step > 0
    assert len(list(state.folder.glob("random_states_*.pt"))) == 2
    assert load_file(tmp_path / f"lora-step{state.position.step:08d}.safetensors")


def test_two_processes_finish_what_a_killed_run_left_out_and_agree_that_nothing_is_left(
    workshop: Workshop, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    drawing = ("--sample_prompts", str(tmp_path / "p.txt"), "--sample_every_n_steps", "2")
    words = workshop.arguments(
        tmp_path / "out", "--network_train_unet_only", "--save_state", *drawing, max_train_steps=2
    )
    command = [*LAUNCH, str(ROOT / "sd3_train_network.py"), *words, "--save_every_n_steps", "2", "--resume", "auto"]

    def run() -> str:
        process = start_python(command, {"ACCELERATE_USE_CPU": "true"})
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-3000:]
        return out + error

    run()
    first = load_file(tmp_path / "out" / "lora.safetensors")
    (tmp_path / "out" / "lora.safetensors").unlink()
    run()
    again = load_file(tmp_path / "out" / "lora.safetensors")
    assert all((first[key] == again[key]).all() for key in first)
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1  # drawn before the kill, and not again
    assert "Already finished at step 2" in run()
    assert not list((tmp_path / "out").glob(".*"))
