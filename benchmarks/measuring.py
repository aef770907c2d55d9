"""What the benchmarks share: images to work on, a command's time and peak memory, a table."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def make_images(folder: Path, count: int, side: int) -> Path:
    """Images of noise over a ramp, each with a caption of its own."""
    data, rng = folder / "1_thing", np.random.default_rng(0)
    data.mkdir()
    ramp = np.linspace(0, 200, side, dtype=np.uint8)[None, :, None]
    for number in range(count):
        pixels = ramp + rng.integers(0, 55, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number:05d}.png")
        (data / f"{number:05d}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return data


def measure(what: str, command: list[str], items: int, is_there: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Run a command; seconds from launch to end, start-up included, and its peak memory.

    is_there: asked all the while; the seconds until it first says yes are `first_step`.
    """
    started, first = time.perf_counter(), None
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        if first is None and is_there is not None and is_there():
            first = time.perf_counter() - started
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode(errors="replace"))
    row = {"what": what, "seconds": seconds, "items_per_second": items / seconds, "peak_mib": peak / 2**20}
    return row if is_there is None else {**row, "first_step": first or seconds}


def resident_bytes(process: int) -> int:
    """Resident memory of a process; 0 where the system does not tell (no /proc)."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096


def print_rows(rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name != "what"]
    print(f"{'':<20}" + "".join(f"{name:>18}" for name in names))
    for row in rows:
        print(f"{row['what']:<20}" + "".join(f"{row[name]:>18.2f}" for name in names))
