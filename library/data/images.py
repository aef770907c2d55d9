"""From an image file to the pixels that are fed and the mask of their loss: opened, turned upright, scaled to cover its bucket, cropped."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.common.errors import UserError
from library.data.augment import change_colors
from library.data.buckets import cover
from library.data.dataset import ImageRecord
from library.data.headers import LARGEST_AREA
from library.data.settings import Size, SubsetSettings

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

VAE_SCALE_FACTOR = 8  # pixels of an image's side to one of its latents'
LATENT_CHANNELS = 16
FACE_IN_NAME = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")  # centre x, centre y, width, height, in pixels of the file


@dataclass(frozen=True)
class Pixels:
    """One image as it is fed."""

    image: np.ndarray  # [H, W, 3] uint8
    mask: np.ndarray | None  # [H, W] uint8, 255 counts fully
    crop: tuple[int, int]  # left, top of the crop in the scaled image
    resized: Size  # (W, H) of the scaled image


def read_pixels(record: ImageRecord, subset: SubsetSettings, rng: random.Random) -> Pixels:
    """Open, scale and crop a record's image and mask, with the random crop, face crop and colour changes of its subset.

    Flipping is left to the caller, because cached latents are flipped too. UserError names an image that cannot be read.
    """
    image = open_image(record.path)
    if not _is_of_size(image.size, record.size):
        raise UserError(
            f"{record.path}: it is {image.width}x{image.height}, but was {record.size[0]}x{record.size[1]} when the run "
            "began. Leave images alone while they are trained on, and start again."
        )
    mask_file = None if record.mask_path is None else open_image(record.mask_path)
    mask = mask_of(image, mask_file, subset.alpha_mask)
    image = image.convert("RGB")
    face = FACE_IN_NAME.search(Path(record.path).stem)
    if subset.face_crop_aug_range is not None and face is not None:
        resized, (left, top) = face_window(record, subset, tuple(map(int, face.groups())), rng)
    else:
        resized = record.resized
        spare = resized[0] - record.bucket[0], resized[1] - record.bucket[1]
        left, top = (
            (rng.randint(0, spare[0]), rng.randint(0, spare[1]))
            if subset.random_crop
            else (spare[0] // 2, spare[1] // 2)
        )
    window = (left, top, left + record.bucket[0], top + record.bucket[1])
    image = image.resize(resized, resampling(image.size, resized, subset.resize_interpolation)).crop(window)
    if mask is not None:
        mask = mask.resize(resized, resampling(mask.size, resized, "area")).crop(window)
    if subset.color_aug:
        image = change_colors(image, rng)
    return Pixels(np.asarray(image), None if mask is None else np.asarray(mask), (left, top), resized)


def _is_of_size(size: Size, recorded: Size) -> bool:
    """Whether decoding gave the size that the header has, or half of it where the image is too large to be decoded whole."""
    if recorded[0] * recorded[1] <= LARGEST_AREA:
        return size == recorded
    return all(2 * side - 1 <= whole <= 2 * side for side, whole in zip(size, recorded))


def open_image(path: str) -> Image:
    """The first frame of an image file, upright (EXIF), in mode RGB, RGBA or L. UserError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > LARGEST_AREA:
                file.draft(None, (file.width // 2, file.height // 2))  # a JPEG is decoded at half its size
            if file.width * file.height > LARGEST_AREA:
                raise ValueError(f"{file.width}x{file.height} takes too much memory")
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                return _from_wide(image)
            if image.mode == "P" or "transparency" in image.info:
                return image.convert("RGBA")
            return (
                image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA" if "A" in image.mode else "RGB")
            )
    except Exception as error:  # a damaged file may raise anything in a decoder
        raise UserError(f"{path}: this image cannot be decoded ({error}). Mend or remove it.") from error


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


def resampling(size: Size, target: Size, name: str | None) -> Resampling:
    """Pillow's filter for a `resize_interpolation` name. None: box (area) where both sides shrink, else Lanczos.

    Pillow widens its filters when it shrinks, so that bilinear and bicubic don't alias as OpenCV's do. "area" is the mean
    over the covered area when shrinking; when a side grows it is bilinear, as in OpenCV.
    """
    from PIL.Image import Resampling

    shrinks = target[0] <= size[0] and target[1] <= size[1]
    if name is None:
        return Resampling.BOX if shrinks else Resampling.LANCZOS
    if name == "area":
        return Resampling.BOX if shrinks else Resampling.BILINEAR
    return {
        "lanczos": Resampling.LANCZOS,
        "nearest": Resampling.NEAREST,
        "bilinear": Resampling.BILINEAR,
        "linear": Resampling.BILINEAR,
        "bicubic": Resampling.BICUBIC,
        "cubic": Resampling.BICUBIC,
        "box": Resampling.BOX,
    }[name]


def face_window(
    record: ImageRecord, subset: SubsetSettings, face: tuple[int, ...], rng: random.Random
) -> tuple[Size, tuple[int, int]]:
    """Scale and crop around a face: (W, H) to scale the image to, and the crop's (left, top).

    The scale is drawn so that the face's longer side becomes a share of the crop's shorter side within
    1/range[1] .. 1/range[0], but the image always covers the crop and is never enlarged beyond that.
    """
    assert subset.face_crop_aug_range is not None
    width, height = record.size
    target = record.bucket
    face_size, short = max(face[2], face[3], 1), min(target)
    covering = max(target[0] / width, target[1] / height)
    smallest = max(covering, min(1.0, short / (face_size * subset.face_crop_aug_range[1])))
    largest = max(smallest, min(1.0, short / (face_size * subset.face_crop_aug_range[0])))
    scale = rng.uniform(smallest, largest)
    least = cover(record.size, target)
    resized = max(least[0], int(width * scale + 0.5)), max(least[1], int(height * scale + 0.5))
    corner = []
    for length, side, centre in zip(resized, target, (face[0] * scale, face[1] * scale)):
        start = int(centre) - side // 2
        if subset.random_crop:
            reach = int(max(length - centre, centre))
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach  # most often near the face
        elif smallest < largest:
            jitter = int(face_size * scale) // 20
            start += rng.randint(-jitter, jitter)
        corner.append(max(0, min(start, length - side)))
    return resized, (corner[0], corner[1])


def _from_wide(image: Image) -> Image:
    """16-bit and float images to 8 bits; Pillow's own conversion would cut off instead of scaling."""
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    largest = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0.0)))
    return Image.fromarray((np.clip(values / largest, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each -> [B, 3, H, W] float32 in -1..1."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def shrink_mask(mask: np.ndarray) -> Tensor:
    """[H, W] uint8 -> [1, H/8, W/8] float32 in 0..1, each cell the mean of its area."""
    wide = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    return F.interpolate(wide, (mask.shape[0] // VAE_SCALE_FACTOR, mask.shape[1] // VAE_SCALE_FACTOR), mode="area")[0]
