"""The loss against float64 references written as sd-scripts defines it (on x0), and its records."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from library.flow.loss import (
    HUBER_SCHEDULES,
    LOSS_TYPES,
    LossSettings,
    RunningLoss,
    TimestepLosses,
    check_loss,
    huber_threshold,
    resize_mask,
    training_loss,
)
from library.flow.timesteps import LOSS_WEIGHTINGS, WEIGHTING_SCHEMES, FlowSettings, add_noise, sigmas, velocity_target


def batch(timesteps, seed=0):
    """A batch with one sample a timestep: (velocity, latents, noise, sigma, x_t)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), 16, 4, 6)
    latents, noise, velocity = (torch.randn(shape, generator=generator) for _ in range(3))
    sigma = sigmas(torch.tensor(timesteps, dtype=torch.float32))
    return velocity, latents, noise, sigma, add_noise(latents, noise, sigma)


def reference_threshold(loss, t):
    if loss.huber_schedule == "constant":
        return loss.huber_c * loss.huber_scale
    if loss.huber_schedule == "exponential":
        return loss.huber_scale * math.exp(math.log(loss.huber_c) * t / 1000)
    noise_to_signal = (t / 1000) / (1 - t / 1000)
    return loss.huber_scale * ((1 - loss.huber_c) / (1 + noise_to_signal) ** 2 + loss.huber_c)


def reference_pointwise(p, q, c, kind):
    if kind == "l2":
        return (p - q) ** 2
    if kind == "l1":
        return abs(p - q)
    root = 2 * (np.sqrt((p - q) ** 2 + c**2) - c)
    return root * c if kind == "huber" else root


def reference_loss(velocity, latents, noise, x_t, t, weighting, loss):
    """One sample in float64, in the space that the definition names: x0_hat against x0, or velocities."""
    velocity, latents, noise, x_t = (tensor.double().numpy() for tensor in (velocity, latents, noise, x_t))
    sigma, c = t / 1000, reference_threshold(loss, t)
    if weighting == "velocity":
        return reference_pointwise(velocity, noise - latents, c, loss.loss_type).mean()
    w = {"x0": 1.0, "sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}[weighting]
    return w * reference_pointwise(x_t - sigma * velocity, latents, c, loss.loss_type).mean()


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
@pytest.mark.parametrize("schedule", HUBER_SCHEDULES)
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_loss_equals_the_float64_reference(kind, schedule, weighting):
    timesteps = [20, 250, 600, 999]
    loss = LossSettings(kind, schedule, huber_c=0.2, huber_scale=1.5)
    velocity, latents, noise, sigma, _ = batch(timesteps)
    got = training_loss(velocity, velocity_target(latents, noise), sigma, FlowSettings(loss_weighting=weighting), loss)
    assert got.dtype == torch.float32 and got.shape == (4,)
    for index, t in enumerate(timesteps):
        exact_x_t = (1 - t / 1000) * latents[index].double() + t / 1000 * noise[index].double()
        expected = reference_loss(velocity[index], latents[index], noise[index], exact_x_t, t, weighting, loss)
        assert got[index].item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_loss_and_gradient_are_finite_at_every_timestep(kind, scheme):
    timesteps = [0, 1, 500, 999, 1000]
    for schedule in HUBER_SCHEDULES:
        velocity, latents, noise, sigma, _ = batch(timesteps)
        velocity.requires_grad_()
        target = velocity_target(latents, noise)
        target[:, 0] = velocity[:, 0].detach()  # no error at all in a channel
        losses = training_loss(velocity, target, sigma, FlowSettings(scheme), LossSettings(kind, schedule))
        losses.sum().backward()
        assert torch.isfinite(losses).all() and torch.isfinite(velocity.grad).all()


@pytest.mark.parametrize("schedule", HUBER_SCHEDULES)
def test_huber_under_sigma_sqrt_tends_to_the_plain_velocity_loss_at_t_0(schedule):
    velocity, latents, noise, sigma, _ = batch([0])
    target = velocity_target(latents, noise)
    huber = training_loss(velocity, target, sigma, FlowSettings("sigma_sqrt"), LossSettings("huber", schedule))
    assert huber.item() == pytest.approx((velocity - target).square().mean().item(), rel=1e-5)


@given(c=st.floats(1e-3, 10), scale=st.floats(0.1, 10), sigma=st.floats(0, 1))
def test_thresholds_are_bounded(c, scale, sigma):
    for schedule in HUBER_SCHEDULES:
        got = huber_threshold(LossSettings("huber", schedule, c, scale), torch.tensor([sigma])).item()
        assert min(1, c) * scale * 0.999 <= got <= max(1, c) * scale * 1.001


def test_snr_threshold_falls_from_one_to_huber_c():
    got = huber_threshold(LossSettings("huber", "snr", 0.1), torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(got, torch.tensor([1.0, 0.9 / 4 + 0.1, 0.1]))


def test_mask_weighs_pixels_and_divides_by_all_of_them():
    velocity, latents, noise, sigma, _ = batch([300, 700])
    target = velocity_target(latents, noise)
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, :2] = 1.0
    got = training_loss(velocity, target, sigma, FlowSettings(), LossSettings(), mask)
    squared = sigma.square()[:, None, None, None] * (velocity - target).square()
    torch.testing.assert_close(got, squared[:, :, :2].sum((1, 2, 3)) / (16 * 4 * 6))


def test_mask_in_pixels_is_resized_by_area():
    mask = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    blocks = mask.reshape(2, 1, 4, 8, 6, 8).mean((3, 5))
    torch.testing.assert_close(resize_mask(mask, (4, 6)), blocks)
    velocity, latents, noise, sigma, _ = batch([300, 700])
    args = (velocity, velocity_target(latents, noise), sigma, FlowSettings(), LossSettings())
    torch.testing.assert_close(training_loss(*args, mask), training_loss(*args, blocks))


def test_sample_weights_scale_their_samples():
    velocity, latents, noise, sigma, _ = batch([300, 700])
    args = (velocity, velocity_target(latents, noise), sigma, FlowSettings(), LossSettings())
    plain = training_loss(*args)
    torch.testing.assert_close(
        training_loss(*args, sample_weights=torch.tensor([0.25, 2.0], dtype=torch.float64)),
        plain * torch.tensor([0.25, 2.0]),
    )


def test_half_precision_predictions_are_compared_in_float32():
    velocity, latents, noise, sigma, _ = batch([300, 700])
    target = velocity_target(latents, noise)
    args = (target, sigma, FlowSettings(), LossSettings())
    assert torch.equal(training_loss(velocity.bfloat16(), *args), training_loss(velocity.bfloat16().float(), *args))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (LossSettings("mse"), "--loss_type"),
        (LossSettings(huber_schedule="cosine"), "--huber_schedule"),
        (LossSettings(huber_c=0.0), "--huber_c"),
        (LossSettings(huber_scale=-1.0), "--huber_scale"),
    ],
)
def test_bad_loss_settings_are_named(settings, word):
    (problem,) = check_loss(settings)
    assert word in problem
    assert check_loss(LossSettings()) == []


