"""Flow settings: densities against their formulas, the mapping to timesteps, noise, and finite loss weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from library.flow import timesteps as flow
from library.flow.timesteps import FlowSettings

SAMPLES = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logit_normal_cdf(mean, std):
    return lambda u: stats.norm.cdf(np.log(u / (1 - u)), mean, std)


def mode_cdf(scale):
    r = np.linspace(0, 1, 100_001)
    u = 1 - r - scale * (np.cos(np.pi * r / 2) ** 2 - 1 + r)  # falls from 1 to 0 as r rises
    return lambda x: 1 - np.interp(x, u[::-1], r[::-1])


DENSITIES = [
    (FlowSettings(), lambda u: u),
    (FlowSettings(weighting_scheme="sigma_sqrt"), lambda u: u),
    (FlowSettings(weighting_scheme="none"), lambda u: u),
    (FlowSettings(weighting_scheme="cosmap"), lambda u: u),
    (FlowSettings(weighting_scheme="logit_normal"), logit_normal_cdf(0, 1)),
    (FlowSettings(timestep_sampling="logit_normal", logit_mean=-0.7, logit_std=0.5), logit_normal_cdf(-0.7, 0.5)),
    (FlowSettings(weighting_scheme="mode"), mode_cdf(1.29)),
    (FlowSettings(timestep_sampling="mode", mode_scale=-0.8), mode_cdf(-0.8)),
    # the integral of 2 / (pi (1 - 2t + 2t^2)) from 0
    (FlowSettings(timestep_sampling="cosmap"), lambda u: 2 / np.pi * (np.arctan(2 * u - 1) + np.pi / 4)),
]


@pytest.mark.parametrize(("settings", "cdf"), DENSITIES, ids=lambda value: getattr(value, "density", ""))
def test_density_follows_its_formula(settings, cdf):
    u = flow.sample_density(settings, SAMPLES, seeded()).double().numpy()
    assert stats.kstest(u, cdf).pvalue > 0.01


def test_another_density_is_told_apart():
    """The test above can fail: logit-normal samples are not uniform, nor mode(1.29) samples mode(0.8)."""
    u = flow.sample_density(FlowSettings(weighting_scheme="logit_normal"), SAMPLES, seeded()).double().numpy()
    assert stats.kstest(u, lambda x: x).pvalue < 1e-6
    u = flow.sample_density(FlowSettings(weighting_scheme="mode"), SAMPLES, seeded()).double().numpy()
    assert stats.kstest(u, mode_cdf(0.8)).pvalue < 1e-6


@pytest.mark.parametrize("k", [1 / 3, 1.0, 3.0])
def test_training_shift_moves_the_density_as_the_formula_says(k):
    u = flow.shift(flow.sample_density(FlowSettings(), SAMPLES, seeded()), k).double().numpy()
    assert stats.kstest(u, lambda x: x / (k - (k - 1) * x)).pvalue > 0.01  # the inverse of the shift


def test_shift_three_has_the_mean_that_was_measured_in_the_original():
    t = flow.sample_timesteps(FlowSettings(training_shift=3.0), SAMPLES, seeded())
    assert t.mean().item() == pytest.approx(676, abs=5)


@given(
    scheme=st.sampled_from(flow.WEIGHTING_SCHEMES),
    sampling=st.sampled_from((None, *flow.TIMESTEP_SAMPLINGS)),
    k=st.floats(0.01, 100),
    low=st.integers(0, 999),
    span=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
)
def test_timesteps_are_whole_float32_numbers_of_the_range(scheme, sampling, k, low, span, seed):
    high = min(low + span, 1000)
    settings = FlowSettings(scheme, sampling, training_shift=k, logit_std=4.0, min_timestep=low, max_timestep=high)
    t = flow.sample_timesteps(settings, 64, seeded(seed))
    assert t.dtype == torch.float32 and t.device.type == "cpu" and t.shape == (64,)
    assert torch.equal(t, t.floor()) and t.min() >= low and t.max() <= high - 1


def test_range_remaps_the_density_instead_of_cutting_it():
    whole = flow.sample_timesteps(FlowSettings("logit_normal"), SAMPLES, seeded())
    part = flow.sample_timesteps(FlowSettings("logit_normal", min_timestep=200, max_timestep=700), SAMPLES, seeded())
    assert torch.allclose(part, whole * 0.5 + 200, atol=1.01)


def test_every_timestep_can_be_drawn_in_float32():
    t = flow.sample_timesteps(FlowSettings(), 30_000, seeded())
    assert len(t.unique()) == 1000  # bf16 would leave about 450


def test_timesteps_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = flow.sample_timesteps(FlowSettings("logit_normal"), 8, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, flow.sample_timesteps(FlowSettings("logit_normal"), 8, seeded(5)))
    assert not torch.equal(first, flow.sample_timesteps(FlowSettings("logit_normal"), 8, seeded(6)))


def test_resolution_shift_is_the_paper_s_root_of_the_area_ratio():
    settings = FlowSettings(resolution_shift=True, training_shift=3.0)
    assert flow.shift_for(settings, (128, 128)) == pytest.approx(3.0)
    assert flow.shift_for(settings, (64, 64)) == pytest.approx(1.5)
    assert flow.shift_for(settings, (96, 192)) == pytest.approx(3.0 * math.sqrt(768 * 1536 / 1024**2))
    assert flow.shift_for(FlowSettings(training_shift=3.0), (64, 64)) == 3.0
    with pytest.raises(ValueError, match="latent size"):
        flow.shift_for(settings, None)
    # eq. 23 of the paper: both sizes are equally uncertain, i.e. sigma / (1 - sigma) / sqrt(pixels) is the same
    t_small = flow.shift(torch.tensor([0.3], dtype=torch.float64), 0.5)
    assert (t_small / (1 - t_small) / 512).item() == pytest.approx(0.3 / 0.7 / 1024)


def test_resolution_shift_reaches_the_timesteps():
    settings = FlowSettings(resolution_shift=True)
    small = flow.sample_timesteps(settings, SAMPLES, seeded(), latent_size=(64, 64))
    large = flow.sample_timesteps(settings, SAMPLES, seeded(), latent_size=(128, 128))
    assert small.mean() < large.mean() - 50


def test_validation_timesteps_are_the_original_s():
    assert flow.validation_timesteps(FlowSettings()) == [200, 400, 600, 800]
    for low, high in ((0, 1000), (37, 811), (900, 1000)):
        inner = np.linspace(low, high, 6)[1:-1].astype(int).tolist()
        assert flow.validation_timesteps(FlowSettings(min_timestep=low, max_timestep=high)) == inner


def test_noise_and_target_lie_on_the_straight_path():
    x0, eps = torch.randn(3, 16, 4, 6, generator=seeded()), torch.randn(3, 16, 4, 6, generator=seeded(1))
    sigma = flow.sigmas(torch.tensor([0.0, 333.0, 1000.0]))
    x_t = flow.add_noise(x0.bfloat16(), eps, sigma)
    expected = (1 - sigma.double())[:, None, None, None] * x0.bfloat16().double() + sigma.double()[
        :, None, None, None
    ] * eps.double()
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x_t[0], x0[0].bfloat16().float()) and torch.equal(x_t[2], eps[2])
    ahead, behind = flow.add_noise(x0, eps, sigma[1:2] + 0.1), flow.add_noise(x0, eps, sigma[1:2] - 0.1)
    torch.testing.assert_close((ahead - behind) / 0.2, flow.velocity_target(x0, eps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", flow.WEIGHTING_SCHEMES)
@pytest.mark.parametrize("weighting", [None, *flow.LOSS_WEIGHTINGS])
def test_loss_weights_are_finite_at_every_timestep(scheme, weighting):
    sigma = flow.sigmas(torch.arange(1001))
    settings = FlowSettings(scheme, loss_weighting=weighting)
    weight, scale = flow.loss_weight(settings, sigma), flow.residual_scale(settings, sigma)
    for values in (weight, scale):
        assert values.dtype == torch.float32 and torch.isfinite(values).all() and (values >= 0).all()


@pytest.mark.parametrize(
    ("scheme", "w"),
    [
        ("uniform", lambda s: 1.0),
        ("none", lambda s: 1.0),
        ("logit_normal", lambda s: 1.0),
        ("mode", lambda s: 1.0),
        ("sigma_sqrt", lambda s: s**-2),
        ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s**2))),
    ],
)
def test_weighting_scheme_keeps_its_meaning(scheme, w):
    """For l2 the weight of the velocity residual is sigma^2 * w(sigma)."""
    for t in (1, 250, 500, 999):
        sigma = t / 1000
        got = flow.loss_weight(FlowSettings(scheme), torch.tensor([sigma])).item()
        assert got == pytest.approx(sigma**2 * w(sigma), rel=1e-6)


def test_the_sd3_paper_s_recipe_can_be_said():
    recipe = FlowSettings(timestep_sampling="logit_normal", loss_weighting="velocity")
    assert recipe.density == "logit_normal" and recipe.weighting == "velocity"
    assert flow.check_flow(recipe) == []
    assert torch.equal(flow.loss_weight(recipe, torch.tensor([0.1, 0.9])), torch.ones(2))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weighting_scheme": "cosine"}, "--weighting_scheme"),
        ({"timestep_sampling": "sigmoid"}, "--timestep_sampling"),
        ({"loss_weighting": "snr"}, "--loss_weighting"),
        ({"min_timestep": -1}, "--min_timestep"),
        ({"max_timestep": 1001}, "--max_timestep"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ({"training_shift": 0.0}, "--training_shift"),
        ({"training_shift": math.nan}, "--training_shift"),
        ({"logit_std": 0.0}, "--logit_std"),
        ({"logit_mean": math.inf}, "--logit_mean"),
        ({"mode_scale": 1.8}, "--mode_scale"),
    ],
)
def test_bad_settings_are_named(change, word):
    (problem,) = flow.check_flow(FlowSettings(**change))
    assert word in problem


def test_unknown_names_never_pass_silently():
    with pytest.raises(ValueError, match="density"):
        flow.sample_density(FlowSettings(timestep_sampling="sigmoid"), 1, seeded())
    with pytest.raises(ValueError, match="weighting"):
        flow.loss_weight(FlowSettings(loss_weighting="snr"), torch.tensor([0.5]))
