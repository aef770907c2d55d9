"""Which parts of an image count in the loss, and how much: from its alpha channel or from a mask image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

LATENT_CELL = 8  # pixels of an image's side to one of its latents'


def mask_of(image: Image, mask_file: Image | None, alpha_mask: bool) -> Image | None:
    """The loss mask in mode L, of the image's size: the red channel of its mask file, else with `alpha_mask` its alpha channel.

    An image without an alpha channel counts fully. None: there is no mask.
    """
    from PIL import Image

    if mask_file is not None:
        mask = mask_file.convert("RGB").getchannel(0)
        return mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.BOX)
    if not alpha_mask:
        return None
    return image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)


def shrink_mask(mask: np.ndarray) -> Tensor:
    """[H, W] uint8 -> [1, H/8, W/8] float32 in 0..1, each cell the mean of its area."""
    wide = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    return F.interpolate(wide, (mask.shape[0] // LATENT_CELL, mask.shape[1] // LATENT_CELL), mode="area")[0]
