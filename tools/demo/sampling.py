"""Pictures from the demo model, for looking at it while it is trained: Euler steps with guidance, and a sheet of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.sd3.conditioning import to_context
from library.sd3.mmdit import MMDiT
from library.flow.samplers import preview_sigmas
from library.flow.samplers import sample as integrate
from library.sd3.text_encoder_sizes import CLIP_TOKENS
from library.sd3.tokenizers import Tokenizers
from library.sd3.vae import Vae, denormalize
from tools.demo.denoiser_training import context_sizes, encode
from tools.demo.scenes import SIDE
from tools.demo.text_training import TextEncoders

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def sample(
    prompts: Sequence[str],
    mmdit: MMDiT,
    vae: Vae,
    encoders: TextEncoders,
    tokenizers: Tokenizers,
    *,
    steps: int = 20,
    guidance: float = 4.0,
    shift: float = 3.0,
    seed: int = 0,
    t5_tokens: int = 32,
) -> list[Image]:
    """One picture a prompt, from noise of consecutive seeds."""
    sizes = context_sizes(CLIP_TOKENS, t5_tokens)
    both = [*prompts, *[""] * len(prompts)]
    context, pooled = to_context(encode(both, encoders, tokenizers, t5_tokens=t5_tokens), sizes, "cpu", torch.float32)
    noises = [
        torch.randn(16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(seed + i))
        for i in range(len(prompts))
    ]

    def guided(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        both = mmdit(torch.cat([x, x]), torch.cat([timesteps, timesteps]), context, pooled).float()
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    latents = integrate(guided, torch.stack(noises), preview_sigmas(steps, shift), "euler")
    return [to_image(pixels) for pixels in vae.decode(denormalize(latents))]


def to_image(pixels: torch.Tensor) -> Image:
    """[3, H, W] in -1..1 -> RGB."""
    from PIL import Image

    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def sheet(images: Sequence[Image], columns: int, zoom: int = 2, gap: int = 4) -> Image:
    """Pictures of one size in rows, magnified."""
    from PIL import Image

    width, height = images[0].width * zoom + gap, images[0].height * zoom + gap
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        large = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
        page.paste(large, (index % columns * width, index // columns * height))
    return page
