"""Position embeddings of the image patches: crops of the checkpoint's table, and tables scaled to the resolution."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import torch
from torch import Tensor

LATENT_AND_PATCH = 16  # pixels on a patch's side: 8 a latent, 2 latents a patch


def crop_pos_embed(table: Tensor, height: int, width: int, offset: tuple[int, int] | None = None) -> Tensor:
    """Cut height x width patches out of a square table [1, P * P, D] -> [1, height * width, D].

    offset is (top, left) in patches; without it the crop is centered. ValueError if the crop leaves the table.
    """
    side = math.isqrt(table.shape[1])
    top, left = offset if offset is not None else ((side - height) // 2, (side - width) // 2)
    if top < 0 or left < 0 or top + height > side or left + width > side:
        raise ValueError(
            f"a crop of {height}x{width} patches at ({top}, {left}) leaves the position table of {side}x{side}"
        )
    square: Tensor = table.unflatten(1, (side, side))  # [1, P, P, D]
    return square[:, top : top + height, left : left + width].reshape(1, height * width, -1)


def random_offset(side: int, height: int, width: int, rng: random.Random) -> tuple[int, int]:
    """A uniformly random position (top, left) for a crop in a table of side x side patches."""
    return rng.randint(0, side - height), rng.randint(0, side - width)


def sincos_table(side: int, hidden_size: int, center_patches: float) -> Tensor:
    """A 2D sine-cosine table [1, side * side, hidden_size] float32 in which `center_patches` span the 16 units of training at 256 px.

    Coordinate i lies at 16 * (i - (side - S) / 2) / S with S = center_patches. Half of the channels code x, half y, each as
    sines then cosines of frequencies 10000^(-j / (hidden_size / 4)) (Dosovitskiy et al. 2021's fixed variant, as in DiT).
    """
    base = 16.0
    steps = torch.arange(side, dtype=torch.float64)
    positions = base * (steps - (side - center_patches) / 2) / center_patches
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = positions[:, None] * frequencies  # [side, D / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, D / 2]
    along_x = axis[None, :, :].expand(side, side, -1)
    along_y = axis[:, None, :].expand(side, side, -1)
    return torch.cat([along_x, along_y], dim=-1).reshape(1, side * side, hidden_size).float()


class ScaledPosEmbed:
    """Tables for several training resolutions; a batch takes the one made for its area (`--enable_scaled_pos_embed`)."""

    def __init__(self, resolutions: list[tuple[int, int]], hidden_size: int, device: torch.device | str = "cpu"):
        """resolutions: (width, height) in pixels, one for each dataset."""
        sides = sorted({round(math.sqrt(width * height)) // LATENT_AND_PATCH for width, height in resolutions})
        self.hidden_size = hidden_size
        self.device = torch.device(device)
        self.sides = sides
        self.limits = [((a + b) / 2) for a, b in pairwise(side * side for side in sides)]
        self.tables = [self._table(math.floor(1.5 * side), side) for side in sides]

    def _table(self, table_side: int, center_patches: int) -> Tensor:
        return sincos_table(table_side, self.hidden_size, center_patches).to(self.device)

    def table_for(self, height: int, width: int) -> Tensor:
        """The table [1, P * P, D] for a batch of height x width patches, grown where the batch is larger than it."""
        level = sum(height * width > limit for limit in self.limits)
        table = self.tables[level]
        if max(height, width) > math.isqrt(table.shape[1]):
            table = self._table(max(height, width), self.sides[level])
            self.tables[level] = table
        return table
