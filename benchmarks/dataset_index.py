"""How long the index of a large folder takes, cold and warm, and how much memory.

    python benchmarks/dataset_index.py --images 100000

makes that many small PNG, JPEG and WebP images with captions in a temporary folder, then indexes them in processes of their own: cold
(no index cache, and on Linux the files' pages dropped from memory), in memory (no index cache), and warm (with the index
cache of the first run). It prints a table and one line of JSON. The target on two cores: cold under 20 s, warm under 3 s, 300 MB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(96, 64), (64, 96), (80, 80), (128, 64), (72, 100)]
FORMATS = [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")]
RUNS = ("cold", "in memory", "warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=100_000, help="how many images to make (default: 100000)")
    parser.add_argument("--workers", type=int, default=None, help="threads of the index (default: what training takes)")
    parser.add_argument("--folder", type=Path, default=None, help="keep the images in this folder and use them again")
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.workers, options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="dataset_index_") as temporary:
        folder = options.folder or Path(temporary)
        make_images(folder, options.images)
        results = {run: in_own_process(folder, options.workers, run) for run in RUNS}
        report(folder, options.images, results)


def make_images(folder: Path, count: int) -> None:
    """Fill `folder` with `count` images, numbered, each with a caption of its own. Those that exist are kept."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    files: list[tuple[bytes, str]] = []
    for number, size in enumerate(SIZES):
        pixels = random.Random(number).randbytes(size[0] * size[1] * 3)
        for kind, extension in FORMATS:
            buffer = io.BytesIO()
            Image.frombytes("RGB", size, pixels).save(buffer, kind)
            files.append((buffer.getvalue(), extension))
    started = time.perf_counter()
    long_ago = time.time() - 3600  # a cache does not keep entries of files that have just been written
    for number in range(count):
        content, extension = files[number % len(files)]
        image = folder / f"{number:06d}{extension}"
        if not image.exists():
            image.write_bytes(content)
            caption = image.with_suffix(".txt")
            caption.write_text(f"photo {number}, a thing on a table, daylight, {extension[1:]}\n", encoding="utf-8")
            os.utime(image, (long_ago, long_ago))
            os.utime(caption, (long_ago, long_ago))
    print(f"{count} images in {folder} made in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def in_own_process(folder: Path, workers: int | None, run: str) -> dict[str, float]:
    if run == "cold":
        (folder / "index_cache.json").unlink(missing_ok=True)
        drop_pages(folder)
    command = [sys.executable, __file__, "--measure", run, "--folder", str(folder)]
    if workers is not None:
        command += ["--workers", str(workers)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, workers: int | None, run: str) -> dict[str, float]:
    """Index `folder` in this process. The in-memory run neither reads nor writes an index cache."""
    sys.path.insert(0, str(ROOT))
    from library.data.index import DEFAULT_WORKERS, build_index
    from library.data.settings import DatasetSettings, SubsetSettings

    subset = SubsetSettings("all", image_dir=folder, caption_extension=".txt", cache_info=run != "in memory")
    dataset = DatasetSettings("benchmark", (subset,), resolution=(512, 512), enable_bucket=True, validation_split=0.01)
    started = time.perf_counter()
    index = build_index([dataset], workers=workers or DEFAULT_WORKERS)
    seconds = time.perf_counter() - started
    images = sum(len(part.records) for part in [*index.training, *index.validation])
    return {"images": images, "seconds": round(seconds, 2), "peak_mb": peak_memory()}


def peak_memory() -> float:
    """The most memory that this process has held, in MB; -1 where the system doesn't say."""
    try:
        import resource
    except ImportError:
        return -1.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the content of the files, so that it must come from the disk."""
    if not hasattr(os, "posix_fadvise"):
        print("The files can't be dropped from memory here: cold means without index cache alone.", file=sys.stderr)
        return
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def report(folder: Path, count: int, results: dict[str, dict[str, float]]) -> None:
    cache = folder / "index_cache.json"
    print(f"{'run':<10} {'seconds':>8} {'images/s':>9} {'peak MB':>8}")
    for run, result in results.items():
        print(f"{run:<10} {result['seconds']:>8.2f} {count / result['seconds']:>9.0f} {result['peak_mb']:>8.1f}")
    print(
        json.dumps(
            {
                "benchmark": "dataset_index",
                "images": count,
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "system": platform.platform(),
                "index_cache_mb": round(cache.stat().st_size / 1e6, 1),
                "runs": results,
            }
        )
    )


if __name__ == "__main__":
    main()
