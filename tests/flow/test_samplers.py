"""Samplers integrate the flow: exactly where it is straight, with their order of convergence where it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from library.flow.samplers import guided, preview_sigmas, sample
from library.sd3.mmdit import MMDiT
from tests.sd3.diffusers_models import diffusers_transformer, diffusers_vae, randomised
from tests.sd3.test_mmdit import inputs, tiny_config

NAMES = ("euler", "heun", "dpmpp_2m")


def test_the_schedule_is_the_one_of_the_formula():
    assert preview_sigmas(4).tolist() == pytest.approx([1, 0.8577, 0.6022, 0.0089, 0], abs=1e-4)
    assert preview_sigmas(1).tolist() == [1, 0]
    assert preview_sigmas(5, shift=1.0)[:-1].tolist() == pytest.approx([1, 0.75025, 0.5005, 0.25075, 0.001], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_straight_flow_is_integrated_exactly(name: str):
    target, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    found = sample(lambda x, t: noise - target, noise, preview_sigmas(5), name)
    torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)


def gaussian_velocity(spread: float):
    """The exact field for data ~ N(0, spread^2): a draw of noise z ends at spread * z."""

    def velocity(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = (timesteps / 1000).double().view(-1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return (x.double() * (sigma - (1 - sigma) * spread**2) / variance).float()

    return velocity


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(name: str, order: int):
    """Between sigma 0.95 and 0.05, where no step is singular; the field carries x in proportion to the spread of the mixture."""

    def spread_at(sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * 0.25 + sigma**2)

    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (20, 80):
        sigmas = torch.linspace(0.95, 0.05, steps + 1)
        exact = 0.95 * spread_at(0.05) / spread_at(0.95)
        errors.append(abs(sample(gaussian_velocity(0.5), noise, sigmas, name).item() - exact))
    assert math.log(errors[0] / errors[1], 4) > order - 0.2


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_schedule_is_that_of_diffusers(steps: int):
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(preview_sigmas(steps, shift), scheduler.sigmas, rtol=0, atol=1e-6)


def stepped(scheduler: Any, noise: torch.Tensor) -> torch.Tensor:
    """What a scheduler of diffusers makes of `noise` in a curved field."""
    x, velocity = noise, gaussian_velocity(0.5)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(velocity(x, 1000 * sigma.reshape(1)), timestep, x).prev_sample
    return x


def test_heun_equals_diffusers_scheduler():
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(9)
    noise = torch.randn(2, 4, 3, 3)
    ours = sample(gaussian_velocity(0.5), noise, preview_sigmas(9), "heun")
    torch.testing.assert_close(ours, stepped(scheduler, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_equals_diffusers_scheduler(steps: int):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 4, 3, 3)
    ours = sample(gaussian_velocity(0.5), noise / scheduler.sigmas[0], scheduler.sigmas, "dpmpp_2m")
    torch.testing.assert_close(ours, stepped(scheduler, noise), rtol=1e-5, atol=1e-5)


def test_guidance_is_linear_in_the_two_predictions():
    up, down = torch.ones(1), -torch.ones(1)
    assert guided(lambda x, t: up, lambda x, t: down, 4.0)(up, up).item() == -1 + 4 * 2
    assert guided(lambda x, t: up, lambda x, t: down, 1.0)(up, up).item() == 1


def test_euler_equals_diffusers_pipeline():
    """The whole preview, from noise and prompt embeddings to the latent, against StableDiffusion3Pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from library.sd3.vae import Vae, VaeConfig

    model = randomised(MMDiT(tiny_config(qk_norm=True)))
    reference = diffusers_transformer(model)
    vae = diffusers_vae(randomised(Vae(VaeConfig(16, (1, 2, 4, 4), 2, 16))))
    pipeline = StableDiffusion3Pipeline(
        transformer=reference,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    given, empty = inputs(model.config, 8, 8), inputs(model.config, 8, 8)
    empty["context"], empty["pooled"] = empty["context"] * 0.3, empty["pooled"] * 0.3
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        height=64,
        width=64,
        num_inference_steps=7,
        guidance_scale=4.0,
        latents=noise.clone(),
        prompt_embeds=given["context"],
        pooled_prompt_embeds=given["pooled"],
        negative_prompt_embeds=empty["context"],
        negative_pooled_prompt_embeds=empty["pooled"],
        output_type="latent",
    ).images
    velocity = guided(
        lambda x, t: model(x, t, given["context"], given["pooled"]),
        lambda x, t: model(x, t, empty["context"], empty["pooled"]),
        4.0,
    )
    ours = sample(velocity, noise, preview_sigmas(7), "euler")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
