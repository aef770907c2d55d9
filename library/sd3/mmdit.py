"""MMDiT, the denoiser of Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4 and figure 2;
the second image attention of 3.5 Medium follows the published SD3.5 reference model. Module paths are the key paths of
the released checkpoints, so a checkpoint loads without a mapping and LoRA names follow from the paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.sd3.mmdit_config import HEAD_SIZE, MMDiTConfig
from library.sd3.pos_embed import crop_pos_embed

TIMESTEP_FREQUENCIES = 256


Cheaply = Callable[..., Tensor]
"""(function, *inputs) -> function(*inputs), for a function whose result is cheap to compute again."""


def plainly(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The plain way to compute."""
    return function(*inputs)


class RMSNorm(nn.Module):
    """Root-mean-square norm of each query or key head (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """The projections around an attention; the attention itself joins two streams and stands in `JointBlock`."""

    def __init__(self, hidden_size: int, qk_norm: bool, pre_only: bool):
        super().__init__()
        self.num_heads = hidden_size // HEAD_SIZE
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = None if pre_only else nn.Linear(hidden_size, hidden_size)
        self.ln_q = RMSNorm(HEAD_SIZE) if qk_norm else None
        self.ln_k = RMSNorm(HEAD_SIZE) if qk_norm else None

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, L, D] -> three tensors [B, L, H, 64], not normalised yet."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, HEAD_SIZE)).unbind(2)

    @property
    def norms(self) -> tuple[RMSNorm | None, RMSNorm | None, None]:
        """Of queries, keys and values."""
        return self.ln_q, self.ln_k, None


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor, cheaply: Cheaply) -> Tensor:
        return self.fc2(cheaply(gelu_tanh, self.fc1(x)))


class SingleDiTBlock(nn.Module):
    """One stream's half of a joint block: adaLN modulation, projections and MLP (Peebles & Xie 2023, section 3.2)."""

    def __init__(self, config: MMDiTConfig, pre_only: bool, dual_attention: bool):
        super().__init__()
        hidden_size = config.hidden_size
        chunks = 2 if pre_only else 9 if dual_attention else 6
        self.attn = Attention(hidden_size, config.qk_norm, pre_only)
        self.attn2 = Attention(hidden_size, config.qk_norm, pre_only=False) if dual_attention else None
        self.mlp = None if pre_only else Mlp(hidden_size, config.mlp_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))
        self.chunks = chunks

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c [B, D], SiLU already applied -> `chunks` tensors [B, 1, D]: shift, scale, gate of the attention, of the MLP, of attn2."""
        return self.adaLN_modulation[1](c).unsqueeze(1).chunk(self.chunks, dim=-1)

    def after_attention(
        self,
        x: Tensor,
        mods: tuple[Tensor, ...],
        cheaply: Cheaply,
        attended: Tensor,
        attended2: Tensor | None = None,
    ) -> Tensor:
        """Residual stream x [B, L, D] and attention outputs [B, L, D] -> x after attention and MLP."""
        assert self.attn.proj is not None and self.mlp is not None
        x = add_gated(x, mods[2], self.attn.proj(attended))
        if self.attn2 is not None and attended2 is not None:
            assert self.attn2.proj is not None
            x = add_gated(x, mods[8], self.attn2.proj(attended2))
        return add_gated(x, mods[5], self.mlp(cheaply(normalise_and_modulate, x, mods[3], mods[4]), cheaply))


class JointBlock(nn.Module):
    """Two streams, text and image, that share one attention.

    `cheaply` is the seam through which library.memory learns what is cheap to compute again in the backward pass.
    """

    def __init__(self, config: MMDiTConfig, last: bool, dual_attention: bool):
        super().__init__()
        self.context_block = SingleDiTBlock(config, pre_only=last, dual_attention=False)
        self.x_block = SingleDiTBlock(config, pre_only=False, dual_attention=dual_attention)
        self.last = last
        self.cheaply: Cheaply = plainly

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, Lc, D], x [B, Lx, D], c [B, D] (after SiLU) -> both streams. The last block leaves context as it was."""
        cheaply, of_text, of_image = self.cheaply, self.context_block, self.x_block
        context_mods, x_mods = of_text.modulation(c), of_image.modulation(c)
        text = of_text.attn.queries_keys_values(
            cheaply(normalise_and_modulate, context, context_mods[0], context_mods[1])
        )
        image = of_image.attn.queries_keys_values(cheaply(normalise_and_modulate, x, x_mods[0], x_mods[1]))
        norms = zip(of_text.attn.norms, of_image.attn.norms)
        q, k, v = (cheaply(partial(join_normed, *pair), *both) for pair, both in zip(norms, zip(text, image)))
        attended = attention(q, k, v)  # over [B, Lc + Lx, H, 64]
        attended_text, attended_image = attended.split([context.shape[1], x.shape[1]], dim=1)
        attended2 = None
        if of_image.attn2 is not None:
            again = of_image.attn2.queries_keys_values(cheaply(normalise_and_modulate, x, x_mods[6], x_mods[7]))
            attended2 = attention(
                *(t if norm is None else cheaply(norm, t) for norm, t in zip(of_image.attn2.norms, again))
            )
        x = of_image.after_attention(x, x_mods, cheaply, attended_image, attended2)
        if not self.last:
            context = of_text.after_attention(context, context_mods, cheaply, attended_text)
        return context, x


