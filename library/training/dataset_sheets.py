"""`--debug_dataset`: what training will see, as pictures: the cropped images of an epoch's batches with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.loader import Batch
from library.files import atomic_write
from library.training.contact_sheet import fitted

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, GAP, LINE, LINES = 256, 8, 12, 5  # pixels; lines of text under a picture
COLUMNS, PICTURES = 4, 16  # of a sheet
MOST = 64  # pictures in all


def write_dataset_sheets(batches: Iterable[Batch], folder: Path, name: str) -> list[Path]:
    """Draw the first samples of `batches`, which hold images, on sheets `<name>-00.png` … in `folder`. Returns their paths.

    A masked sample is darkened where the loss does not count. The text below a picture: its file, size and caption.
    """
    cells = list(islice(_cells(batches), MOST))
    paths = []
    for number in range(0, len(cells), PICTURES):
        path = folder / f"{name}-{number // PICTURES:02d}.png"
        _write_sheet(path, cells[number : number + PICTURES])
        paths.append(path)
    return paths


def _cells(batches: Iterable[Batch]) -> Iterable[tuple[Image, str]]:
    from PIL import Image as images

    for batch in batches:
        assert batch.images is not None
        masks = [None] * len(batch.images) if batch.mask is None else batch.mask
        for pixels, mask, caption, path in zip(batch.images, masks, batch.captions, batch.paths):
            picture = images.fromarray(_bytes(pixels, mask).numpy())
            yield picture, f"{Path(path).name} {batch.size[0]}x{batch.size[1]}\n{caption or '(empty caption)'}"


def _bytes(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """[3, H, W] in -1..1, mask [1, h, w] or None -> [H, W, 3] uint8."""
    light = (pixels + 1) * 127.5
    if mask is not None:
        light = light * (0.2 + 0.8 * torch.nn.functional.interpolate(mask[None], light.shape[-2:])[0])
    return light.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _write_sheet(path: Path, cells: list[tuple[Image, str]]) -> None:
    from PIL import Image as images
    from PIL import ImageDraw

    height = CELL + LINES * LINE + GAP
    rows = -(-len(cells) // COLUMNS)
    sheet = images.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(cells):
        left, top = GAP + number % COLUMNS * (CELL + GAP), GAP + number // COLUMNS * height
        sheet.paste(fitted(picture, CELL), (left, top))
        plain = text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        lines = [line for part in plain.splitlines() for line in textwrap.wrap(part, CELL // 6)]
        for place, line in enumerate(lines[:LINES]):
            draw.text((left, top + CELL + place * LINE), line, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
