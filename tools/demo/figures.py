"""The figures of the demo pictures as polygons: what the base model knows, and the zorp, which it does not.

A figure is a list of layers, drawn one over another. Coordinates are -1..1 in both directions, y down, as in pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Contour = list[tuple[float, float]]


@dataclass(frozen=True)
class Layer:
    """One area: the first contour is filled, the others are holes in it. paint: "body" (the scene's colour), "white" or "black"."""

    contours: list[Contour]
    paint: str = "body"
    outlined: bool = True


def ellipse(x: float, y: float, radius_x: float, radius_y: float, points: int = 64) -> Contour:
    """A closed curve around (x, y)."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles]


def regular(corners: int, radius: float, start: float = -90.0, y: float = 0.0) -> Contour:
    """A regular polygon, its first corner at `start` degrees (-90 is up)."""
    angles = [math.radians(start + 360 * i / corners) for i in range(corners)]
    return [(radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def star() -> Contour:
    angles = [math.radians(-90 + 36 * i) for i in range(10)]
    return [(r * math.cos(a), 0.08 + r * math.sin(a)) for a, r in zip(angles, [1.08, 0.46] * 5)]


def heart() -> Contour:
    turns = [2 * math.pi * i / 72 for i in range(72)]
    across = [16 * math.sin(t) ** 3 for t in turns]
    down = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in turns]
    return [(x / 16.5, (y - 2.5) / 16.0) for x, y in zip(across, down)]


def cross() -> Contour:
    a, b = 0.34, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def moon() -> Contour:
    """A crescent, open to the right: the outer circle from horn to horn, and back along the inner one."""
    horn = math.radians(52)
    outer = [horn + (2 * math.pi - 2 * horn) * i / 48 for i in range(49)]
    inner_x, inner_radius = 0.42, 0.79
    half = math.asin(math.sin(horn) / inner_radius * 0.97)
    inner = [(2 * math.pi - half) + (2 * half - 2 * math.pi) * i / 40 for i in range(41)]
    points = [(0.97 * math.cos(a), 0.97 * math.sin(a)) for a in outer]
    return points + [(inner_x + inner_radius * math.cos(a), inner_radius * math.sin(a)) for a in inner]


def flower() -> list[Layer]:
    centres = [math.radians(-90 + 72 * i) for i in range(5)]
    petals = [Layer([ellipse(0.58 * math.cos(a), 0.58 * math.sin(a), 0.42, 0.42)]) for a in centres]
    return [*petals, Layer([ellipse(0, 0, 0.36, 0.36)], "white")]


def zorp() -> list[Layer]:
    """A small creature: a drop-shaped body, one large eye, two feelers and two feet."""
    feelers = []
    for side in (-1, 1):
        feelers.append(Layer([[(side * 0.2, -0.5), (side * 0.5, -1.0), (side * 0.62, -0.96), (side * 0.36, -0.42)]]))
        feelers.append(Layer([ellipse(side * 0.57, -1.0, 0.19, 0.19)]))
    feet = [Layer([ellipse(side * 0.4, 0.88, 0.3, 0.17)]) for side in (-1, 1)]
    turns = [2 * math.pi * i / 72 for i in range(72)]
    body = [((0.78 + 0.1 * math.sin(t)) * math.cos(t), 0.12 + 0.74 * math.sin(t)) for t in turns]
    eye = [Layer([ellipse(0, -0.05, 0.48, 0.48)], "white"), Layer([ellipse(0.04, -0.01, 0.23, 0.23)], "black", False)]
    return [*feelers, *feet, Layer([body]), *eye]


def one(contour: Callable[[], Contour]) -> Callable[[], list[Layer]]:
    return lambda: [Layer([contour()])]


FIGURES: dict[str, Callable[[], list[Layer]]] = {
    "circle": one(lambda: ellipse(0, 0, 0.92, 0.92)),
    "square": one(lambda: [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "triangle": one(lambda: regular(3, 1.12, y=0.22)),
    "star": one(star),
    "heart": one(heart),
    "diamond": one(lambda: [(0, -1.08), (0.72, 0), (0, 1.08), (-0.72, 0)]),
    "cross": one(cross),
    "ring": lambda: [Layer([ellipse(0, 0, 0.97, 0.97), ellipse(0, 0, 0.5, 0.5)])],
    "moon": one(moon),
    "flower": flower,
    "zorp": zorp,
}
NEW_FIGURE = "zorp"  # in no picture that the base model was trained on
KNOWN_FIGURES = tuple(name for name in FIGURES if name != NEW_FIGURE)
