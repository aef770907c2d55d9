"""Learning-rate schedules as plain formulas: step -> factor of a group's base rate.

The names, shapes and defaults are those of transformers' and diffusers' schedules (a test compares them number by
number); written here so that a run which needs neither library does not wait for their import. Steps are optimiser
steps. `warmup` steps rise from 0 to the base rate, `total` steps are the whole training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

Factor = Callable[..., float]  # (step, base rate, *, …) -> factor
CURVES = ("linear", "cosine", "1-sqrt")


def constant(step: int, base: float) -> float:
    return 1.0


def constant_with_warmup(step: int, base: float, *, warmup: int) -> float:
    return min(1.0, step / max(1, warmup)) if warmup else 1.0


def linear(step: int, base: float, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, base: float, *, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, _wave(_progress(step, warmup, total), num_cycles))


def cosine_with_restarts(step: int, base: float, *, warmup: int, total: int, num_cycles: float = 1) -> float:
    if step < warmup:
        return step / warmup
    progress = _progress(step, warmup, total)
    return max(0.0, _wave((num_cycles * progress) % 1.0, 0.5)) if progress < 1 else 0.0


def polynomial(step: int, base: float, *, warmup: int, total: int, power: float = 1.0, lr_end: float = 1e-7) -> float:
    """From `base` to the rate `lr_end` along (remaining share)^power."""
    if step < warmup:
        return step / warmup
    remaining = max(0.0, 1 - _progress(step, warmup, total))
    rate: float = (base - lr_end) * remaining**power + lr_end
    return rate / base


def inverse_sqrt(step: int, base: float, *, warmup: int, timescale: int | None = None) -> float:
    """1 / sqrt of the steps since the warm-up in units of `timescale` (the warm-up's length, or 10,000 without one)."""
    if step < warmup:
        return step / warmup
    scale = timescale or warmup or 10_000
    return 1 / math.sqrt((step - warmup + scale) / scale)


def cosine_with_min_lr(
    step: int,
    base: float,
    *,
    warmup: int,
    total: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    """Cosine down to min_lr_rate (a share of the base rate), or to the rate min_lr."""
    if step < warmup:
        return step / warmup
    return _above(_floor(base, min_lr, min_lr_rate), _wave(_progress(step, warmup, total), num_cycles))


def cosine_warmup_with_min_lr(
    step: int,
    base: float,
    *,
    warmup: int,
    total: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """The same, one step ahead, with a warm-up that starts above 0: at warmup_lr_rate, or at 1 / warmup."""
    if step < warmup:
        if warmup_lr_rate is None:
            return (step + 1) / warmup
        return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, warmup - 1)
    return _above(_floor(base, min_lr, min_lr_rate), _wave(_progress(step + 1, warmup, total), num_cycles))


def warmup_stable_decay(
    step: int,
    base: float,
    *,
    warmup: int,
    total: int,
    decay: int,
    num_cycles: float = 0.5,
    min_lr_ratio: float = 0.0,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> float:
    """Up during `warmup`, level, down during the last `decay` steps, between min_lr_ratio and 1 along a curve."""
    if step < warmup:
        return _above(min_lr_ratio, _rise(step / warmup, warmup_type))
    if step < total - decay:
        return 1.0
    if step < total:
        return _above(min_lr_ratio, _fall((step - (total - decay)) / decay, decay_type, num_cycles))
    return min_lr_ratio


def piecewise_constant(step: int, base: float, *, step_rules: str) -> float:
    """diffusers' rule string: "1:10,0.1:20,0.05" is factor 1 before step 10, 0.1 before step 20, 0.05 from there on."""
    pieces, last = parse_step_rules(step_rules)
    return next((factor for end, factor in pieces if step < end), last)


def parse_step_rules(rules: str) -> tuple[list[tuple[int, float]], float]:
    """Read "1:10,0.1:20,0.05" as ([(10, 1.0), (20, 0.1)], 0.05), ordered by step. Raises ValueError for another form."""
    *pieces, last = rules.split(",")
    pairs = [piece.split(":") for piece in pieces]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{rules!r} is not of the form factor:step,…,factor")
    return sorted((int(end), float(factor)) for factor, end in pairs), float(last)


SHAPES: Mapping[str, Factor] = MappingProxyType(
    {
        shape.__name__: shape
        for shape in (
            constant,
            constant_with_warmup,
            linear,
            cosine,
            cosine_with_restarts,
            polynomial,
            inverse_sqrt,
            cosine_with_min_lr,
            cosine_warmup_with_min_lr,
            warmup_stable_decay,
            piecewise_constant,
        )
    }
)


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _wave(progress: float, cycles: float) -> float:
    return 0.5 * (1 + math.cos(2 * math.pi * cycles * progress))


def _above(floor: float, factor: float) -> float:
    return max(0.0, floor + (1 - floor) * factor)


def _floor(base: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    return min_lr / base if min_lr is not None else (min_lr_rate or 0.0)


def _rise(progress: float, curve: str) -> float:
    if curve == "linear":
        return progress
    return 0.5 * (1 - math.cos(math.pi * progress)) if curve == "cosine" else 1 - math.sqrt(1 - progress)


def _fall(progress: float, curve: str, cycles: float) -> float:
    if curve == "linear":
        return 1 - progress
    return _wave(progress, cycles) if curve == "cosine" else 1 - math.sqrt(progress)
