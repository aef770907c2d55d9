"""The training loss of a batch, one number a sample, and its records by timestep and over time.

Everything is written for the velocity residual r = v - v* and stays finite at sigma = 0 and 1. With s the residual
scale and w' the loss weight of library/flow/timesteps.py (s = sigma, w' = w * sigma^2 when the loss is taken on x0), the
error that the loss function sees is e = s * r, and w * L(e) with w = w' / s^2 becomes

    l2         w' * r^2
    huber      w' * 2 c r^2 / (sqrt(e^2 + c^2) + c)      since 2c (sqrt(e^2 + c^2) - c) = 2c e^2 / (sqrt(e^2 + c^2) + c)
    smooth_l1  w' *   2 r^2 / (sqrt(e^2 + c^2) + c)
    l1         w' * |r| / s

The first three are the same numbers as sd-scripts' wherever those are finite, w = sigma^-2 included, and have no 0 * inf
and no cancellation. Only l1 with sigma_sqrt has a true pole at sigma = 0; there s is held at one timestep (0.001), so
that every t >= 1 keeps its exact weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from library.flow.timesteps import TRAIN_TIMESTEPS, FlowSettings, loss_weight, per_sample, residual_scale

LOSS_TYPES = ("l1", "l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
_SMALLEST_SCALE = 1 / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class LossSettings:
    """loss_type: one of LOSS_TYPES. huber_schedule, huber_c, huber_scale: the threshold, see `huber_threshold`."""

    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0


def check_loss(settings: LossSettings) -> list[str]:
    """Return what is wrong with the settings, one sentence a problem; an empty list if nothing is."""
    problems = []
    if settings.loss_type not in LOSS_TYPES:
        problems.append(f"--loss_type={settings.loss_type} is not known: choose one of {', '.join(LOSS_TYPES)}.")
    if settings.huber_schedule not in HUBER_SCHEDULES:
        known = ", ".join(HUBER_SCHEDULES)
        problems.append(f"--huber_schedule={settings.huber_schedule} is not known: choose one of {known}.")
    for option, value in (("--huber_c", settings.huber_c), ("--huber_scale", settings.huber_scale)):
        if not (value > 0 and math.isfinite(value)):
            problems.append(f"{option}={value}: it must be above 0.")
    return problems


def training_loss(
    velocity: Tensor,
    target: Tensor,
    sigma: Tensor,
    flow: FlowSettings,
    loss: LossSettings,
    mask: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """The loss of each sample, float32, shape [B]; the batch's loss is its mean.

    velocity: the model's prediction [B, C, h, w], any dtype. target: the velocity it should have been, eps - x0 (for
    differential output preservation: the base model's own velocity). sigma: [B] in 0..1 on the same device.
    mask: [B, 1, H, W] in 0..1, resized to the latent by area; the mean divides by all pixels, so that a small mask gives
    a small loss (as in sd-scripts). sample_weights: [B], the prior loss weight of regularisation images.
    """
    residual = velocity.float() - target.float()  # [B, C, h, w]
    pointwise = weighted_error(residual, sigma.float(), flow, loss)
    if mask is not None:
        pointwise = pointwise * resize_mask(mask, (residual.shape[-2], residual.shape[-1]))
    samples = pointwise.flatten(1).mean(1)  # [B]
    return samples if sample_weights is None else samples * sample_weights.to(samples)


def weighted_error(residual: Tensor, sigma: Tensor, flow: FlowSettings, loss: LossSettings) -> Tensor:
    """w(sigma) * L(scale * residual) elementwise: residual [B, ...] float32, sigma [B]; formulas at the top."""
    weight = per_sample(loss_weight(flow, sigma), residual)
    if loss.loss_type == "l2":
        return weight * residual.square()
    scale = per_sample(residual_scale(flow, sigma), residual)
    if loss.loss_type == "l1":
        return weight / scale.clamp(min=_SMALLEST_SCALE) * residual.abs()
    c = per_sample(huber_threshold(loss, sigma), residual)
    squared = residual.square()
    factor = 2 * c if loss.loss_type == "huber" else 2
    return weight * factor * squared / (torch.sqrt(scale.square() * squared + c.square()) + c)


def huber_threshold(settings: LossSettings, sigma: Tensor) -> Tensor:
    """The error c at which huber and smooth_l1 pass from square to linear: float32, shape of sigma, above 0.

    constant: c = huber_c.
    exponential: c = huber_c ^ sigma, falling from 1 at sigma = 0 to huber_c at sigma = 1.
    snr: c = (1 - huber_c) / (1 + 1/sqrt(SNR))^2 + huber_c, as sd-scripts has it for other models. A rectified flow has
        SNR = ((1 - sigma) / sigma)^2, so that 1 / (1 + sigma / (1 - sigma)) = 1 - sigma and
        c = (1 - huber_c) * (1 - sigma)^2 + huber_c: 1 at sigma = 0, huber_c at sigma = 1, finite between.
    Each is multiplied by huber_scale.
    """
    sigma = sigma.float()
    if settings.huber_schedule == "constant":
        c = torch.full_like(sigma, settings.huber_c)
    elif settings.huber_schedule == "exponential":
        c = torch.exp(math.log(settings.huber_c) * sigma)
    elif settings.huber_schedule == "snr":
        c = (1 - settings.huber_c) * (1 - sigma).square() + settings.huber_c
    else:
        raise ValueError(f"unknown huber schedule {settings.huber_schedule!r}")
    return c * settings.huber_scale


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 1, H, W] -> [B, 1, h, w] float32: each cell is the mean of the area that it covers."""
    mask = mask.float()
    return mask if mask.shape[-2:] == size else F.interpolate(mask, size, mode="area")


