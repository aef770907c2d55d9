"""The pictures of the demo: a coloured figure in a simple place, 64 x 64 pixels, and what it is called in captions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tools.demo.figures import FIGURES, KNOWN_FIGURES, Contour, Layer

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE = 64  # pixels of a picture
FINE = 4  # pictures are drawn so many times larger, and reduced: smooth edges
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (226, 38, 44),
    "orange": (252, 134, 20),
    "yellow": (253, 214, 38),
    "green": (40, 166, 70),
    "blue": (36, 92, 222),
    "purple": (138, 56, 194),
    "pink": (248, 106, 176),
    "white": (252, 252, 252),
    "black": (38, 38, 44),
}
PAPERS: dict[str, Colour] = {  # plain backgrounds are pale, so that a blue star shows on blue
    "white": (244, 243, 240),
    "yellow": (255, 238, 160),
    "pink": (255, 206, 224),
    "blue": (180, 214, 250),
    "green": (192, 232, 186),
    "gray": (176, 178, 184),
}
SIZES = {"small": 12.0, "": 17.0, "big": 22.5}  # half the side of a figure, in pixels


@dataclass(frozen=True)
class Scene:
    figure: str  # a key of FIGURES
    colour: str  # of COLOURS
    place: str  # of PLACES
    size: str = ""  # of SIZES


@dataclass(frozen=True)
class Pose:
    """Where the figure is: its centre in pixels from the picture's, its size as a factor, its turn in degrees."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    turn: float = 0.0


def random_scene(rng: random.Random, figures: tuple[str, ...] = KNOWN_FIGURES) -> Scene:
    size = rng.choice(("", "", "small", "big"))
    return Scene(rng.choice(figures), rng.choice(tuple(COLOURS)), rng.choice(PLACES), size)


def random_pose(rng: random.Random, freedom: float = 1.0) -> Pose:
    """Near the middle and nearly upright; freedom 0 is exactly there."""
    return Pose(
        freedom * rng.uniform(-3.5, 3.5),
        freedom * rng.uniform(-3, 4),
        1 + freedom * rng.uniform(-0.05, 0.05),
        freedom * rng.uniform(-6, 6),
    )


def draw(scene: Scene, pose: Pose) -> Image:
    """The picture of a scene: RGB, 64 x 64."""
    from PIL import Image

    figure = draw_figure(scene, pose)
    return Image.alpha_composite(draw_place(scene.place).convert("RGBA"), figure).convert("RGB")


def draw_figure(scene: Scene, pose: Pose) -> Image:
    """The figure alone on a transparent ground: RGBA, 64 x 64."""
    from PIL import Image

    colour = COLOURS[scene.colour]
    # What is transparent has the outline's colour, so that reducing mixes nothing else into the edge.
    image = Image.new("RGBA", (SIDE * FINE, SIDE * FINE), (*line_colour(colour), 0))
    radius = SIZES[scene.size] * pose.scale
    centre = (SIDE / 2 + pose.x, SIDE / 2 + 1 + pose.y)
    for layer in FIGURES[scene.figure]():
        draw_layer(image, placed(layer, centre, radius, pose.turn), colour)
    return image.reduce(FINE)


def placed(layer: Layer, centre: tuple[float, float], radius: float, turn: float) -> Layer:
    """The layer in the coordinates of the large canvas."""
    cos, sin = math.cos(math.radians(turn)) * radius, math.sin(math.radians(turn)) * radius

    def place(contour: Contour) -> Contour:
        return [((centre[0] + x * cos - y * sin) * FINE, (centre[1] + x * sin + y * cos) * FINE) for x, y in contour]

    return Layer([place(contour) for contour in layer.contours], layer.paint, layer.outlined)


def draw_layer(image: Image, layer: Layer, colour: Colour) -> None:
    from PIL import Image, ImageDraw

    fill = {"body": colour, "white": (255, 255, 255), "black": (20, 20, 24)}[layer.paint]
    mask = Image.new("1", image.size)
    mask_draw = ImageDraw.Draw(mask)
    for index, contour in enumerate(layer.contours):
        mask_draw.polygon(contour, fill=0 if index else 1)
    image.paste((*fill, 255), mask=mask)
    if layer.outlined:
        brush = ImageDraw.Draw(image)
        for contour in layer.contours:
            closed = [*contour, contour[0], contour[1]]
            brush.line(closed, fill=(*line_colour(colour), 255), width=round(1.5 * FINE), joint="curve")


