"""How long the index of a large folder takes, cold and warm, and how much memory.

    python -m benchmarks.dataset_index --images 100000

makes that many small PNG, JPEG and WebP images with captions in a temporary folder, then indexes them in processes of their own: cold
(no index cache, and on Linux the files' pages dropped from memory), in memory (no index cache), and warm (with the index
cache of the first run). The target on two cores: cold under 20 s, warm under 3 s, 300 MB. With --against another program reads the
same folder in turn with the kind of run that --run names.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import Program, Row, add_common_arguments, compare, other_program, report
from benchmarks.process_monitor import own_peak_bytes

SIZES = [(96, 64), (64, 96), (80, 80), (128, 64), (72, 100)]
FORMATS = [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")]
RUNS = ("cold", "in memory", "warm")


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    if options.measure:
        print(json.dumps({"rows": [measure(options.folder, options.workers, options.measure)]}))
        return
    with tempfile.TemporaryDirectory(prefix="dataset_index_") as temporary:
        folder = options.folder or Path(temporary)
        make_images(folder, options.images)
        programs = {run: Program(run, command(folder, options.workers, run), items=options.images) for run in RUNS}
        if options.against:
            against = other_program(options.against, {"folder": folder}, items=options.images)
            rows = compare(programs[options.run], against, options.rounds, lambda: prepare(folder, options.run))
        else:
            rows = []
            for run, program in programs.items():
                prepare(folder, run)
                rows.append(program.run())
        size = folder / "index_cache.json"
        cache_mb = round(size.stat().st_size / 1e6, 1) if size.exists() else None
    report("dataset_index", rows, options.json, images=options.images, index_cache_mb=cache_mb)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--images", type=int, default=100_000, help="how many images to make (default: 100000)")
    made.add_argument("--workers", type=int, default=None, help="threads of the index (default: what training takes)")
    made.add_argument("--folder", type=Path, default=None, help="keep the images in this folder and use them again")
    made.add_argument("--run", choices=RUNS, default="cold", help="the kind of run for --against (cold)")
    made.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    add_common_arguments(made, "{folder} is replaced by the folder of images.")
    return made


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


def command(folder: Path, workers: int | None, run: str) -> list[str]:
    words = ["--measure", run, "--folder", str(folder), *(["--workers", str(workers)] if workers else [])]
    return [sys.executable, "-m", "benchmarks.dataset_index", *words]


def prepare(folder: Path, run: str) -> None:
    """What has to be gone before a run of that kind."""
    if run == "cold":
        (folder / "index_cache.json").unlink(missing_ok=True)
        drop_pages(folder)


def measure(folder: Path, workers: int | None, run: str) -> Row:
    """Index `folder` in this process. The in-memory run neither reads nor writes an index cache."""
    from library.data.index import DEFAULT_WORKERS, build_index
    from library.data.settings import DatasetSettings, SubsetSettings

    subset = SubsetSettings("all", image_dir=folder, caption_extension=".txt", cache_info=run != "in memory")
    dataset = DatasetSettings("benchmark", (subset,), resolution=(512, 512), enable_bucket=True, validation_split=0.01)
    started = time.perf_counter()
    index = build_index([dataset], workers=workers or DEFAULT_WORKERS)
    seconds = time.perf_counter() - started
    images = sum(len(part.records) for part in [*index.training, *index.validation])
    return {"what": run, "images": images, "index_seconds": seconds, "index_peak_mib": own_peak_bytes() / 2**20}


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


if __name__ == "__main__":
    main()
