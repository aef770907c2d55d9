"""Preview images while training goes on.

They leave training as they found it: noise comes from a generator of its own, the random states of torch, numpy and Python
are put back, the LoRA's dropout is off while they are made.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library.common.files import atomic_write
from library.common.progress import progress_bar
from library.common.seeds import preserve_rng_state
from library.data.prompts import PreviewPrompt
from library.flow.samplers import Velocity, guided, preview_sigmas, sample

logger = logging.getLogger(__name__)
LATENT_CELL = 8
Conditioned = Callable[[PreviewPrompt, str], Any]
"""(prompt, text) -> conditioning for `predict`; the text is the prompt's own or its negative."""


@dataclass(frozen=True)
class PreviewSettings:
    folder: Path  # output_dir
    name: str  # output_name
    sampler: str = "euler"
    rank: int = 0
    world_size: int = 1
    pixels_together: int = (
        0  # guidance predicts with and without the prompt in one batch where both images have no more
    )


@dataclass(frozen=True)
class Preview:
    index: int
    prompt: PreviewPrompt
    path: Path


class Previewer:
    """Makes previews of a fixed list of prompts."""

    def __init__(
        self,
        prompts: Sequence[PreviewPrompt],
        settings: PreviewSettings,
        conditioned: Conditioned,
        predict: Callable[[Tensor, Tensor, Any], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        joined: Callable[[Any, Any], Any] | None = None,
    ):
        """decode: normalised latents [1, 16, h, w] -> images [1, 3, 8h, 8w] in -1..1.

        joined: two conditionings as one of a batch of two; None: guidance always predicts one after the other.
        """
        self.prompts, self.settings = list(prompts), settings
        self.conditioned, self.predict, self.decode = conditioned, predict, decode
        self.device, self.joined = device, joined

    def make(self, when: str, modules: Sequence[nn.Module]) -> list[Preview]:
        """Make this process's share of the previews. when: "e000001" or "000100", see `moment`. modules: put in eval mode meanwhile."""
        previews: list[Preview] = []
        with preserve_rng_state(modules):
            own = list(enumerate(self.prompts))[self.settings.rank :: self.settings.world_size]
            for index, prompt in progress_bar(own, "Previews", shown=self.settings.rank == 0):
                try:
                    previews.append(self._make_one(index, prompt, when))
                except OSError as error:  # a full disk, say: a preview is not worth the run
                    logger.warning("Preview %d cannot be written (%s); training goes on", index, error)
        return previews

    def _make_one(self, index: int, prompt: PreviewPrompt, when: str) -> Preview:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        seed = random.randrange(2**32) if prompt.seed is None else prompt.seed
        pixels = self.decode(self._latents(prompt, seed))[0]
        array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(np.ascontiguousarray(array))
        path = self.settings.folder / "sample" / self._file_name(index, prompt, when)
        info = PngInfo()
        info.add_itxt("parameters", self._parameters(prompt, seed))
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
        logger.info("Preview: %s", path)
        return Preview(index, prompt, path)

    def _latents(self, prompt: PreviewPrompt, seed: int) -> Tensor:
        """Noise is drawn on the CPU, so that a seed means the same picture on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, 16, prompt.height // LATENT_CELL, prompt.width // LATENT_CELL)
        noise = torch.randn(shape, generator=generator).to(self.device)
        with torch.no_grad():
            wanted = self.conditioned(prompt, prompt.prompt)

            def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
                return self.predict(x, timesteps, wanted)

            flow: Velocity = velocity
            if prompt.guidance != 1:
                unwanted = self.conditioned(prompt, prompt.negative_prompt)
                flow = self._guided(prompt, wanted, unwanted)
            sigmas = preview_sigmas(prompt.steps, prompt.shift)
            return sample(flow, noise, sigmas, prompt.sampler or self.settings.sampler)

    def _guided(self, prompt: PreviewPrompt, wanted: Any, unwanted: Any) -> Velocity:
        """Guidance, in one batch of two where training's own batches are as large, so that the memory suffices."""
        if self.joined is None or 2 * prompt.width * prompt.height > self.settings.pixels_together:
            return guided(
                lambda x, t: self.predict(x, t, wanted), lambda x, t: self.predict(x, t, unwanted), prompt.guidance
            )
        both = self.joined(unwanted, wanted)

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            without, towards = self.predict(x.repeat(2, 1, 1, 1), timesteps.repeat(2), both).float().chunk(2)
            return torch.lerp(without, towards, prompt.guidance)

        return velocity

    def _file_name(self, index: int, prompt: PreviewPrompt, when: str) -> str:
        name = f"{self.settings.name}_" if self.settings.name else ""
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        return f"{name}{when}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"

    def _parameters(self, prompt: PreviewPrompt, seed: int) -> str:
        """The text that viewers of generated images know, one block."""
        sampler = prompt.sampler or self.settings.sampler
        return (
            f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\nSteps: {prompt.steps}, Sampler: {sampler}, "
            f"CFG scale: {prompt.guidance}, Seed: {seed}, Size: {prompt.width}x{prompt.height}, Shift: {prompt.shift}"
        )


def moment(step: int, epoch: int | None) -> str:
    """The part of a preview's name that says when it was made: e + epoch, or the step."""
    return f"{step:06d}" if epoch is None else f"e{epoch:06d}"