class RunningLossState(TypedDict):
    values: Tensor  # [window] float32
    added: int


class RunningLoss:
    """The mean of the last `window` losses, kept on the device: adding never waits for it.

    The losses seen so far are averaged, never padded, so that the mean is right from the first step on and, with the
    state restored, from the first step after a resume. A loss that is not finite, whose step was skipped, counts nothing.
    """

    def __init__(self, window: int, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(window, device=device)
        self.added = 0

    def add(self, loss: Tensor) -> None:
        """Record a scalar loss (the batch's mean)."""
        self.values[self.added % len(self.values)] = loss.detach()
        self.added += 1

    def mean(self) -> Tensor:
        """The mean as a scalar tensor on the device; 0 before the first loss, NaN where none is finite."""
        seen = self.values[: min(self.added, len(self.values))]
        finite = torch.isfinite(seen)
        return torch.where(finite, seen, 0).sum() / finite.sum() if len(seen) else self.values.new_zeros(())

    def state_dict(self) -> RunningLossState:
        return {"values": self.values.clone(), "added": self.added}

    def load_state_dict(self, state: RunningLossState) -> None:
        """Restore; where the window has changed since, the newest losses that fit are kept."""
        saved = state["values"]
        if len(saved) == len(self.values):
            self.values.copy_(saved)
            self.added = state["added"]
            return
        seen = min(state["added"], len(saved))
        newest_last = saved.roll(-(state["added"] % len(saved)) if seen == len(saved) else 0)[:seen]
        kept = newest_last[-len(self.values) :]
        self.values.zero_()
        self.values[: len(kept)] = kept.to(self.values)
        self.added = len(kept)


class TimestepLosses:
    """The mean loss of each of `bins` equal ranges of timesteps, summed on the device without waiting for it."""

    def __init__(self, bins: int = 10, device: torch.device | str = "cpu") -> None:
        self.bins = bins
        self.sums = torch.zeros(2, bins, device=device)  # losses, counts

    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record losses [B] (on the device) at timesteps [B] in 0..1000 (on the CPU or the device), the finite ones."""
        index = (timesteps.float() * (self.bins / TRAIN_TIMESTEPS)).long().clamp_(0, self.bins - 1)
        index = index.to(self.sums.device, non_blocking=True)
        losses = losses.detach().to(self.sums)
        finite = torch.isfinite(losses)
        self.sums.index_add_(1, index, torch.stack([torch.where(finite, losses, 0), finite.to(losses)]))

    def means(self) -> list[float | None]:
        """The mean of each range, None where nothing was drawn. Waits for the device: call it when reporting."""
        losses, counts = self.sums.tolist()
        return [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]

    def reset(self) -> None:
        self.sums.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])
