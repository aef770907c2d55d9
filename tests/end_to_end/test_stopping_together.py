"""A signal that reaches one process of two: both stop at the same step and save a whole state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from library.saving.state import newest_state
from tests.end_to_end.conftest import ROOT, Workshop
from tests.end_to_end.test_resume import wait_for

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_a_signal_to_one_process_stops_both_at_the_same_step(workshop: Workshop, tmp_path: Path) -> None:
    words = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=5000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [*LAUNCH, str(ROOT / "sd3_train_network.py"), *words]
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "lora.metrics.jsonl"
    wait_for(lambda: launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    workers = [child for child in psutil.Process(launcher.pid).children(recursive=True) if _rank(child) == "1"]
    workers[0].send_signal(signal.SIGTERM)
    _, told = launcher.communicate(timeout=120)
    assert "--resume auto" in told, told[-3000:]
    state = newest_state(tmp_path, "lora")
    assert state is not None and state.position.step > 0
    assert len(list(state.folder.glob("random_states_*.pt"))) == 2
    assert load_file(tmp_path / f"lora-step{state.position.step:08d}.safetensors")
