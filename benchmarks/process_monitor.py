"""A command's time and memory, its children and the GPUs included; this process's own peak."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1  # a poll costs about 3 ms
GPU_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class ProcessUsage:
    """Time and memory of a command, its children included; memory in MiB, None where the system does not report it."""

    seconds: float  # from launch to end
    cpu_seconds: float  # of all cores, waiting for other programs not counted
    peak_mib: float
    gpu_mib: float | None  # by how much the GPUs' used memory grew at most, whoever used it
    first: float | None  # seconds until `is_ready` returned True
    output: str

    def numbers(self) -> dict[str, float]:
        numbers = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_mib": self.peak_mib}
        return numbers if self.gpu_mib is None else {**numbers, "gpu_mib": self.gpu_mib}


def run_monitored(command: Sequence[str], is_ready: Callable[[], bool] | None = None) -> ProcessUsage:
    """Run a command in the project's folder. SystemExit with its output where it fails.

    is_ready: polled during the run; the seconds until it first returns True are `first`.
    """
    import psutil

    peak, used, first, gpu = 0, 0.0, None, GpuGrowth()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(list(command), cwd=ROOT, stdout=output, stderr=errors)
        monitored = psutil.Process(process.pid)
        while process.poll() is None:
            peak, used = max(peak, tree_bytes(monitored)), max(used, tree_cpu_seconds(monitored))
            gpu.poll()
            if first is None and is_ready is not None and is_ready():
                first = time.perf_counter() - started
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        output.seek(0), errors.seek(0)
        text, wrong = (file.read().decode(errors="replace") for file in (output, errors))
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{text[-2000:]}{wrong[-4000:]}")
    return ProcessUsage(seconds, used, peak / 2**20, gpu.growth_mib, first, text)


def tree_bytes(process: Any) -> int:
    """Resident bytes of a psutil process and its children; of one alone its own high-water mark, which misses no peak."""
    import psutil

    try:
        children = process.children(recursive=True)
        now = sum(each.memory_info().rss for each in [process, *children])
        return now if children else max(now, high_water_bytes(process.pid))
    except psutil.Error:
        return 0  # it has just ended


def tree_cpu_seconds(process: Any) -> float:
    """CPU time of a psutil process and its children, those that have ended included."""
    import psutil

    try:
        living = sum(sum(each.cpu_times()[:2]) for each in process.children(recursive=True))
        return living + sum(process.cpu_times()[:4])  # its own, and that of children that have ended
    except psutil.Error:
        return 0.0


def high_water_bytes(process: int | str = "self") -> int:
    """The most resident memory that a process has had, or since `reset_high_water`; 0 where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def reset_high_water() -> None:
    """Reset this process's high-water mark (Linux; elsewhere it counts from the start)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def own_peak_bytes() -> int:
    """This process's high-water mark, on any system."""
    if high_water_bytes():
        return high_water_bytes()
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


class GpuGrowth:
    """By how much the memory in use on all GPUs has grown since the start, polled from nvidia-smi."""

    def __init__(self, query: Callable[[], int | None] | None = None):
        """query: MiB in use now, None where there is no GPU."""
        self.query = query or used_gpu_mib
        self.before = self.query()
        self.growth_mib: float | None = None if self.before is None else 0.0
        self.next_poll = 0.0

    def poll(self) -> None:
        if self.before is None or time.monotonic() < self.next_poll:
            return
        used = self.query()
        self.growth_mib = max(self.growth_mib or 0.0, float((used or self.before) - self.before))
        self.next_poll = time.monotonic() + GPU_POLL_SECONDS


def used_gpu_mib() -> int | None:
    """MiB in use on all NVIDIA GPUs; None where nvidia-smi is absent or fails."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(int(line) for line in output.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
