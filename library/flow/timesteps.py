"""Rectified flow: which timesteps are drawn, how noise is mixed in, how errors are weighted. Open this file first.

The loss itself is in loss.py; samplers.py integrates the same path from noise to an image.

The straight path from an image to noise is x_t = (1 - sigma) * x0 + sigma * eps with sigma = t / 1000, and the model
predicts the velocity v = eps - x0 along it (Esser et al. 2024, "Scaling Rectified Flow Transformers", sections 2 and 3).

sd-scripts takes its loss on x0_hat = x_t - sigma * v and weights it by w(sigma). Since x0_hat - x0 = -sigma * (v - v*),
everything here is said of the velocity residual r = v - v* instead: `residual_scale` is what r is multiplied by before
the loss function sees it, `loss_weight` is w(sigma) * scale^2. Both are finite for every sigma in 0..1, which w is not.

All functions are pure; timesteps are drawn on the CPU in float32, whatever device and dtype the model runs in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
REFERENCE_LATENT_AREA = 128 * 128  # 1024 x 1024 pixels, the size at which `resolution_shift` changes nothing

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "mode", "cosmap")
LOSS_WEIGHTINGS = ("x0", "velocity", "sigma_sqrt", "cosmap")

# What one weighting_scheme of sd-scripts says about both: (timestep_sampling, loss_weighting).
_SCHEME_MEANING = {
    "uniform": ("uniform", "x0"),
    "none": ("uniform", "x0"),
    "logit_normal": ("logit_normal", "x0"),
    "mode": ("mode", "x0"),
    "sigma_sqrt": ("uniform", "sigma_sqrt"),
    "cosmap": ("uniform", "cosmap"),
}
# Beyond these the mapping of "mode" is not monotonic and leaves 0..1 (Esser et al. 2024, section 3.1).
_MODE_SCALE_RANGE = (-1.0, 2.0 / (math.pi - 2.0))


@dataclass(frozen=True)
class FlowSettings:
    """How timesteps are drawn and how the loss is weighted over them.

    weighting_scheme: sd-scripts' choice, which names a density and a loss weight in one word.
    timestep_sampling: the density alone; None takes what weighting_scheme implies.
    loss_weighting: the loss weight alone; None takes what weighting_scheme implies.
        "x0": the loss on x0, which for l2 is the velocity loss weighted by sigma^2 (sd-scripts' `uniform`);
        "sigma_sqrt": the loss on x0 divided by sigma^2, which for l2 is the plain velocity loss;
        "cosmap": the loss on x0 times 2 / (pi * (1 - 2 sigma + 2 sigma^2));
        "velocity": the loss taken on the velocity itself, whatever the loss type: the SD3 paper's.
    logit_mean, logit_std: of the normal under "logit_normal". mode_scale: of "mode".
    training_shift: k in u -> k u / (1 + (k - 1) u); above 1 more noise is trained.
    resolution_shift: multiply k by sqrt(pixels / 1024^2), see `shift_for`.
    min_timestep, max_timestep: u in 0..1 is mapped onto this range, the upper end excluded.

    The SD3 paper's recipe is timestep_sampling="logit_normal", loss_weighting="velocity".
    """

    weighting_scheme: str = "uniform"
    timestep_sampling: str | None = None
    loss_weighting: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    training_shift: float = 1.0
    resolution_shift: bool = False
    min_timestep: int = 0
    max_timestep: int = TRAIN_TIMESTEPS

    @property
    def density(self) -> str:
        """The timestep density in force: one of TIMESTEP_SAMPLINGS."""
        return self.timestep_sampling or _SCHEME_MEANING[self.weighting_scheme][0]

    @property
    def weighting(self) -> str:
        """The loss weighting in force: one of LOSS_WEIGHTINGS."""
        return self.loss_weighting or _SCHEME_MEANING[self.weighting_scheme][1]


def check_flow(settings: FlowSettings) -> list[str]:
    """Return what is wrong with the settings, one sentence a problem; an empty list if nothing is."""
    problems = []
    for option, value, choices in (
        ("--weighting_scheme", settings.weighting_scheme, WEIGHTING_SCHEMES),
        ("--timestep_sampling", settings.timestep_sampling, (None, *TIMESTEP_SAMPLINGS)),
        ("--loss_weighting", settings.loss_weighting, (None, *LOSS_WEIGHTINGS)),
    ):
        if value not in choices:
            problems.append(f"{option}={value} is not known: choose one of {', '.join(filter(None, choices))}.")
    low, high = settings.min_timestep, settings.max_timestep
    if not 0 <= low < high <= TRAIN_TIMESTEPS:
        problems.append(
            f"--min_timestep={low} and --max_timestep={high}: they must satisfy 0 <= min < max <= {TRAIN_TIMESTEPS}."
        )
    if not (settings.training_shift > 0 and math.isfinite(settings.training_shift)):
        problems.append(f"--training_shift={settings.training_shift}: it must be above 0 (1 changes nothing).")
    if not math.isfinite(settings.logit_mean):
        problems.append(f"--logit_mean={settings.logit_mean}: it must be a finite number.")
    if not (settings.logit_std > 0 and math.isfinite(settings.logit_std)):
        problems.append(f"--logit_std={settings.logit_std}: it must be above 0.")
    lowest, highest = _MODE_SCALE_RANGE
    if not lowest <= settings.mode_scale <= highest:
        problems.append(f"--mode_scale={settings.mode_scale}: it must lie in {lowest:g}..{highest:.4g}.")
    return problems


# --- timesteps -------------------------------------------------------------------------------------------------


def sample_timesteps(
    settings: FlowSettings, count: int, generator: torch.Generator | None, latent_size: tuple[int, int] | None = None
) -> Tensor:
    """Draw `count` timesteps: float32 whole numbers on the CPU in min_timestep..max_timestep - 1, shape [count].

    `generator` is a CPU generator (None: torch's global one). `latent_size` (height, width in latent cells, 8 pixels
    each) is needed for resolution_shift alone. t = floor(u * (max - min) + min): the range remaps u, as in sd-scripts.
    """
    u = shift(sample_density(settings, count, generator), shift_for(settings, latent_size))
    low, high = settings.min_timestep, settings.max_timestep
    timesteps = torch.floor(u * (high - low) + low)
    return timesteps.clamp_(low, high - 1)  # u can round to 1 at the noisy end


def sample_density(settings: FlowSettings, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw u in 0..1 (1 is noise) from the density in force, before any shift: float32, shape [count].

    The densities are those of Esser et al. 2024, section 3.1: logit_normal eq. 19, mode eq. 20, cosmap eq. 21.
    """
    density = settings.density
    if density == "logit_normal":
        normal = torch.randn(count, generator=generator)
        return torch.sigmoid(settings.logit_mean + settings.logit_std * normal)
    uniform = torch.rand(count, generator=generator)
    if density == "uniform":
        return uniform
    if density == "mode":
        bend = torch.cos(math.pi / 2 * uniform).square() - 1 + uniform
        return (1 - uniform - settings.mode_scale * bend).clamp_(0, 1)
    if density == "cosmap":
        return 1 - 1 / (torch.tan(math.pi / 2 * uniform) + 1)
    raise ValueError(f"unknown timestep density {density!r}")


def shift(u: Tensor, k: float) -> Tensor:
    """u -> k u / (1 + (k - 1) u): more noise for k above 1 (Esser et al. 2024, eq. 23). Shifts compose by product."""
    return k * u / (1 + (k - 1) * u)


def shift_for(settings: FlowSettings, latent_size: tuple[int, int] | None) -> float:
    """The shift k for images of this size: training_shift, times sqrt(m / n) with resolution_shift.

    Esser et al. 2024, section 5.3.2: an image of m pixels needs t_m = a t_n / (1 + (a - 1) t_n) with a = sqrt(m / n) to
    be as uncertain as one of n pixels is at t_n. n is 1024 x 1024 here, the size SD3 was finished at, so that 512 x 512
    is trained with k = 0.5 (less noise hides as much of a small image) and 1024 x 1024 with k = 1.
    """
    if not settings.resolution_shift:
        return settings.training_shift
    if latent_size is None:
        raise ValueError("resolution_shift needs the latent size")
    height, width = latent_size
    return settings.training_shift * math.sqrt(height * width / REFERENCE_LATENT_AREA)


def validation_timesteps(settings: FlowSettings, count: int = 4) -> list[int]:
    """The fixed timesteps of a validation pass: `count` inner points, evenly spread (200, 400, 600, 800 by default)."""
    low, high = settings.min_timestep, settings.max_timestep
    return [low + (high - low) * index // (count + 1) for index in range(1, count + 1)]


# --- noise and targets -----------------------------------------------------------------------------------------


def sigmas(timesteps: Tensor) -> Tensor:
    """sigma = t / 1000 in float32, the share of noise in x_t."""
    return timesteps.float() / TRAIN_TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) * x0 + sigma * eps: latents and noise [B, ...], sigma [B] on their device; float32."""
    mix = per_sample(sigma.float(), latents)
    return (1 - mix) * latents.float() + mix * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """v* = eps - x0, the derivative of the path, float32."""
    return noise.float() - latents.float()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] so that it broadcasts over `like` [B, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


# --- loss weights ----------------------------------------------------------------------------------------------


def residual_scale(settings: FlowSettings, sigma: Tensor) -> Tensor:
    """What the velocity residual is multiplied by before the loss function: 1 for "velocity", else sigma (x0 space)."""
    sigma = sigma.float()
    return torch.ones_like(sigma) if settings.weighting == "velocity" else sigma


def loss_weight(settings: FlowSettings, sigma: Tensor) -> Tensor:
    """The weight of the squared velocity residual, w(sigma) * residual_scale(sigma)^2, float32, finite everywhere.

    x0: sigma^2. velocity and sigma_sqrt: 1. cosmap: sigma^2 * 2 / (pi * (1 - 2 sigma + 2 sigma^2)), whose denominator
    is at least 1/2. sigma_sqrt's own w = sigma^-2 is never formed, since it is infinite at t = 0.
    """
    sigma = sigma.float()
    weighting = settings.weighting
    if weighting == "x0":
        return sigma.square()
    if weighting in ("velocity", "sigma_sqrt"):
        return torch.ones_like(sigma)
    if weighting == "cosmap":
        return sigma.square() * (2 / math.pi) / (1 - 2 * sigma + 2 * sigma.square())
    raise ValueError(f"unknown loss weighting {weighting!r}")
