"""A picture of a LoRA's norms: a panel for each part of the model, a group of bars for each block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.common.files import atomic_write

WIDTH, PANEL, TOP, LEFT, RIGHT, BOTTOM, HEAD = 1200, 220, 70, 70, 20, 30, 30  # pixels
COLOURS = {"attn": "#2f6fb7", "attn2": "#6fb1e0", "mlp": "#d9822b", "adaLN": "#4a9a5b"}
INK, FAINT, PAPER = "#222222", "#d8d8d8", "#ffffff"


@dataclass(frozen=True)
class Bar:
    part: str  # of the model
    block: int
    kind: str  # a key of COLOURS
    norm: float


def draw_norms(path: Path, title: str, bars: list[Bar]) -> None:
    """Write a PNG. All panels share the scale, so that parts can be compared."""
    from PIL import Image, ImageDraw, ImageFont

    parts = list(dict.fromkeys(bar.part for bar in sorted(bars, key=lambda bar: bar.part)))
    image = Image.new("RGB", (WIDTH, TOP + PANEL * max(1, len(parts)) + 10), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    draw.text((LEFT, 12), f"{title}: norm of the change by block", INK, ImageFont.load_default(size=20))
    x = float(LEFT)
    for kind in [kind for kind in COLOURS if any(bar.kind == kind for bar in bars)]:
        draw.rectangle((x, 46, x + 14, 60), COLOURS[kind])
        draw.text((x + 20, 44), kind, INK, font)
        x += 100
    if not bars:
        draw.text((LEFT, TOP + 40), "No layer of this file has a norm of its own.", INK, font)
    highest = max((bar.norm for bar in bars), default=0.0) or 1.0
    for index, part in enumerate(parts):
        _draw_panel(draw, font, TOP + index * PANEL, part, [bar for bar in bars if bar.part == part], highest)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def _draw_panel(draw: Any, font: Any, top: int, part: str, bars: list[Bar], highest: float) -> None:
    floor, height = top + PANEL - BOTTOM, PANEL - BOTTOM - HEAD
    draw.text((LEFT, top + 4), part, INK, font)
    for share in (0.0, 0.5, 1.0):
        level = round(floor - share * height)
        draw.line((LEFT, level, WIDTH - RIGHT, level), FAINT)
        draw.text((LEFT - 8, level), f"{share * highest:.3g}", INK, font, anchor="rm")
    kinds = [kind for kind in COLOURS if any(bar.kind == kind for bar in bars)]
    blocks = max(bar.block for bar in bars) + 1
    step = (WIDTH - LEFT - RIGHT) / blocks
    width = step * 0.8 / len(kinds)
    for bar in bars:
        x = LEFT + step * (bar.block + 0.1) + width * kinds.index(bar.kind)
        y = floor - bar.norm / highest * height
        draw.rectangle((round(x), round(y), max(round(x), round(x + width) - 2), floor), COLOURS[bar.kind])
    every = -(-blocks // 40)
    for block in range(0, blocks, every):
        draw.text((LEFT + step * (block + 0.5), floor + 4), str(block), INK, font, anchor="ma")
