"""Buckets: sides that can be fed, about the wanted area, the nearest shape, and no image stretched or padded."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings, strategies as st

from library.common.errors import UserError
from library.data.buckets import (
    BucketError,
    Buckets,
    bucket_limits,
    check_sides,
    cover,
    nearest_size,
    predefined_sizes,
    shrink,
)
from library.data.settings import DatasetSettings

SIDES = st.integers(16, 5000)
SIZES = st.tuples(SIDES, SIDES)


def bucketed(resolution: tuple[int, int] = (1024, 1024), **values: object) -> DatasetSettings:
    step = values.setdefault("bucket_reso_steps", 64)
    low, high = bucket_limits(resolution, step, values.pop("low", None), values.pop("high", None))
    limits = {"min_bucket_reso": low, "max_bucket_reso": high}
    return DatasetSettings("d", (), resolution, enable_bucket=True, **limits, **values)


@st.composite
def datasets(draw: st.DrawFn, no_upscale: bool) -> DatasetSettings:
    step = draw(st.sampled_from([16, 32, 64]))
    width, height = draw(st.integers(step, 1536)), draw(st.integers(step, 1536))
    return bucketed((width, height), bucket_reso_steps=step, bucket_no_upscale=no_upscale)


# --- the list ---


def listed_naively(area: int, low: int, high: int, step: int) -> set[tuple[int, int]]:
    """All pairs of steps within the limits where one side is the longest that keeps the area with the other, and the square."""
    sides = range(step, high + 1, step)
    square = max(side for side in sides if side * side <= area)
    found = {(square, square)}
    for one in sides:
        fitting = [other for other in sides if one * other <= area and other <= high]
        if one >= low and fitting and max(fitting) >= low:
            found |= {(one, max(fitting)), (max(fitting), one)}
    return found


@pytest.mark.parametrize("resolution", [(512, 512), (1024, 1024), (832, 1216), (768, 768), (64, 64), (1536, 640)])
@pytest.mark.parametrize("step", [32, 64])
def test_the_list_is_the_one_that_a_plain_search_finds(resolution: tuple[int, int], step: int) -> None:
    config = bucketed(resolution, bucket_reso_steps=step)
    area = resolution[0] * resolution[1]
    expected = listed_naively(area, config.min_bucket_reso, config.max_bucket_reso, step)
    assert predefined_sizes(config) == sorted(expected)


def test_the_list_for_1024_and_step_64_is_the_known_one() -> None:
    sizes = predefined_sizes(bucketed(high=2048))
    assert (1024, 1024) in sizes
    assert {(832, 1216), (1216, 832), (896, 1152), (768, 1344), (1536, 640), (704, 1472)} <= set(sizes)
    assert min(sizes) == (256, 2048)
    assert max(sizes) == (2048, 512)


@settings(max_examples=100, deadline=None)
@given(datasets(no_upscale=False))
def test_every_bucket_has_sides_on_steps_within_the_limits_and_no_more_than_the_area(config: DatasetSettings) -> None:
    sizes = predefined_sizes(config)
    assert sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % config.bucket_reso_steps == height % config.bucket_reso_steps == 0
        assert width * height <= config.resolution[0] * config.resolution[1]
        assert max(width, height) <= config.max_bucket_reso
        assert (height, width) in sizes
        if width != height:
            assert min(width, height) >= config.min_bucket_reso


def test_a_resolution_of_64_pixels_has_a_bucket() -> None:
    assert predefined_sizes(bucketed((64, 64))) == [(64, 64)]
    assert (48, 80) in predefined_sizes(bucketed((64, 64), bucket_reso_steps=16, low=32))


# --- the choice ---


@given(SIZES)
def test_the_nearest_bucket_by_log_ratio_treats_tall_and_wide_alike(size: tuple[int, int]) -> None:
    sizes = predefined_sizes(bucketed(high=2048))
    chosen = nearest_size(size, sizes)
    wanted = math.log(size[0] / size[1])
    error = abs(math.log(chosen[0] / chosen[1]) - wanted)
    assert all(error <= abs(math.log(width / height) - wanted) + 1e-8 for width, height in sizes)
    turned = nearest_size((size[1], size[0]), sizes)
    assert math.isclose(turned[0] / turned[1], chosen[1] / chosen[0]) or math.isclose(
        abs(math.log(turned[0] / turned[1]) + wanted), error, abs_tol=1e-8
    )


def test_log_ratio_and_not_the_ratio_decides() -> None:
    # 1.5 lies nearer to 2 by difference from 1 (0.5 each way is a tie), yet 1 : 1.5 is a longer way than 1.5 : 2.
    assert nearest_size((145, 100), [(100, 100), (200, 100)]) == (200, 100)
    assert nearest_size((100, 145), [(100, 100), (100, 200)]) == (100, 200)


def test_an_image_of_the_exact_size_of_a_bucket_keeps_it() -> None:
    config = bucketed(high=2048)
    fits = Buckets(config)
    for size in predefined_sizes(config):
        assert fits.fit(size).bucket == fits.fit(size).resized == size


@settings(max_examples=200)
@given(datasets(no_upscale=False), SIZES)
def test_the_resized_image_covers_its_bucket_and_touches_it_on_one_side(
    config: DatasetSettings, size: tuple[int, int]
) -> None:
    try:
        fit = Buckets(config).fit(size)
    except BucketError:
        assume(False)
        return
    check_fit(fit.bucket, fit.resized, size)


@given(SIZES)
def test_without_buckets_everything_is_brought_to_the_resolution(size: tuple[int, int]) -> None:
    config = DatasetSettings("d", (), (832, 1216))
    try:
        fit = Buckets(config).fit(size)
    except BucketError:
        assume(False)
        return
    assert fit.bucket == (832, 1216)
    check_fit(fit.bucket, fit.resized, size)


def check_fit(bucket: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]) -> None:
    assert resized[0] >= bucket[0]
    assert resized[1] >= bucket[1]
    assert resized[0] == bucket[0] or resized[1] == bucket[1]
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    assert abs(resized[0] - size[0] * scale) <= 0.5 + 1e-6  # rounded to the nearest pixel, so never stretched
    assert abs(resized[1] - size[1] * scale) <= 0.5 + 1e-6


def test_halves_are_rounded_up() -> None:
    assert cover((3, 2), (64, 43)) == (65, 43)  # 64.5
    assert cover((2, 3), (43, 64)) == (43, 65)


# --- without enlarging ---


@settings(max_examples=300)
@given(datasets(no_upscale=True), SIZES)
def test_no_upscale_never_enlarges_and_loses_less_than_a_step(config: DatasetSettings, size: tuple[int, int]) -> None:
    try:
        fit = Buckets(config).fit(size)
    except BucketError:
        assume(False)
        return
    step, area = config.bucket_reso_steps, config.resolution[0] * config.resolution[1]
    for side in (0, 1):
        assert fit.resized[side] <= size[side]
        assert fit.bucket[side] == fit.resized[side] // step * step
    if size[0] * size[1] <= area:
        assert fit.resized == size
    else:
        # Sides are rounded to whole pixels before they are brought to steps, which may add a pixel to each.
        assert (fit.bucket[0] - 1) * (fit.bucket[1] - 1) <= area
        assert fit.resized[0] % step == 0 or fit.resized[1] % step == 0


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((500, 300), (500, 300)),
        ((1024, 1024), (1024, 1024)),
        ((2048, 2048), (1024, 1024)),
        # 1254.1 x 836.1: 1216 wide gives 810.7 high, buckets 1216x768 (1.583); 832 high gives 1248 wide, 1216x832 (1.462)
        ((3000, 2000), (1248, 832)),
        ((2000, 3000), (832, 1248)),
    ],
)
def test_no_upscale_on_known_sizes(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert shrink(size, (1024, 1024), 64) == resized


# --- what can't be fed ---


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (15, 900), (30000, 20), (20, 30000)])
def test_tiny_images_and_strips_are_refused(size: tuple[int, int], no_upscale: bool) -> None:
    with pytest.raises(BucketError, match=f"{size[0]}x{size[1]}"):
        Buckets(bucketed(bucket_no_upscale=no_upscale)).fit(size)
    with pytest.raises(BucketError, match=f"{size[0]}x{size[1]}"):
        Buckets(DatasetSettings("d", (), (512, 512))).fit(size)


def test_no_upscale_refuses_images_below_one_step() -> None:
    with pytest.raises(BucketError, match="bucket_no_upscale"):
        Buckets(bucketed(bucket_no_upscale=True)).fit((63, 200))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (DatasetSettings("d", (), (500, 512)), "resolution 500x512 is not a multiple of 16 on both sides; try 512x512"),
        (DatasetSettings("d", (), (512, 512), enable_bucket=True, bucket_reso_steps=40), "bucket_reso_steps = 40"),
        (DatasetSettings("d", (), (48, 512), enable_bucket=True), "larger than a side"),
        (DatasetSettings("d", (), (512, 512), enable_bucket=True, min_bucket_reso=576), "min_bucket_reso = 576"),
        (DatasetSettings("d", (), (512, 1280), enable_bucket=True), "max_bucket_reso = 1024"),
    ],
)
def test_settings_that_cannot_be_fed_are_named(config: DatasetSettings, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_sides(config)


def test_limits_are_ignored_without_enlarging() -> None:
    check_sides(DatasetSettings("d", (), (512, 1280), enable_bucket=True, bucket_no_upscale=True, min_bucket_reso=576))


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        (((1024, 1024), 64, None, None), (256, 1024)),
        (((1024, 1024), 64, 300, 1300), (256, 1344)),
        (((512, 512), 32, 300, 1300), (288, 1312)),
        (((64, 64), 64, None, None), (64, 1024)),
        (((2048, 1024), 64, None, None), (256, 2048)),
    ],
)
def test_limits_are_rounded_to_steps_outwards(arguments: tuple, limits: tuple[int, int]) -> None:
    assert bucket_limits(*arguments) == limits
