"""The 16-channel VAE of Stable Diffusion 3: images to latents of an eighth of the side, and back.

The layout is that of the latent-diffusion autoencoder (Rombach et al. 2022, appendix G) without the 1x1 quant convolutions.
Module paths are the checkpoint's key paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.sd3.checkpoint_checks import count_layers

LATENT_SCALE = 1.5305
LATENT_SHIFT = 0.0609


def normalize(raw: Tensor) -> Tensor:
    """Latents as the VAE gives them -> latents as the denoiser sees them."""
    return (raw - LATENT_SHIFT) * LATENT_SCALE


def denormalize(latents: Tensor) -> Tensor:
    """The inverse of `normalize`."""
    return latents / LATENT_SCALE + LATENT_SHIFT


@dataclass(frozen=True)
class VaeConfig:
    base_channels: int
    multipliers: tuple[int, ...]  # width of each level in units of base_channels
    res_blocks: int  # of an encoder level; a decoder level has one more
    latent_channels: int

    @property
    def norm_groups(self) -> int:
        """Groups of every GroupNorm: 32 at real widths; the weights do not tell, so narrow demo models take a quarter of the base width."""
        return max(1, min(32, self.base_channels // 4))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VaeConfig:
        """Read the sizes from tensor shapes keyed by name (without `first_stage_model.`). KeyError where one is absent; a level that is absent is 0 wide."""
        base = shapes["encoder.conv_in.weight"][0]
        levels = count_layers(r"encoder\.down\.(\d+)\.", shapes)
        widths = [shapes.get(f"encoder.down.{level}.block.0.conv1.weight", (0,))[0] for level in range(levels)]
        return cls(
            base_channels=base,
            multipliers=tuple(width // base for width in widths),
            res_blocks=sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(16)),
            latent_channels=shapes["decoder.conv_in.weight"][1],
        )

    def problems(self) -> list[str]:
        """Why no VAE can be made of these sizes: a sentence each, for the file's user."""
        problems = []
        if 0 in self.multipliers:
            level = self.multipliers.index(0)
            problems.append(
                f"the VAE has keys of {len(self.multipliers)} levels, but encoder.down.{level} is missing or too narrow."
            )
        if self.base_channels % self.norm_groups:
            problems.append(f"the VAE's base width {self.base_channels} is no multiple of {self.norm_groups}.")
        if not self.res_blocks:
            problems.append("the VAE's encoder.down.0 has no block.")
        return problems


def group_norm(config: VaeConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, config: VaeConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = (self.nin_shortcut(x) if self.has_shortcut else x) + hidden
        return out


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the smallest feature map."""

    def __init__(self, config: VaeConfig, channels: int):
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = (
            layer(hidden).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )  # [B, 1, h*w, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class MidBlock(nn.Module):
    def __init__(self, config: VaeConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = AttnBlock(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next."""

    def __init__(self, config: VaeConfig, in_channels: int, out_channels: int, blocks: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(config, a, b) for a, b in pairwise(widths))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(zip([config.base_channels, *widths], widths)):
            level = Level(config, before, width, config.res_blocks)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = MidBlock(config, widths[-1])
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(config, widths[-1])
        levels = []
        for index in reversed(range(len(widths))):
            level = Level(config, widths[min(index + 1, len(widths) - 1)], widths[index], config.res_blocks + 1)
            if index > 0:
                level.upsample = Upsample(widths[index])
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the largest resolution, and runs last
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Vae(nn.Module):
    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in -1..1, H and W multiples of 8 -> mean and log variance, each [B, 16, H/8, W/8] float32, not normalized."""
        mean, log_variance = self.encoder(images.to(self.dtype)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, raw: Tensor) -> Tensor:
        """raw latents [B, 16, h, w] (see `denormalize`) -> images [B, 3, 8h, 8w] float32, about -1..1."""
        images: Tensor = self.decoder(raw.to(self.dtype)).float()
        return images


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw from the encoder's Gaussian; noise ~ N(0, 1) of mean's shape."""
    return mean + torch.exp(0.5 * log_variance) * noise
