"""Images come out upright, in three channels, at the right size, from any file that Pillow opens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from library.common.errors import UserError
from library.data.augment import HUE_DEGREES, SHARE, apply_gamma, change_colors, turn_hue
from library.data.dataset import ImageRecord
from library.data.headers import BadImageError, image_size
from library.data.images import face_window, open_image, read_pixels, resampling
from library.data.settings import Interpolation, SubsetSettings

PLAIN = SubsetSettings(name="s")


def record(path: Path, size, bucket=(64, 64), resized=(64, 64), mask: Path | None = None) -> ImageRecord:
    return ImageRecord(str(path), size, 1, 1, "", 0, bucket, resized, str(mask) if mask else None, 1, False, 1.0)


def ramp(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 40)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "extension"),
    [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "bmp"), ("LA", "png")],
)
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str, extension: str):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(ramp(64, 64)).convert(mode).save(path)
    pixels = read_pixels(record(path, (64, 64)), PLAIN, random.Random(0))
    assert pixels.image.shape == (64, 64, 3) and pixels.image.dtype == np.uint8 and pixels.mask is None


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(path)
    image = np.asarray(open_image(str(path)))
    assert image.min() == 0 and image.max() == 255 and 120 < image.mean() < 135


def test_a_turned_photograph_is_upright(tmp_path: Path):
    path = tmp_path / "a.jpg"
    image = Image.fromarray(ramp(64, 32))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(path, exif=exif, quality=95)
    assert open_image(str(path)).size == (32, 64)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path):
    path = tmp_path / "a.webp"
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(open_image(str(path)).convert("RGB"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "broken.png"
    Image.fromarray(ramp(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(UserError, match=r"broken\.png"):
        open_image(str(path))


def test_scaling_covers_and_the_crop_is_centred(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(ramp(256, 128)).save(path)
    pixels = read_pixels(record(path, (256, 128), (64, 64), (128, 64)), PLAIN, random.Random(0))
    assert pixels.crop == (32, 0) and pixels.resized == (128, 64)
    expected = ramp(256, 128)[::2, 64:192:2].astype(int)
    assert np.abs(pixels.image.astype(int) - expected).max() <= 4


def test_random_crops_reach_every_place(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(ramp(66, 64)).save(path)
    subset, rng = replace(PLAIN, random_crop=True), random.Random(0)
    crops = {read_pixels(record(path, (66, 64), (64, 64), (66, 64)), subset, rng).crop for _ in range(40)}
    assert crops == {(0, 0), (1, 0), (2, 0)}


@pytest.mark.parametrize("name", [None, *get_args(Interpolation)])
@pytest.mark.parametrize("target", [(32, 32), (160, 160), (64, 160)])
def test_every_interpolation_keeps_a_ramp_a_ramp(name: str | None, target):
    image = Image.fromarray(ramp(64, 64)).resize(target, resampling((64, 64), target, name))
    wanted = ramp(*target).astype(int)
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 4


def test_interpolation_without_a_name_is_area_to_shrink_and_lanczos_to_enlarge():
    assert resampling((100, 100), (50, 50), None) == Image.Resampling.BOX
    assert resampling((100, 100), (50, 150), None) == Image.Resampling.LANCZOS
    assert resampling((100, 100), (150, 150), "area") == Image.Resampling.BILINEAR


def test_masks_follow_their_image(tmp_path: Path):
    """The bright half of the mask lies over the bright half of the image, after scaling and cropping."""
    picture, mask = tmp_path / "a.png", tmp_path / "m.png"
    half = np.zeros((128, 256, 3), dtype=np.uint8)
    half[:, 128:] = 255
    Image.fromarray(half).save(picture)
    Image.fromarray(half).save(mask)
    pixels = read_pixels(record(picture, (256, 128), (64, 64), (128, 64), mask), PLAIN, random.Random(0))
    assert np.array_equal(pixels.mask > 127, pixels.image[..., 0] > 127)
    rgba = tmp_path / "b.png"
    Image.fromarray(np.concatenate([half, half[..., :1]], axis=-1), "RGBA").save(rgba)
    alpha = read_pixels(
        record(rgba, (256, 128), (64, 64), (128, 64)), replace(PLAIN, alpha_mask=True), random.Random(0)
    )
    assert np.array_equal(alpha.mask, pixels.mask)
    opaque = read_pixels(
        record(picture, (256, 128), (64, 64), (128, 64)), replace(PLAIN, alpha_mask=True), random.Random(0)
    )
    assert (opaque.mask == 255).all()


def test_face_crops_hold_the_face_at_the_wanted_size(tmp_path: Path):
    subset, rng = replace(PLAIN, face_crop_aug_range=(2.0, 4.0)), random.Random(1)
    face = (700, 300, 100, 80)
    scales = []
    for _ in range(200):
        (width, height), (left, top) = face_window(
            record(tmp_path / "x_700_300_100_80.png", (1000, 800)), subset, face, rng
        )
        assert 0 <= left <= width - 64 and 0 <= top <= height - 64
        scale = width / 1000
        scales.append(scale * 100 / 64)  # the face's share of the crop
        centre = (700 * scale - left, 300 * scale - top)
        assert 16 <= centre[0] <= 48 and 0 <= centre[1] <= 64
    assert min(scales) > 0.24 and max(scales) < 0.51 and max(scales) - min(scales) > 0.1


def test_colours_change_in_a_third_of_the_cases_and_only_a_little():
    image, rng = Image.fromarray(ramp(32, 32)), random.Random(0)
    results = [np.asarray(change_colors(image, rng)).astype(int) for _ in range(600)]
    changed = [result for result in results if not np.array_equal(result, np.asarray(image))]
    assert abs(len(changed) / 600 - SHARE) < 0.06
    assert np.asarray(turn_hue(Image.new("RGB", (1, 1), (255, 0, 0)), HUE_DEGREES))[0, 0].tolist()[1] > 40
    dark, light = (np.asarray(apply_gamma(image, g)).mean() for g in (0.95, 1.05))
    assert dark < np.asarray(image).mean() < light and light - dark < 8


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadImageError, match="13000x13000 is larger than the 89 megapixels"):
        image_size(str(tmp_path / "bomb.png"))
    with pytest.raises(UserError, match="too much memory"):
        open_image(str(tmp_path / "bomb.png"))


def test_a_very_large_jpeg_is_decoded_at_half_its_size(tmp_path: Path):
    path = tmp_path / "large.jpg"
    Image.new("L", (9_501, 9_500), 80).save(path)
    assert image_size(str(path)) == (9_501, 9_500)
    assert open_image(str(path)).size == (4_751, 4_750)
    pixels = read_pixels(record(path, (9_501, 9_500)), PLAIN, random.Random(0))
    assert pixels.image.shape == (64, 64, 3) and set(np.unique(pixels.image)) == {80}
