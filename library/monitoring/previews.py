"""Preview images while training goes on.

They do not change the training: noise comes from a generator of its own, the random states of torch, numpy and Python are
restored, the LoRA's dropout is off while they are made.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from library.common.files import atomic_write
from library.common.progress import progress_bar
from library.common.seeds import preserve_rng_state
from library.data.prompts import PreviewPrompt
from library.flow.samplers import Velocity, guided, preview_sigmas, sample
from library.training.callback_settings import PreviewSettings

logger = logging.getLogger(__name__)
C = TypeVar("C")
"""The conditioning that the model family's `predict` takes."""


@dataclass(frozen=True)
class Preview:
    index: int
    prompt: PreviewPrompt
    path: Path


class Previewer(Generic[C]):
    """Makes previews of a fixed list of prompts."""

    def __init__(
        self,
        prompts: Sequence[PreviewPrompt],
        settings: PreviewSettings,
        conditioning: Callable[[PreviewPrompt, str], C],
        predict: Callable[[Tensor, Tensor, C], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        join: Callable[[C, C], C] | None = None,
    ):
        """conditioning: (prompt, text) -> the conditioning for `predict`; the text is the prompt's own or its negative.

        predict: (latents, timesteps, conditioning) -> velocity. decode: normalised latents [1, C, h, w] -> images [1, 3, H, W] in
        -1..1. join: two conditionings as one of a batch of two; None: guidance always predicts one after the other.
        """
        self.prompts, self.settings = list(prompts), settings
        self.conditioning, self.predict, self.decode = conditioning, predict, decode
        self.device, self.join = device, join

    def make(self, tag: str, modules: Sequence[nn.Module]) -> list[Preview]:
        """Make this rank's share of the previews. tag: "e000001" or "000100", see `step_tag`. modules: put in eval mode meanwhile."""
        previews: list[Preview] = []
        with preserve_rng_state(modules):
            own = list(enumerate(self.prompts))[self.settings.rank :: self.settings.world_size]
            for index, prompt in progress_bar(own, "Previews", shown=self.settings.rank == 0):
                try:
                    previews.append(self._make_one(index, prompt, tag))
                except OSError as error:  # a full disk, say: a preview is not worth the run
                    logger.warning("Preview %d cannot be written (%s); training goes on", index, error)
        return previews

    def _make_one(self, index: int, prompt: PreviewPrompt, tag: str) -> Preview:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        seed = random.randrange(2**32) if prompt.seed is None else prompt.seed
        pixels = self.decode(self._latents(prompt, seed))[0]
        array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(np.ascontiguousarray(array))
        path = self.settings.folder / "sample" / self._file_name(index, prompt, tag)
        info = PngInfo()
        info.add_itxt("parameters", self._parameters(prompt, seed))
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
        logger.info("Preview: %s", path)
        return Preview(index, prompt, path)

    def _latents(self, prompt: PreviewPrompt, seed: int) -> Tensor:
        """Noise is drawn on the CPU, so that a seed means the same picture on every device."""
        generator = torch.Generator().manual_seed(seed)
        cell = self.settings.scale_factor
        shape = (1, self.settings.latent_channels, prompt.height // cell, prompt.width // cell)
        noise = torch.randn(shape, generator=generator).to(self.device)
        with torch.no_grad():
            positive = self.conditioning(prompt, prompt.prompt)
            if prompt.guidance != 1:
                velocity = self._guided(prompt, positive, self.conditioning(prompt, prompt.negative_prompt))
            else:
                velocity = self._velocity(positive)
            sigmas = preview_sigmas(prompt.steps, prompt.shift)
            return sample(velocity, noise, sigmas, prompt.sampler or self.settings.sampler)

    def _velocity(self, conditioning: C) -> Velocity:
        return lambda x, timesteps: self.predict(x, timesteps, conditioning)

    def _guided(self, prompt: PreviewPrompt, positive: C, negative: C) -> Velocity:
        """Guidance, in one batch of two where training's own batches are as large, so that the memory suffices."""
        if self.join is None or 2 * prompt.width * prompt.height > self.settings.max_batch_pixels:
            return guided(self._velocity(positive), self._velocity(negative), prompt.guidance)
        both = self.join(negative, positive)

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            without, towards = self.predict(x.repeat(2, 1, 1, 1), timesteps.repeat(2), both).float().chunk(2)
            return torch.lerp(without, towards, prompt.guidance)

        return velocity

    def _file_name(self, index: int, prompt: PreviewPrompt, tag: str) -> str:
        name = f"{self.settings.name}_" if self.settings.name else ""
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        return f"{name}{tag}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"

    def _parameters(self, prompt: PreviewPrompt, seed: int) -> str:
        """The text that viewers of generated images know, one block."""
        sampler = prompt.sampler or self.settings.sampler
        return (
            f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\nSteps: {prompt.steps}, Sampler: {sampler}, "
            f"CFG scale: {prompt.guidance}, Seed: {seed}, Size: {prompt.width}x{prompt.height}, Shift: {prompt.shift}"
        )
