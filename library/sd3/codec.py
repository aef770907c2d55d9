"""The autoencoder at work: images to latents for training, latents to images for previews, loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.common.tensor_io import Part, fingerprint
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR
from library.sd3.models import load_vae
from library.sd3.vae import Vae, denormalize, normalize, sample_posterior


@dataclass(frozen=True)
class CodecSettings:
    dtype: torch.dtype  # of the VAE's weights
    batch_size: int = 1  # images encoded at once
    mmap: bool = True
    keep_on_device: bool = False  # between previews


class LatentCodec:
    """Encodes images and decodes latents with the VAE of `part`. Nothing is loaded until one of them is asked for."""

    def __init__(self, part: Part, settings: CodecSettings, device: torch.device):
        self.part, self.settings, self.device = part, settings, device
        self._vae: Vae | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with everything that latents depend on beside the image: the weights and their dtype."""
        return f"{fingerprint(self.part)};{self.settings.dtype}"

    @property
    def vae(self) -> Vae:
        if self._vae is None:
            self._vae = load_vae(self.part, self.device, self.settings.dtype, self.settings.mmap)
        return self._vae

    def latent_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """images [B, 3, H, W] -> (B, 16, H / 8, W / 8): the shape of the noise that `encode` takes."""
        batch, _, height, width = images.shape
        return batch, LATENT_CHANNELS, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """images [B, 3, H, W] in -1..1, noise [B, 16, H/8, W/8] -> raw latents [B, 16, H/8, W/8]: a draw from the posterior."""
        images, noise = images.to(self.device), noise.to(self.device)
        size = max(1, self.settings.batch_size)
        latents = []
        for chunk, chunk_noise in zip(images.split(size), noise.split(size)):
            mean, log_variance = self.vae.encode(chunk)
            latents.append(sample_posterior(mean, log_variance, chunk_noise))
        return torch.cat(latents)

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents -> the denoiser's latents: zero mean and unit variance over natural images."""
        return normalize(raw)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, 16, h, w] -> images [B, 3, 8h, 8w] in -1..1. The VAE goes back to CPU memory unless it is to stay."""
        with onload(self.vae, self.device, self.settings.keep_on_device):
            return self.vae.decode(denormalize(latents))

    def release(self, keep_on_cpu: bool) -> None:
        """Forget the VAE, or keep it on the CPU; a later call loads or moves it again."""
        if not keep_on_cpu:
            self._vae = None
        elif self._vae is not None and not self.settings.keep_on_device:
            offload_to_cpu(self._vae, self.device)


def offload_to_cpu(model: nn.Module, device: torch.device) -> None:
    """Move a model from `device` into host memory and release its device memory; do nothing where `device` is the CPU."""
    if device.type == "cpu":
        return
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def onload(model: nn.Module, device: torch.device, keep_resident: bool) -> Iterator[None]:
    """Inside, the model is on `device`; afterwards, also after an error, it is back in host memory, unless `keep_resident`."""
    model.to(device)
    try:
        yield
    finally:
        if not keep_resident:
            offload_to_cpu(model, device)
