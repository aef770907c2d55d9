"""One micro-batch: draw a timestep and noise, predict the velocity, take the loss.

The model family stands behind two functions: `conditioning` (a batch's text as the denoiser wants it) and `predict`
(the denoiser). Everything drawn comes from generators that the caller has placed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.common.seeds import StepGenerators
from library.flow.loss import LossSettings, training_loss
from library.flow.timesteps import FlowSettings, add_noise, sample_timesteps, sigmas, velocity_target

Predict = Callable[[Tensor, Tensor, Any], Tensor]
"""(noisy latents [B, C, h, w], timesteps [B] 0..1000 float32, conditioning) -> velocity [B, C, h, w]."""


@dataclass(frozen=True)
class StepInput:
    """A micro-batch on the device. latents are normalised, float32."""

    latents: Tensor  # [B, C, h, w]
    conditioning: Any
    loss_weights: Tensor  # [B]
    mask: Tensor | None  # [B, 1, h, w]
    preserve: Tensor | None  # [B] bool: train these towards the base model's own velocity
    base_conditioning: Any = None  # the base model's own, where the network changes the conditioning too


@dataclass(frozen=True)
class StepResult:
    losses: Tensor  # [B] float32, with graph
    timesteps: Tensor  # [B] float32 on the CPU


class DenoisingStep:
    """Computes the losses of micro-batches under fixed settings."""

    def __init__(
        self,
        flow: FlowSettings,
        loss: LossSettings,
        predict: Predict,
        without_network: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
    ):
        """without_network: a context in which the denoiser is the base model (for differential output preservation)."""
        self.flow, self.loss, self.predict = flow, loss, predict
        self.without_network = without_network
        self.device = device

    def __call__(self, given: StepInput, draws: StepGenerators, timestep: int | None = None) -> StepResult:
        """The losses of a micro-batch; with `timestep` (validation) every sample is at that one."""
        latents = given.latents
        count = latents.shape[0]
        if timestep is None:
            timesteps = sample_timesteps(self.flow, count, draws.cpu, (latents.shape[-2], latents.shape[-1]))
        else:
            timesteps = torch.full((count,), float(timestep))
        on_device = timesteps.to(self.device, non_blocking=True)
        noise = torch.randn(latents.shape, generator=draws.device, device=self.device)
        sigma = sigmas(on_device)
        noisy = add_noise(latents, noise, sigma)
        target = velocity_target(latents, noise)
        if given.preserve is not None:
            base = given.conditioning if given.base_conditioning is None else given.base_conditioning
            target = self._base_velocity_where(given.preserve, noisy, on_device, base, target)
        velocity = self.predict(noisy, on_device, given.conditioning)
        losses = training_loss(velocity, target, sigma, self.flow, self.loss, given.mask, given.loss_weights)
        return StepResult(losses, timesteps)

    @torch.no_grad()
    def _base_velocity_where(
        self, preserve: Tensor, noisy: Tensor, timesteps: Tensor, conditioning: Any, target: Tensor
    ) -> Tensor:
        """Differential output preservation: those samples are to keep what the base model says."""
        with self.without_network():
            base = self.predict(noisy, timesteps, conditioning).float()
        return torch.where(preserve.view(-1, 1, 1, 1), base, target)
