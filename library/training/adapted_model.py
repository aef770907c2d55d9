"""The models of a run behind one object, as a training step uses them: autoencoder, conditioning, denoiser, adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from library.common.model_family import LatentCodec
from library.common.seeds import StepGenerators
from library.data.batch import Batch
from library.data.prompts import PreviewPrompt

C = TypeVar("C")  # what a model family conditions its denoiser on


class Conditioner(Protocol[C]):
    """Makes what the denoiser is conditioned on."""

    def of_batch(self, batch: Batch, generators: StepGenerators, training: bool) -> C:
        """Of a batch; text dropout and random crops act where `training`."""
        ...

    def of_prompt(self, prompt: PreviewPrompt, text: str, precomputed: Mapping[str, Tensor]) -> C:
        """Of a preview. text: the prompt or its negative prompt; precomputed: outputs of encoders that do not run in training."""
        ...

    def join(self, first: C, second: C) -> C:
        """Two conditionings of one image size as one batch."""
        ...


class Adapters(Protocol):
    """The trained network, as far as a step switches it."""

    @property
    def multiplier(self) -> float: ...

    def set_multiplier(self, multiplier: float) -> None: ...

    def disable_adapters(self) -> AbstractContextManager[object]: ...


@dataclass(frozen=True)
class AdaptedModel(Generic[C]):
    """Implements library.training.step.DiffusionModel."""

    codec: LatentCodec
    conditioner: Conditioner[C]
    predict: Callable[
        [Tensor, Tensor, C], Tensor
    ]  # noisy [B, C, h, w], timesteps [B], conditioning -> velocity [B, C, h, w]
    adapters: Adapters

    def batch_latents(self, batch: Batch, generators: StepGenerators) -> Tensor:
        """Normalized latents [B, C, h, w] float32: the batch's own, or its images encoded now."""
        raw = batch.latents
        if raw is None:
            assert batch.images is not None
            shape = self.codec.latent_shape(batch.images)
            noise = torch.randn(shape, generator=generators.device, device=batch.images.device)
            raw = self.codec.encode(batch.images, noise)
        return self.codec.normalize(raw)

    def conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> C:
        return self.conditioner.of_batch(batch, generators, training)

    def set_multiplier(self, multiplier: float) -> None:
        if multiplier != self.adapters.multiplier:
            self.adapters.set_multiplier(multiplier)

    def base_model(self) -> AbstractContextManager[object]:
        return self.adapters.disable_adapters()
