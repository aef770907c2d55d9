"""`--debug_dataset`: what training will see, as pictures: for each bucket its images as cropped, with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.common.files import atomic_write, write_text
from library.data.batch import Batch
from library.data.batches import BatchPlan
from library.data.loader import BucketExamples, LoaderSettings, bucket_examples
from library.monitoring.contact_sheet import fitted
from library.saving.saver import translate_write_errors

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, GAP, LINE, LINES = 256, 8, 12, 5  # pixels; lines of text under a picture
COLUMNS, PICTURES = 4, 16  # of a sheet


def draw_dataset(
    training: BatchPlan, validation: BatchPlan | None, settings: LoaderSettings, folder: Path, name: str
) -> None:
    """Draw sheets of the images of each bucket in `folder` and print their paths."""
    for kind, plan in (("training", training), ("validation", validation)):
        if plan is not None:
            with translate_write_errors(folder):
                paths = write_dataset_sheets(bucket_examples(plan, settings, PICTURES), folder, f"{name}-{kind}")
            for path in paths:
                print(f"{kind}: {path}")


def write_dataset_sheets(examples: Iterable[BucketExamples], folder: Path, name: str) -> list[Path]:
    """Draw up to 16 samples of each bucket on a sheet `<name>-<dataset>-<W>x<H>.png` in `folder`. Returns what was written.

    A masked sample is darkened where the loss does not count. The text below a picture: its file and caption. The captions
    are also written to `<name>-captions.txt`, whole and in every script.
    """
    paths, captions = [], []
    for bucket in examples:
        title = f"{bucket.dataset + 1}-{bucket.bucket[0]}x{bucket.bucket[1]}"
        samples = list(islice(_samples(bucket.batches), PICTURES))
        path = folder / f"{name}-{title}.png"
        _write_sheet(
            path, [(picture, f"{file.name}\n{caption or '(empty caption)'}") for picture, file, caption in samples]
        )
        paths.append(path)
        captions += [f"{title}\t{file}\t{caption}\n" for _, file, caption in samples]
    if captions:
        write_text(folder / f"{name}-captions.txt", "".join(captions))
        paths.append(folder / f"{name}-captions.txt")
    return paths


def _samples(batches: Iterable[Batch]) -> Iterator[tuple[Image, Path, str]]:
    """Picture, file and caption of each sample."""
    from PIL import Image as images

    for batch in batches:
        assert batch.images is not None
        masks = [None] * len(batch.images) if batch.mask is None else batch.mask
        for pixels, mask, caption, path in zip(batch.images, masks, batch.captions, batch.paths):
            yield images.fromarray(_bytes(pixels, mask).numpy()), Path(path), caption


def _bytes(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """[3, H, W] in -1..1, mask [1, h, w] or None -> [H, W, 3] uint8."""
    light = (pixels + 1) * 127.5
    if mask is not None:
        light = light * (0.2 + 0.8 * torch.nn.functional.interpolate(mask[None], light.shape[-2:])[0])
    return light.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _write_sheet(path: Path, cells: list[tuple[Image, str]]) -> None:
    from PIL import Image as images, ImageDraw

    height = CELL + LINES * LINE + GAP
    rows = -(-len(cells) // COLUMNS)
    sheet = images.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(cells):
        left, top = GAP + number % COLUMNS * (CELL + GAP), GAP + number // COLUMNS * height
        sheet.paste(fitted(picture, CELL), (left, top))
        plain = text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        lines = [line for part in plain.splitlines() for line in textwrap.wrap(part, CELL // 6)]
        for row, line in enumerate(lines[:LINES]):
            draw.text((left, top + CELL + row * LINE), line, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
