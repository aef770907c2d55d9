"""Who owns a temporary file or a lock, and whether it still lives."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from library.common.processes import start_time


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no zombies")
def test_a_killed_process_that_nobody_has_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert start_time(child.pid) is not None
    child.kill()
    end = time.monotonic() + 10
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.01)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert start_time(child.pid) is None
    child.wait()
    assert start_time(child.pid) is None
