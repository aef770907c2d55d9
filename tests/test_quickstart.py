"""quickstart.py ends at Ctrl-C without a traceback, after the program that it runs has ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm_processes import ROOT

CHILD = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(0.3)
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "started").touch()
time.sleep(60)
"""
PROGRAM = """
import sys, quickstart
quickstart.run_train = lambda output: quickstart.call([sys.executable, "-c", sys.argv[1], output])
sys.exit(quickstart.main(["train", "--output_dir", sys.argv[2]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_lets_the_trainer_save_and_leaves_no_traceback(tmp_path: Path):
    words = [sys.executable, "-c", PROGRAM, CHILD, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert process.returncode == 130
    assert "Traceback" not in error and "Stopped" in error
