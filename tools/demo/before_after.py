#!/usr/bin/env python3
"""One small picture for a page: the previews before training above those after it.

python tools/demo/before_after.py output before_after.png
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, Python looks into tools/ alone

from library.common.files import atomic_write
from library.common.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 8  # pixels between pictures
TEXT = 17  # height of a line of writing
TITLE = 60  # width of the rows' titles
PREVIEW = re.compile(r"(?P<name>.*_)?(?P<moment>e?\d{6})_(?P<prompt>\d+)_\d{14}(_\d+)?\.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the output_dir of a training with previews")
    parser.add_argument("target", type=Path, help="the picture to write (.png)")
    parser.add_argument("--side", type=int, default=192, help="pixels of a preview's side in the picture")
    chosen = parser.parse_args(arguments)
    first, last = first_and_last(chosen.output_dir / "sample")
    with atomic_write(chosen.target) as temporary:
        compose(first, last, chosen.side).save(temporary, format="PNG", optimize=True)
    print(chosen.target)


def first_and_last(folder: Path) -> tuple[list[Path], list[Path]]:
    """The previews of the first moment and of the last, in the order of the prompts."""
    moments: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := PREVIEW.fullmatch(path.name):
            moments.setdefault(match["moment"], {})[int(match["prompt"])] = path
    if len(moments) < 2:
        raise UserError(f"{folder} holds previews of {len(moments)} moments; two are needed, before and after.")
    first, last = (moments[moment] for moment in (min(moments), max(moments)))
    prompts = sorted(first.keys() & last.keys())
    return [first[prompt] for prompt in prompts], [last[prompt] for prompt in prompts]


def compose(first: list[Path], last: list[Path], side: int) -> Image:
    """Two rows of previews; above each column its prompt, at most two lines of it."""
    from PIL import Image, ImageDraw, ImageFont

    cell, head = side + GAP, 2 * TEXT + GAP
    page = Image.new("RGB", (TITLE + len(first) * cell, head + 2 * cell), "white")
    brush, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for row, title in enumerate(("before", "after")):
        brush.text((GAP, head + row * cell + side // 2), title, fill="black", font=font, anchor="lm")
    for column, pair in enumerate(zip(first, last)):
        left = TITLE + column * cell
        lines = textwrap.wrap(prompt_of(pair[0]), max(8, side // 8))[:2]
        brush.multiline_text((left, GAP // 2), "\n".join(lines), fill="black", font=font)
        for row, path in enumerate(pair):
            with Image.open(path) as image:
                page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, head + row * cell))
    return page


def prompt_of(path: Path) -> str:
    """The prompt that a preview's PNG file carries, without its options."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get("parameters", "")).split("\n", 1)[0]


if __name__ == "__main__":
    main()