class PatchEmbed(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, h/2 * w/2, D]


class VectorEmbedder(nn.Module):
    def __init__(self, in_size: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.linear = nn.Linear(hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(normalise_and_modulate(x, shift, scale))


BlockRunner = Callable[[int, JointBlock, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def call_block(index: int, block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way to run a block; library.memory puts others in its place."""
    return block(context, x, c)


class MMDiT(nn.Module):
    """The denoiser. Predicts the velocity eps - x0 of a noisy latent.

    `run_block` is the seam for memory savers (activation checkpointing, block swap, compilation): a function that runs
    one joint block. It is replaced as a whole, never patched.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = VectorEmbedder(TIMESTEP_FREQUENCIES, config.hidden_size)
        self.y_embedder = VectorEmbedder(config.pooled_size, config.hidden_size)
        self.context_embedder = nn.Linear(config.context_size, config.hidden_size)
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, config.hidden_size))
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, last=i == config.depth - 1, dual_attention=i in config.dual_attention_blocks)
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        self.run_block: BlockRunner = call_block

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in (quantised layers store others)."""
        return self.x_embedder.proj.weight.dtype

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, pos_embed: Tensor | None = None
    ) -> Tensor:
        """x [B, 16, h, w] noisy normalised latents, h and w even; timestep [B] float32 in 0..1000; context [B, L, 4096]; pooled
        [B, 2048] -> velocity [B, 16, h, w] in the model's dtype.

        pos_embed [1, h/2 * w/2, D] takes the place of the centre crop of the model's own table.
        """
        height, width = x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size
        if pos_embed is None:
            pos_embed = crop_pos_embed(cast(Tensor, self.pos_embed), height, width)
        dtype = self.dtype
        c = self.t_embedder(timestep_embedding(timestep).to(dtype)) + self.y_embedder(pooled.to(dtype))
        c = F.silu(c)
        # In float16 the residual streams of deep blocks pass 65504: they stay in float32, the products in float16.
        stream_dtype = torch.float32 if dtype == torch.float16 else dtype
        x = (self.x_embedder(x.to(dtype)) + pos_embed.to(dtype)).to(stream_dtype)
        context = self.context_embedder(context.to(dtype)).to(stream_dtype)
        for index, block in enumerate(self.joint_blocks):
            context, x = self.run_block(index, cast(JointBlock, block), context, x, c)
        return self.unpatchify(self.final_layer(x, c), height, width)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, height * width, patch * patch * C] -> [B, C, height * patch, width * patch]."""
        patch = self.config.patch_size
        x = x.unflatten(1, (height, width)).unflatten(-1, (patch, patch, self.config.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over [B, L, H, 64] -> [B, L, H * 64]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def join_normed(text_norm: RMSNorm | None, image_norm: RMSNorm | None, text: Tensor, image: Tensor) -> Tensor:
    """Queries, keys or values of both streams, [B, Lc, H, 64] and [B, Lx, H, 64] -> [B, Lc + Lx, H, 64]."""
    if text_norm is not None and image_norm is not None:
        text, image = text_norm(text), image_norm(image)
    return torch.cat((text, image), dim=1)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def normalise_and_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift: x [B, L, D], shift and scale [B, 1, D]; the result has shift's dtype."""
    normalised = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(shift.dtype)
    return torch.addcmul(shift, normalised, 1 + scale)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y in x's dtype: x, y [B, L, D], gate [B, 1, D]."""
    return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def timestep_embedding(timestep: Tensor, size: int = TIMESTEP_FREQUENCIES, max_period: float = 10000.0) -> Tensor:
    """[B] float32 -> [B, size] float32: cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, 3.5)."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
