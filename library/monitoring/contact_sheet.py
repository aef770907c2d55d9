"""All previews of a run in one picture: prompts down, steps across."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from library.common.files import atomic_write
from library.monitoring.metrics_file import Record

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
CELL = 256  # pixels of a preview's longer side
MOST_COLUMNS = 16
TITLE_HEIGHT, TEXT_HEIGHT, GAP = 24, 22, 6


@dataclass(frozen=True)
class PreviewRecord:
    """A preview on the disk. epoch: whole epochs done, where previews are made by epochs, else None."""

    step: int
    epoch: int | None
    index: int  # of the prompt
    prompt: str
    path: Path

    @property
    def title(self) -> str:
        return f"step {self.step}" if self.epoch is None else f"epoch {self.epoch}"

    def image(self) -> Image:
        """Its pixels, RGB, with the file closed."""
        from PIL import Image

        with Image.open(self.path) as image:
            return image.convert("RGB")

    def as_record(self) -> dict[str, object]:
        """As a line of the metrics file."""
        when = {} if self.epoch is None else {"preview_epoch": self.epoch}
        return {"step": self.step, **when, "index": self.index, "prompt": self.prompt, "preview": str(self.path)}

    @classmethod
    def from_record(cls, record: Record) -> PreviewRecord | None:
        """From a line of the metrics file; None for one that is no preview's or whose picture is gone."""
        path = Path(str(record.get("preview", "")))
        if "preview" not in record or not path.exists():
            return None
        epoch = record.get("preview_epoch")
        return cls(
            step=cast(int, record["step"]),
            epoch=None if epoch is None else cast(int, epoch),
            index=cast(int, record["index"]),
            prompt=cast(str, record["prompt"]),
            path=path,
        )


def columns_of(records: Sequence[PreviewRecord], most: int = MOST_COLUMNS) -> list[list[PreviewRecord]]:
    """The previews of each step in the order of their prompts; of many steps the first, the last and some between."""
    by_step: dict[tuple[int, str], list[PreviewRecord]] = {}
    for record in records:
        by_step.setdefault((record.step, record.title), []).append(record)
    columns = [sorted(column, key=lambda record: record.index) for _, column in sorted(by_step.items())]
    if len(columns) <= most:
        return columns
    chosen = {round(number * (len(columns) - 1) / (most - 1)) for number in range(most)}
    return [columns[number] for number in sorted(chosen)]


def write_sheet(path: Path, records: Sequence[PreviewRecord]) -> None:
    """Draw the sheet of all `records` whose pictures can still be read.

    A sheet that cannot be written is a warning: all that it shows is in the previews.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns_of([record for record in records if record.path.exists()])
    if not columns:
        return
    prompts = {record.index: record.prompt for column in columns for record in column}
    rows = {index: row for row, index in enumerate(sorted(prompts))}
    width = len(columns) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + len(rows) * (CELL + TEXT_HEIGHT + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, column in enumerate(columns):
        left = GAP + number * (CELL + GAP)
        draw.text((left, 4), column[0].title, fill="black", font=font)
        for record in column:
            try:
                image = fitted(record.image(), CELL)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's three for a file that was cut or changed
                logger.warning("%s: this preview cannot be read and is left out of the sheet (%s)", record.path, error)
                continue
            top = TITLE_HEIGHT + rows[record.index] * (CELL + TEXT_HEIGHT + GAP) + TEXT_HEIGHT
            sheet.paste(image, (left + (CELL - image.width) // 2, top))
    for index, row in rows.items():
        top = TITLE_HEIGHT + row * (CELL + TEXT_HEIGHT + GAP)
        draw.text((GAP, top + 2), _drawable(prompts[index], width // 8), fill="black", font=font)
    try:
        with atomic_write(path) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        logger.warning("%s: the sheet of previews cannot be written (%s); training goes on", path, error)


def fitted(image: Image, side: int) -> Image:
    """The picture with its longer side at `side` pixels; tiny ones are enlarged with hard edges."""
    from PIL import Image as images

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, images.Resampling.NEAREST if scale > 2 else images.Resampling.LANCZOS)


def _drawable(text: str, characters: int) -> str:
    """One line of what Pillow's own font has."""
    plain = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= characters else plain[: max(1, characters - 3)] + "..."
