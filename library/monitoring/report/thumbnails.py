"""Small pictures in data URLs, for the report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from library.monitoring.contact_sheet import PreviewRecord, columns_of, fitted
from library.monitoring.report.html_page import Picture, Sheet

PREVIEW_SIDE, THUMBNAIL_SIDE = 384, 112  # pixels
MOST_PROMPTS = 12


class ThumbnailCache:
    """Makes each thumbnail once, since the report is written many times."""

    def __init__(self) -> None:
        self._made: dict[tuple[Path, int], tuple[str, bool] | None] = {}

    def picture(self, path: Path, text: str, side: int) -> Picture | None:
        """The picture of a file with its longer side at most `side`; None where it cannot be read."""
        key = (path, side)
        if key not in self._made:
            self._made[key] = _small(path, side)
        made = self._made[key]
        return None if made is None else Picture(made[0], text, made[1])

    def sheet(self, records: Sequence[PreviewRecord]) -> Sheet:
        """The previews, prompts down and steps across."""
        columns = columns_of(records)
        prompts = dict(sorted({record.index: record.prompt for column in columns for record in column}.items()))
        rows = []
        for index, prompt in list(prompts.items())[:MOST_PROMPTS]:
            row = [next((record for record in column if record.index == index), None) for column in columns]
            rows.append((prompt, [self._preview(record) for record in row]))
        return Sheet([column[0].title for column in columns], rows)

    def _preview(self, record: PreviewRecord | None) -> Picture | None:
        if record is None:
            return None
        return self.picture(record.path, f"{record.title}: {record.prompt}", PREVIEW_SIDE)


def _small(path: Path, side: int) -> tuple[str, bool] | None:
    """A JPEG in a data URL, and whether the picture was smaller than `side`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            shown = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    tiny = max(shown.size) < side
    if not tiny:
        shown = fitted(shown, side)
    out = BytesIO()
    if tiny:
        shown.save(out, format="PNG")
    else:
        shown.save(out, format="JPEG", quality=82)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", tiny
