"""Our VAE gives what diffusers' AutoencoderKL gives on the same weights."""

from __future__ import annotations

import pytest
import torch

from library.sd3.vae import Vae, VaeConfig, denormalize, normalize, sample_posterior
from tests.sd3.diffusers_models import diffusers_vae, randomised

CONFIG = VaeConfig(base_channels=16, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=16)


@pytest.fixture(scope="module")
def vae() -> Vae:
    return randomised(Vae(CONFIG))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 72), (48, 24)])
def test_encode_equals_diffusers(vae: Vae, height: int, width: int):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, log_variance = vae.encode(images)
    theirs = diffusers_vae(vae).encode(images).latent_dist
    assert mean.shape == (2, 16, height // 8, width // 8)
    torch.testing.assert_close(mean, theirs.mean, rtol=1e-5, atol=1e-5 * theirs.mean.abs().max().item())
    torch.testing.assert_close(log_variance, theirs.logvar, rtol=1e-5, atol=1e-5 * theirs.logvar.abs().max().item())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = theirs.sample(generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample_posterior(mean, log_variance, noise), drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 9)])
def test_decode_equals_diffusers(vae: Vae, height: int, width: int):
    latents = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(2))
    theirs = diffusers_vae(vae).decode(latents, return_dict=False)[0]
    torch.testing.assert_close(vae.decode(latents), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_normalising_is_undone():
    raw = torch.randn(3, 16, 2, 2)
    torch.testing.assert_close(denormalize(normalize(raw)), raw)


def test_sizes_are_read_from_shapes(vae: Vae):
    assert VaeConfig.from_shapes({key: tuple(t.shape) for key, t in vae.state_dict().items()}) == CONFIG


def test_real_width_has_32_groups_and_the_published_size():
    config = VaeConfig(base_channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=16)
    with torch.device("meta"):
        real = Vae(config)
    assert config.norm_groups == 32
    assert sum(p.numel() for p in real.parameters()) == 83_819_683