@given(
    window=st.integers(1, 7),
    losses=st.lists(st.floats(0, 10, width=32), max_size=20),
    cut=st.integers(0, 20),
    new=st.integers(1, 9),
)
def test_running_loss_is_right_before_and_after_a_resume(window, losses, cut, new):
    running = RunningLoss(window)
    for value in losses[:cut]:
        running.add(torch.tensor(value))
    resumed = RunningLoss(new)
    resumed.load_state_dict(running.state_dict())
    carried = losses[:cut][-window:][-new:]
    for value in losses[cut:]:
        resumed.add(torch.tensor(value))
    last = (carried + losses[cut:])[-new:]
    assert resumed.mean().item() == pytest.approx(np.mean(last) if last else 0.0, rel=1e-5, abs=1e-6)


def test_timestep_losses_are_averaged_by_range():
    record = TimestepLosses(bins=4)
    record.add(torch.tensor([0.0, 249.0, 250.0, 999.0, 1000.0]), torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]))
    assert record.means() == [2.0, 5.0, None, 8.0]
    other = TimestepLosses(bins=4)
    other.load_state_dict(record.state_dict())
    assert other.means() == record.means()
    record.reset()
    assert record.means() == [None] * 4 and other.means()[0] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_steps_loss_spoils_no_average(bad: float):
    running, record = RunningLoss(3), TimestepLosses(bins=2)
    for loss in (1.0, bad, 3.0):
        running.add(torch.tensor(loss))
    record.add(torch.tensor([100.0, 200.0, 900.0]), torch.tensor([bad, 2.0, bad]))
    assert running.mean() == 2
    assert record.means() == [2.0, None]
