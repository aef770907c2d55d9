"""What a family of models (SD3 is one) gives to the trainer beside its denoiser: text encoders and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

Batches = Iterable[Sequence[str]]


class TextEncoders(Protocol):
    """The text encoders of a run, each loaded on first use."""

    @property
    def present(self) -> Sequence[str]: ...

    def fingerprint(self, names: Sequence[str]) -> str:
        """Changes with all that the outputs of these encoders depend on beside the captions."""

    def precompute(
        self, captions: Sequence[str], names: Sequence[str], batch_size: int, wrap: Callable[[Batches], Batches] = ...
    ) -> list[dict[str, Tensor]]:
        """The outputs of the named encoders for each caption, on the CPU; encoders that were not loaded before are freed."""

    def model(self, name: str) -> nn.Module: ...


class NoTextEncoders:
    """The text encoders of a family that has none."""

    present: Sequence[str] = ()

    def fingerprint(self, names: Sequence[str]) -> str:
        return ""

    def precompute(
        self, captions: Sequence[str], names: Sequence[str], batch_size: int, wrap: Callable[[Batches], Batches] = iter
    ) -> list[dict[str, Tensor]]:
        return [{} for _ in captions]

    def model(self, name: str) -> nn.Module:
        raise KeyError(name)


class LatentCodec(Protocol):
    """The autoencoder: images [B, 3, H, W] in -1..1 to latents [B, C, h, w] and back. Loaded on first use."""

    @property
    def fingerprint(self) -> str:
        """Changes with all that latents depend on beside the image."""

    def latent_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """The shape of the latents of `images`, and of the noise that `encode` takes."""

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Raw latents: a draw from the posterior with standard normal `noise`."""

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents -> the denoiser's."""

    def decode(self, latents: Tensor) -> Tensor:
        """The denoiser's latents -> images."""

    def release(self, keep_on_cpu: bool) -> None:
        """Release the device's memory, where the VAE is not to stay on it; all memory, unless it is to wait on the CPU."""
