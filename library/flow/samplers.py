"""Samplers: from noise to a latent along the model's velocity field, with classifier-free guidance.

The state x is float32; sigma runs from 1 to 0. With the flow dx/dsigma = v(x, sigma) (see flow.py) each sampler is a way to
integrate it: Euler (first order), Heun (second order, two predictions a step), and DPM-Solver++(2M) (Lu et al. 2022,
"DPM-Solver++", algorithm 2) with alpha = 1 - sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w] float32, timesteps [B] float32 0..1000) -> velocity of x's shape."""

SAMPLERS = {
    "euler": "euler",
    "k_euler": "euler",
    "heun": "heun",
    "dpmsolver++": "dpmpp_2m",
    "dpmpp_2m": "dpmpp_2m",
}
"""Names that `--sample_sampler` and `--ss` may have, and the sampler that each means."""


def preview_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """The noise levels of a preview, float32 [steps + 1], from 1 to 0.

    Timesteps are evenly spread from 1000 to 1000 * s(1/1000), then each tau = t / 1000 is shifted by
    s(tau) = shift * tau / (1 + (shift - 1) * tau) (Esser et al. 2024, eq. 23); 0 is appended.
    """

    def shifted(tau: Tensor) -> Tensor:
        return shift * tau / (1 + (shift - 1) * tau)

    first, last = torch.tensor(1.0, dtype=torch.float64), shifted(torch.tensor(1 / 1000, dtype=torch.float64))
    taus = torch.linspace(first.item(), last.item(), steps, dtype=torch.float64)
    return torch.cat([shifted(taus), torch.zeros(1, dtype=torch.float64)]).float()


def guided(conditioned: Velocity, unconditioned: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) on velocities: v_u + guidance * (v_c - v_u)."""

    def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
        without = unconditioned(x, timesteps).float()
        return torch.lerp(without, conditioned(x, timesteps).float(), guidance)

    return velocity


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    sampler: str,
    wrap: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Integrate from noise [B, C, h, w] along sigmas [N + 1] (falling, the last 0) -> the normalized latent, float32.

    wrap: puts a progress bar around the steps.
    """
    integrate = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m}[sampler]
    levels = [float(s) for s in sigmas]
    x = noise.float() * levels[0]
    state: dict[str, Tensor] = {}
    for step in wrap(range(len(levels) - 1)):
        x = integrate(velocity, x, levels, step, state)
    return x


def _velocity_at(velocity: Velocity, x: Tensor, sigma: float) -> Tensor:
    return velocity(x, torch.full((x.shape[0],), 1000.0 * sigma, device=x.device)).float()


def _euler(velocity: Velocity, x: Tensor, sigmas: list[float], step: int, state: dict[str, Tensor]) -> Tensor:
    """x + (sigma' - sigma) * v."""
    return x + (sigmas[step + 1] - sigmas[step]) * _velocity_at(velocity, x, sigmas[step])


def _heun(velocity: Velocity, x: Tensor, sigmas: list[float], step: int, state: dict[str, Tensor]) -> Tensor:
    """The mean of the slopes at both ends; the last step to sigma = 0 is Euler's, as the slope there is not trained."""
    distance = sigmas[step + 1] - sigmas[step]
    first = _velocity_at(velocity, x, sigmas[step])
    there = x + distance * first
    if sigmas[step + 1] == 0:
        return there
    return x + distance * (first + _velocity_at(velocity, there, sigmas[step + 1])) / 2


def _dpmpp_2m(velocity: Velocity, x: Tensor, sigmas: list[float], step: int, state: dict[str, Tensor]) -> Tensor:
    """Second order from the denoised estimates of this step and the last, in lambda = log((1 - sigma) / sigma)."""
    sigma, following = sigmas[step], sigmas[step + 1]
    denoised = x - sigma * _velocity_at(velocity, x, sigma)
    previous = state.get("denoised")
    state["denoised"] = denoised
    if following == 0:
        return denoised
    if sigma >= 1:  # lambda is -inf there: first order
        return following * x / sigma + (1 - following) * denoised - following * (1 - sigma) / sigma * denoised
    span = _log_snr(following) - _log_snr(sigma)
    estimate = denoised
    if previous is not None and sigmas[step - 1] < 1:
        ratio = (_log_snr(sigma) - _log_snr(sigmas[step - 1])) / span
        estimate = denoised + (denoised - previous) / (2 * ratio)
    return following / sigma * x - (1 - following) * math.expm1(-span) * estimate


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
