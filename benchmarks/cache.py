#!/usr/bin/env python3
"""Images and captions a second that caching makes, and its peak memory; prints a table and JSON.

    python benchmarks/cache.py --pretrained_model_name_or_path MODEL [--images 64] [--resolution 512]
    python benchmarks/cache.py --pretrained_model_name_or_path MODEL --against 'python other_cache.py --data {data}'

Another program's command is timed in the same run, on the same images; `{data}` is replaced by their folder. Caches in files
are removed between the two.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="an SD3 checkpoint (the demo's takes up to 192 pixels)")
    parser.add_argument("--images", type=int, default=64, help="how many images to make and encode (64)")
    parser.add_argument("--resolution", type=int, default=512, help="their side in pixels (512)")
    parser.add_argument("--vae_batch_size", type=int, default=4, help="images a VAE call (4)")
    parser.add_argument("--against", help="another program's command, with {data} for the folder of images")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder), chosen.images, chosen.resolution)
        common = ["--pretrained_model_name_or_path", chosen.pretrained_model_name_or_path, "--train_data_dir", folder]
        common += ["--resolution", str(chosen.resolution), "--caption_extension", ".txt", "--network_train_unet_only"]
        for what, tool, more in (
            ("latents", "cache_latents.py", ["--vae_batch_size", str(chosen.vae_batch_size)]),
            ("text", "cache_text_encoder_outputs.py", ["--text_encoder_batch_size", "8"]),
        ):
            command = [sys.executable, str(ROOT / "tools" / tool), *common, *more]
            rows.append(measure(f"{what}, ours", command, chosen.images))
        if chosen.against:
            for path in data.glob("*.safetensors"):
                path.unlink()
            rows.append(measure("against", shlex.split(chosen.against.replace("{data}", str(data))), chosen.images))
    print(f"{'':<16}{'seconds':>9}{'items/s':>9}{'peak MiB':>10}")
    for row in rows:
        print(f"{row['what']:<16}{row['seconds']:>9.1f}{row['items_per_second']:>9.2f}{row['peak_mib']:>10.0f}")
    print(json.dumps(rows))


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


def measure(what: str, command: list[str], items: int) -> dict:
    """Run a command; seconds from launch to end, start-up included, and its peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode(errors="replace"))
    return {"what": what, "seconds": seconds, "items_per_second": items / seconds, "peak_mib": peak / 2**20}


def resident_bytes(process: int) -> int:
    """Resident memory of a process; 0 where the system does not tell (no /proc)."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096


if __name__ == "__main__":
    main()
