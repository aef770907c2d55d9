"""Says what is in a demo picture, by comparing it with drawings: no learning, so it can be trusted with the learned model's work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tools.demo.figures import FIGURES
from tools.demo.scenes import COLOURS, PLACES, SIDE, SIZES, Pose, Scene, draw_figure, draw_place

if TYPE_CHECKING:
    from PIL.Image import Image

HALF = SIDE // 2  # pictures are compared at half their size
FRAME = 3  # pixels along the border, where hardly ever a figure is
REACH = 3  # a figure is looked for so many pixels around the middle


@dataclass(frozen=True)
class Verdict:
    """The nearest drawing, and its mean squared difference from the picture with colours in 0..1."""

    scene: Scene
    error: float


def judge(image: Image, place: str | None = None) -> Verdict:
    """The scene that a picture of 64 x 64 pixels shows; the place is guessed from its border when None."""
    pixels = half_pixels(image)
    place = place or nearest_place(pixels)
    ground = place_pixels(place)
    width = ((0, 0), (REACH, REACH), (REACH, REACH))
    padded, padded_ground = np.pad(pixels, width), np.pad(ground, width)
    scenes = [Scene(figure, colour, place, size) for figure in FIGURES for colour in COLOURS for size in SIZES]
    gains = [figure_gain(padded, padded_ground, scene) for scene in scenes]
    best = int(np.argmin(gains))
    return Verdict(scenes[best], float(((pixels - ground) ** 2).sum() + gains[best]) / pixels.size)


def nearest_place(pixels: np.ndarray) -> str:
    border = np.ones((HALF, HALF), dtype=bool)
    border[FRAME:-FRAME, FRAME:-FRAME] = False
    return min(PLACES, key=lambda place: float(((place_pixels(place) - pixels)[:, border] ** 2).mean()))


def figure_gain(pixels: np.ndarray, ground: np.ndarray, scene: Scene) -> float:
    """The change of the squared difference when the figure is put where it fits best on the bare place."""
    top, left, alpha, painted = sprite(scene)
    height, width = alpha.shape
    part = (slice(None), slice(top, top + height + 2 * REACH), slice(left, left + width + 2 * REACH))
    there = np.lib.stride_tricks.sliding_window_view(pixels[part], (height, width), (1, 2))  # [3, 7, 7, h, w]
    bare = np.lib.stride_tricks.sliding_window_view(ground[part], (height, width), (1, 2))
    drawn = bare * (1 - alpha) + painted[:, None, None]
    return float(((there - drawn) ** 2 - (there - bare) ** 2).sum(axis=(0, 3, 4)).min())


def half_pixels(image: Image) -> np.ndarray:
    """[3, 32, 32] float32 in 0..1."""
    return np.asarray(image.convert("RGB").reduce(2), dtype=np.float32).transpose(2, 0, 1) / 255


@cache
def place_pixels(place: str) -> np.ndarray:
    return half_pixels(draw_place(place))


@cache
def sprite(scene: Scene) -> tuple[int, int, np.ndarray, np.ndarray]:
    """The figure's top and left pixel, its opacity [h, w] and its colours times opacity [3, h, w]."""
    image = draw_figure(Scene(scene.figure, scene.colour, "", scene.size), Pose()).reduce(2)
    left, top, right, bottom = image.getchannel("A").getbbox()  # type: ignore[misc]
    cut = np.asarray(image, dtype=np.float32)[top:bottom, left:right].transpose(2, 0, 1) / 255
    return top, left, cut[3], cut[:3] * cut[3]
