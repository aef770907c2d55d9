"""Random changes of colour, weak enough to leave the caption true, and which random changes a cache would freeze."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from library.data.dataset import IndexedDataset

if TYPE_CHECKING:
    from PIL.Image import Image

SHARE = 0.33  # of images that are changed
HUE_DEGREES = 16.0
GAMMA = (0.95, 1.05)


def change_colors(image: Image, rng: random.Random) -> Image:
    """An RGB image with, in a third of the cases, its hue turned by up to 16 degrees or a gamma of 0.95 to 1.05."""
    if rng.random() >= SHARE:
        return image
    if rng.random() < 0.5:
        return turn_hue(image, rng.uniform(-HUE_DEGREES, HUE_DEGREES))
    return apply_gamma(image, rng.uniform(*GAMMA))


def turn_hue(image: Image, degrees: float) -> Image:
    from PIL import Image

    hsv = np.array(image.convert("HSV"))  # hue 0..255 for 0..360 degrees
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(degrees * 256 / 360)) % 256
    return Image.fromarray(hsv, "HSV").convert("RGB")


def apply_gamma(image: Image, gamma: float) -> Image:
    """Each channel c in 0..1 becomes c ^ (1 / gamma)."""
    table = [round(255 * (value / 255) ** (1 / gamma)) for value in range(256)]
    return image.point(table * 3)


def uncacheable_augmentations(datasets: Sequence[IndexedDataset]) -> list[str]:
    """A problem for each subset whose images are meant to differ from fetch to fetch, which one latent an image would lose."""
    problems = []
    for subset in {subset.name: subset for dataset in datasets for subset in dataset.settings.subsets}.values():
        face = subset.face_crop_aug_range
        chance = {
            "color_aug": subset.color_aug,
            "random_crop": subset.random_crop,
            "face_crop_aug_range": face is not None and face[0] != face[1],
        }
        lost = ", ".join(name for name, is_on in chance.items() if is_on)
        if lost:
            problems.append(f"{subset.name}: {lost} would be lost by --cache_latents; turn one of the two off.")
    return problems
