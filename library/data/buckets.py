"""Buckets: which sizes images are brought to, so that all images of a batch have the same one.

Aspect-ratio buckets came with NovelAI's improvements on Stable Diffusion (2022). The list, the rounding and the two ways (with and
without enlarging) are those of kohya-ss sd-scripts; the nearest bucket is chosen by the logarithm of the aspect ratio, so that tall and wide
images are treated alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.common.errors import Problems
from library.data.settings import DatasetSettings, Size

SIDE_MULTIPLE = 16
"""Every side that is fed must be a multiple of this: an autoencoder step of 8 pixels times the transformer's patch of 2."""

SMALLEST_SIDE = 16
"""An image with a shorter side holds nothing to learn from."""

SMALLEST_KEPT = 0.05
"""An image of which the crop would keep less than this share of the area is refused: a strip, or a broken file."""


@dataclass(frozen=True)
class Fit:
    """How one image size is fed: scaled to `resized` (W, H), then cropped to `bucket` (W, H), which it covers."""

    bucket: Size
    resized: Size


class BucketError(ValueError):
    """An image's size fits no bucket; the message says why."""


class Buckets:
    """The buckets of one dataset: maps image sizes to fits, remembering those of earlier calls."""

    def __init__(self, settings: DatasetSettings):
        self.settings = settings
        self.sizes = predefined_sizes(settings) if settings.enable_bucket and not settings.bucket_no_upscale else []
        self._known: dict[Size, Fit] = {}

    def fit(self, size: Size) -> Fit:
        """The fit of an image of `size` (W, H). Raises BucketError where it is too small or too thin to train on."""
        if size not in self._known:
            self._known[size] = self._fit(size)
        return self._known[size]

    def _fit(self, size: Size) -> Fit:
        width, height = size
        if min(size) < SMALLEST_SIDE:
            raise BucketError(f"{width}x{height} is too small to train on (a side is below {SMALLEST_SIDE} pixels)")
        if not self.settings.enable_bucket:
            bucket = self.settings.resolution
            resized = cover(size, bucket)
        elif self.settings.bucket_no_upscale:
            step = self.settings.bucket_reso_steps
            resized = shrink(size, self.settings.resolution, step)
            bucket = floor_to(resized[0], step), floor_to(resized[1], step)
            if min(bucket) == 0:
                raise BucketError(
                    f"{width}x{height} has a side below bucket_reso_steps = {step} at the size that it would be fed, and"
                    " bucket_no_upscale forbids to enlarge it"
                )
        else:
            bucket = nearest_size(size, self.sizes)
            resized = cover(size, bucket)
        kept = bucket[0] * bucket[1] / (resized[0] * resized[1])
        if kept < SMALLEST_KEPT:
            raise BucketError(
                f"{width}x{height} is too long for its nearest size {bucket[0]}x{bucket[1]}: the crop would keep {kept:.1%} of it"
            )
        return Fit(bucket, resized)


def predefined_sizes(settings: DatasetSettings) -> list[Size]:
    """All bucket sizes (W, H) of about the resolution's area, sorted: sides are multiples of the step, within the limits."""
    step, low, high = settings.bucket_reso_steps, settings.min_bucket_reso, settings.max_bucket_reso
    area = settings.resolution[0] * settings.resolution[1]
    square = floor_to(math.isqrt(area), step)
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, floor_to(area // width, step))
        if height < low:
            break  # and so are those of all larger widths, whatever the limit
        sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_size(size: Size, sizes: list[Size]) -> Size:
    """The bucket of just this size, else the one with the nearest log aspect ratio; of equals the larger, then the wider."""
    if size in sizes:
        return size
    aspect = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int, int]:
        # Rounded, because equal distances must not differ by the last bit.
        return (round(abs(math.log(bucket[0] / bucket[1]) - aspect), 9), -bucket[0] * bucket[1], -bucket[0])

    return min(sizes, key=distance)


def cover(size: Size, bucket: Size) -> Size:
    """`size` scaled, keeping its ratio, so that it just covers `bucket`; sides are rounded half up."""
    width, height = size
    if width * bucket[1] > height * bucket[0]:  # wider than the bucket: the height decides
        return (2 * width * bucket[1] + height) // (2 * height), bucket[1]
    return bucket[0], (2 * height * bucket[0] + width) // (2 * width)


def shrink(size: Size, resolution: Size, step: int) -> Size:
    """`size` if its area is within the resolution's, else shrunk to about that area with one side on a step.

    Of the two sides the one is put on a step that leaves, once both are rounded down to steps, the smaller error of the
    log aspect ratio. For very long images a side may come out below the step.
    """
    width, height = size
    area = resolution[0] * resolution[1]
    if width * height <= area:
        return size
    ratio = width / height
    ideal_width = math.sqrt(area * ratio)
    by_width = floor_to(int(ideal_width + 0.5), step)
    by_height = floor_to(int(ideal_width / ratio + 0.5), step)
    candidates = [(by_width, int(by_width / ratio + 0.5)), (int(by_height * ratio + 0.5), by_height)]

    def error(candidate: Size) -> float:
        rounded = floor_to(candidate[0], step), floor_to(candidate[1], step)
        return abs(math.log(rounded[0] / rounded[1] / ratio)) if min(rounded) > 0 else math.inf

    best = min(reversed(candidates), key=error)
    return best if min(best) > 0 else (max(best[0], 1), max(best[1], 1))


def floor_to(value: int, step: int) -> int:
    return value - value % step


def check_sides(settings: DatasetSettings) -> None:
    """Raise UserError, naming the settings, where sides would not be multiples of 16 or the limits exclude the resolution."""
    problems = Problems()
    step, resolution = settings.bucket_reso_steps, settings.resolution
    if not settings.enable_bucket:
        if resolution[0] % SIDE_MULTIPLE or resolution[1] % SIDE_MULTIPLE:
            problems.add(
                f"resolution {_text(resolution)} is not a multiple of {SIDE_MULTIPLE} on both sides; try"
                f" {_text((_up(resolution[0]), _up(resolution[1])))}, or set enable_bucket = true."
            )
        problems.raise_if_any()
        return
    if step % SIDE_MULTIPLE:
        problems.add(f"bucket_reso_steps = {step} is not a multiple of {SIDE_MULTIPLE}; 64 or 32 are usual.")
    if min(resolution) < step:
        problems.add(
            f"bucket_reso_steps = {step} is larger than a side of the resolution {_text(resolution)}; lower it."
        )
    if not settings.bucket_no_upscale:
        if settings.min_bucket_reso > min(resolution):
            problems.add(
                f"min_bucket_reso = {settings.min_bucket_reso} is above the smaller side of the resolution {_text(resolution)}."
            )
        if settings.max_bucket_reso < max(resolution):
            problems.add(
                f"max_bucket_reso = {settings.max_bucket_reso} is below the larger side of the resolution {_text(resolution)}."
            )
    problems.raise_if_any()


def bucket_limits(resolution: Size, step: int, low: int | None, high: int | None) -> tuple[int, int]:
    """Smallest and largest bucket side, on steps: the smallest rounded down (one step at least), the largest up.

    A limit that nobody set (None) is 256 or 1024, or the resolution's side where that lies outside.
    """
    smallest = min(256, *resolution) if low is None else low
    largest = max(1024, *resolution) if high is None else high
    return max(step, floor_to(smallest, step)), floor_to(largest + step - 1, step)


def _up(side: int) -> int:
    return floor_to(side + SIDE_MULTIPLE - 1, SIDE_MULTIPLE)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
