"""Makes small image folders for tests of the index."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from PIL import Image

from library.data.settings import CaptionSettings, DatasetSettings, SubsetSettings


def image(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None, **options: object) -> Path:
    """Write an image of noise, and its caption beside it where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(path.name).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def folder(path: Path, count: int, size: tuple[int, int] = (64, 64), captions: bool = True) -> Path:
    """A folder of `count` images called 000.png, 001.png, ... with captions "caption of 000"."""
    for number in range(count):
        image(path / f"{number:03d}.png", size, f"caption of {number:03d}" if captions else None)
    return path


def age(path: Path, seconds: float = 3600) -> None:
    """Make all files below `path` look as if they had been written long ago."""
    then = time.time() - seconds
    for file in [path, *path.rglob("*")]:
        os.utime(file, (then, then))


def subset(path: Path, **values: object) -> SubsetSettings:
    captions = CaptionSettings(**values.pop("captions", {}))
    return SubsetSettings(path.name, image_dir=path, caption_extension=".txt", captions=captions, **values)


def dataset(*subsets: SubsetSettings, name: str = "dataset 1", **values: object) -> DatasetSettings:
    values.setdefault("resolution", (64, 64))
    return DatasetSettings(name, tuple(subsets), **values)