def line_colour(colour: Colour) -> Colour:
    """Darker than the figure; for a black one, lighter."""
    if sum(colour) < 200:
        return (120, 120, 132)
    return tuple(round(channel * 0.5) for channel in colour)  # type: ignore[return-value]


@cache
def draw_place(place: str) -> Image:
    """The place without a figure: RGB, 64 x 64. Not to be drawn upon: it is made once."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), PAPERS.get(place))
    if place in LANDSCAPES:
        LANDSCAPES[place](ImageDraw.Draw(image))
    return image.reduce(FINE)


def beach(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (120, 200, 250)), (30, (205, 236, 252))])
    fill_down(brush, [(30, (20, 120, 190)), (43, (60, 185, 205))])
    fill_down(brush, [(43, (250, 224, 160)), (64, (240, 200, 120))])
    disc(brush, 52, 11, 6, (255, 240, 120))


def meadow(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (150, 205, 250)), (64, (250, 252, 255))])
    disc(brush, 10, 12, 6, (255, 255, 255))
    disc(brush, 17, 13, 4.5, (255, 255, 255))
    disc(brush, 18, 104, 64, (130, 205, 90))
    disc(brush, 54, 110, 66, (98, 182, 70))


def snow(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (150, 172, 205)), (64, (232, 240, 248))])
    for x, top, base in ((7, 20, 46), (57, 16, 46), (17, 31, 45)):
        half = (base - top) * 0.3
        polygon(brush, [(x, top), (x + half, base), (x - half, base)], (38, 92, 84))
    disc(brush, 32, 142, 100, (250, 252, 255))


def desert(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (250, 150, 90)), (64, (255, 240, 180))])
    disc(brush, 12, 14, 7, (255, 246, 196))
    polygon(brush, [(0, 46), (22, 36), (46, 48), (64, 40), (64, 64), (0, 64)], (226, 150, 70))
    polygon(brush, [(0, 56), (26, 50), (64, 58), (64, 64), (0, 64)], (196, 116, 52))


def night(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (12, 14, 56)), (64, (52, 44, 120))])
    for x, y, radius in (
        (8, 9, 1.2),
        (22, 5, 0.9),
        (40, 8, 1.2),
        (57, 6, 1.0),
        (5, 30, 0.9),
        (59, 24, 1.3),
        (53, 42, 0.8),
    ):
        disc(brush, x, y, radius, (255, 255, 230))
    polygon(brush, [(0, 54), (16, 50), (40, 56), (64, 51), (64, 64), (0, 64)], (16, 18, 40))


def sea(brush: ImageDraw) -> None:
    fill_down(brush, [(0, (70, 190, 220)), (64, (8, 66, 134))])
    for x, y, radius in ((8, 14, 2.2), (13, 24, 1.4), (56, 20, 2.4), (52, 34, 1.5), (7, 42, 1.6)):
        disc(brush, x, y, radius, (190, 236, 246))
    polygon(brush, [(0, 57), (20, 54), (42, 58), (64, 55), (64, 64), (0, 64)], (190, 170, 110))


def fill_down(brush: ImageDraw, stops: list[tuple[float, Colour]]) -> None:
    """Fill from one height to another, in pixels, with a run of colours."""
    (top, first), (bottom, last) = stops
    start, end = round(top * FINE), round(bottom * FINE)
    for y in range(start, end):
        part = (y - start) / max(1, end - start - 1)
        brush.line([(0, y), (SIDE * FINE, y)], fill=tuple(round(a + (b - a) * part) for a, b in zip(first, last)))


def disc(brush: ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    brush.ellipse([(x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE], fill=colour)


def polygon(brush: ImageDraw, points: Contour, colour: Colour) -> None:
    brush.polygon([(x * FINE, y * FINE) for x, y in points], fill=colour)


LANDSCAPES = {"beach": beach, "meadow": meadow, "snow": snow, "desert": desert, "night": night, "sea": sea}
PLACES = (*PAPERS, *LANDSCAPES)
