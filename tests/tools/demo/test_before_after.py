"""tools/demo/before_after.py: the first and last previews of each prompt, in order, in one picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from library.common.errors import UserError
from tools.demo.before_after import GAP, TEXT, TITLE, first_and_last, main

COLOURS = {"000000": (255, 0, 0), "000350": (0, 255, 0), "000700": (0, 0, 255)}


def previews(folder: Path, moments: dict[str, tuple[int, int, int]], prompts: int = 2) -> Path:
    (folder / "sample").mkdir()
    for moment, colour in moments.items():
        for prompt in range(prompts):
            info = PngImagePlugin.PngInfo()
            info.add_itxt("parameters", f"a red zorp on the beach, {prompt}\nNegative prompt: ")
            name = f"zorp_{moment}_{prompt:02d}_20260102030405_{prompt}.png"
            Image.new("RGB", (64, 64), colour).save(folder / "sample" / name, pnginfo=info)
    (folder / "sample" / "notes.png").write_bytes(b"not a preview")
    return folder


def test_before_is_above_after_and_the_middle_is_left_out(tmp_path: Path) -> None:
    main([str(previews(tmp_path, COLOURS)), str(tmp_path / "page.png"), "--side", "64"])
    page = Image.open(tmp_path / "page.png").convert("RGB")
    head = 2 * TEXT + GAP
    for column in range(2):
        middle = TITLE + column * (64 + GAP) + 32
        assert page.getpixel((middle, head + 32)) == (255, 0, 0)
        assert page.getpixel((middle, head + 64 + GAP + 32)) == (0, 0, 255)


def test_prompts_keep_their_order(tmp_path: Path) -> None:
    first, last = first_and_last(previews(tmp_path, COLOURS, prompts=12) / "sample")
    assert [path.name.split("_")[2] for path in first] == [f"{i:02d}" for i in range(12)]
    assert all("_000700_" in path.name for path in last)


def test_previews_of_one_moment_are_no_before_and_after(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 moments"):
        first_and_last(previews(tmp_path, {"000000": (0, 0, 0)}) / "sample")
