"""The demo's pictures to learn from, their captions, the dataset file and the prompts of the previews."""

from __future__ import annotations

import random
from pathlib import Path

from library.common.files import atomic_write, write_text
from tools.demo.captions import caption_of, plain_caption
from tools.demo.figures import KNOWN_FIGURES, NEW_FIGURE
from tools.demo.scenes import COLOURS, PLACES, Scene, draw, random_pose

TRAIN_PICTURES = 36
REG_PICTURES = 72  # as many as the others are shown in an epoch
# Pairs: the new figure, and a known one in the same place. None of the zorps is among the pictures to learn from.
PREVIEW_SCENES = (
    (Scene("zorp", "red", "beach"), Scene("star", "red", "beach")),
    (Scene("zorp", "blue", "snow"), Scene("heart", "blue", "snow")),
    (Scene("zorp", "green", "night"), Scene("flower", "green", "night")),
    (Scene("zorp", "purple", "yellow"), Scene("ring", "purple", "yellow")),
)
PREVIEW_OPTIONS = "--w 64 --h 64 --s 20 --l 4 --d {seed}"


def train_scenes() -> list[Scene]:
    """Zorps in every colour and place, none as a preview asks for it, none so small that its eye is lost."""
    asked_for = {(scene.colour, scene.place) for scene, _ in PREVIEW_SCENES}
    return spread_scenes((NEW_FIGURE,), ("", "", "big"), TRAIN_PICTURES, seed=1, without=asked_for)


def reg_scenes() -> list[Scene]:
    """Known figures, so that training does not turn them into zorps."""
    return spread_scenes(KNOWN_FIGURES, ("", "", "small", "big"), REG_PICTURES, seed=2, without=set())


def spread_scenes(
    figures: tuple[str, ...], sizes: tuple[str, ...], count: int, seed: int, without: set[tuple[str, str]]
) -> list[Scene]:
    """`count` scenes in which figures, colours, places and sizes each appear about equally often."""
    rng = random.Random(seed)
    decks = [shuffled_deck(rng, choices, 3 * count) for choices in (figures, tuple(COLOURS), PLACES, sizes)]
    scenes = [Scene(*cards) for cards in zip(*decks)]
    return [scene for scene in scenes if (scene.colour, scene.place) not in without][:count]


def shuffled_deck(rng: random.Random, cards: tuple[str, ...], count: int) -> list[str]:
    """`count` cards from one shuffled deck after another."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(cards, len(cards))
    return dealt[:count]


def write_pictures(folder: Path, scenes: list[Scene], seed: int, freedom: float, force: bool) -> int:
    """PNG files and captions of the same names; returns how many files were written. Files that are there stay."""
    rng = random.Random(seed)
    written = 0
    for index, scene in enumerate(scenes):
        image = draw(scene, random_pose(rng, freedom))
        caption = caption_of(scene, rng)
        path = folder / f"{index:02d}_{scene.colour}_{scene.figure}_{scene.place}.png"
        if force or not path.exists():
            with atomic_write(path) as temporary:
                image.save(temporary, format="PNG")
            written += 1
        written += write_if_absent(path.with_suffix(".txt"), caption + "\n", force)
    return written


def write_if_absent(path: Path, text: str, force: bool) -> int:
    if path.exists() and not force:
        return 0
    write_text(path, text)
    return 1


def dataset_toml(demo: Path) -> str:
    """The dataset file; its paths are absolute, so that the command can be run from anywhere."""
    train, reg = (demo.resolve() / name for name in ("train", "reg"))
    return f"""# {TRAIN_PICTURES} pictures of a figure that the demo model has never seen, and {REG_PICTURES} of figures that it knows.

[general]
resolution = 64
batch_size = 8
caption_extension = ".txt"

[[datasets]]

  [[datasets.subsets]]
  image_dir = "{train.as_posix()}"
  num_repeats = 2

  [[datasets.subsets]]  # regularisation: what is to stay as it is
  image_dir = "{reg.as_posix()}"
  is_reg = true
"""


def prompts_txt() -> str:
    """The previews' prompts: with the trigger word and without."""
    lines = ["# One preview a line. w, h: pixels; s: steps; l: guidance; d: seed."]
    for seed, pair in enumerate(PREVIEW_SCENES, start=1):
        lines += [f"{plain_caption(scene)} {PREVIEW_OPTIONS.format(seed=seed)}" for scene in pair]
    return "\n".join(lines) + "\n"
