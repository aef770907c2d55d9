"""MMDiT, the denoiser of Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 4 and figure 2;
the second image attention of 3.5 Medium follows the published SD3.5 reference model. Module paths are the key paths of
the released checkpoints, so a checkpoint loads without a mapping and LoRA names follow from the paths.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.common.transformer import Pointwise, TransformerModel
from library.sd3.mmdit_config import HEAD_SIZE, MMDiTConfig
from library.sd3.pos_embed import crop_pos_embed

TIMESTEP_FREQUENCIES = 256


class RMSNorm(Pointwise):
    """Root-mean-square norm of each query or key head (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Modulate(Pointwise):
    """LayerNorm without weights, then scale and shift (adaLN, Peebles & Xie 2023, section 3.2)."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x [B, L, D], shift and scale [B, 1, D] -> LayerNorm(x) * (1 + scale) + shift, in shift's dtype."""
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(shift.dtype)
        return torch.addcmul(shift, normed, 1 + scale)


class JoinStreams(Pointwise):
    """Queries, keys or values of text and image, one after the other; queries and keys are normalized first."""

    def forward(self, context: Tensor, x: Tensor, context_norm: nn.Module, x_norm: nn.Module) -> Tensor:
        """context [B, Lc, H, 64], x [B, Lx, H, 64] -> [B, Lc + Lx, H, 64]."""
        return torch.cat((context_norm(context), x_norm(x)), dim=1)


class GELU(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """The projections around an attention, and attention of one stream to itself."""

    def __init__(self, hidden_size: int, qk_norm: bool, pre_only: bool = False):
        super().__init__()
        self.num_heads = hidden_size // HEAD_SIZE
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if not pre_only:
            self.proj = nn.Linear(hidden_size, hidden_size)
        self.ln_q = RMSNorm(HEAD_SIZE) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(HEAD_SIZE) if qk_norm else nn.Identity()
        self.ln_v = nn.Identity()

    def pre_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, L, D] -> queries, keys and values [B, L, H, 64], not normalized yet."""
        heads: tuple[Tensor, ...] = self.qkv(x).unflatten(-1, (3, self.num_heads, HEAD_SIZE)).unbind(2)
        return heads

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention before the output projection, [B, L, D] -> [B, L, D]."""
        q, k, v = self.pre_attention(x)
        return attention(self.ln_q(q), self.ln_k(k), v)


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.act = GELU()
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class SingleDiTBlock(nn.Module):
    """One stream's half of a joint block: adaLN-Zero modulation, projections and MLP (Peebles & Xie 2023, section 3.2).

    pre_only: the text half of the last block, which takes part in the attention and ends there. dual_attention: the image
    half in the first blocks of 3.5 Medium, with a second attention of the image to itself.
    """

    def __init__(self, config: MMDiTConfig, pre_only: bool, dual_attention: bool):
        super().__init__()
        hidden_size = config.hidden_size
        self.chunks = 2 if pre_only else 9 if dual_attention else 6
        self.attn = Attention(hidden_size, config.qk_norm, pre_only)
        self.attn2 = Attention(hidden_size, config.qk_norm) if dual_attention else None
        if not pre_only:
            self.mlp = Mlp(hidden_size, config.mlp_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.chunks * hidden_size))
        self.modulate = Modulate()

    def modulation(self, silu_c: Tensor) -> tuple[Tensor, ...]:
        """adaLN_modulation(c) from SiLU(c) [B, D] -> `chunks` tensors [B, 1, D]: shift_msa, scale_msa, gate_msa, shift_mlp, ...

        SiLU(c), adaLN_modulation[0], is the same for all blocks: `MMDiT.forward` computes it once.
        """
        chunks: tuple[Tensor, ...] = self.adaLN_modulation[1](silu_c).unsqueeze(1).chunk(self.chunks, dim=-1)
        return chunks

    def pre_attention(self, x: Tensor, modulation: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """x [B, L, D] -> queries, keys and values [B, L, H, 64]."""
        shift_msa, scale_msa = modulation[:2]
        return self.attn.pre_attention(self.modulate(x, shift_msa, scale_msa))

    def post_attention(self, x: Tensor, attn: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Residual stream x [B, L, D] and the joint attention's output [B, L, D] -> x after attention and MLP."""
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[2:6]
        if self.attn2 is None:
            x = add_gated(x, gate_msa, self.attn.proj(attn))
        else:
            shift_msa2, scale_msa2, gate_msa2 = modulation[6:]
            attn2 = self.attn2(self.modulate(x, shift_msa2, scale_msa2))
            x = add_gated(x, gate_msa, self.attn.proj(attn))
            x = add_gated(x, gate_msa2, self.attn2.proj(attn2))
        return add_gated(x, gate_mlp, self.mlp(self.modulate(x, shift_mlp, scale_mlp)))


class JointBlock(nn.Module):
    """Two streams, text (context) and image (x), that share one attention (Esser et al. 2024, figure 2b)."""

    def __init__(self, config: MMDiTConfig, last: bool, dual_attention: bool):
        super().__init__()
        self.context_block = SingleDiTBlock(config, pre_only=last, dual_attention=False)
        self.x_block = SingleDiTBlock(config, pre_only=False, dual_attention=dual_attention)
        self.join = JoinStreams()
        self.last = last

    def forward(self, context: Tensor, x: Tensor, silu_c: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, Lc, D], x [B, Lx, D], silu_c [B, D] -> both streams. The last block leaves context as it was."""
        context_modulation = self.context_block.modulation(silu_c)
        x_modulation = self.x_block.modulation(silu_c)
        context_q, context_k, context_v = self.context_block.pre_attention(context, context_modulation)
        x_q, x_k, x_v = self.x_block.pre_attention(x, x_modulation)
        q = self.join(context_q, x_q, self.context_block.attn.ln_q, self.x_block.attn.ln_q)  # [B, Lc + Lx, H, 64]
        k = self.join(context_k, x_k, self.context_block.attn.ln_k, self.x_block.attn.ln_k)
        v = self.join(context_v, x_v, self.context_block.attn.ln_v, self.x_block.attn.ln_v)
        context_attn, x_attn = attention(q, k, v).split([context.shape[1], x.shape[1]], dim=1)  # [B, Lc, D], [B, Lx, D]
        x = self.x_block.post_attention(x, x_attn, x_modulation)
        if not self.last:
            context = self.context_block.post_attention(context, context_attn, context_modulation)
        return context, x


class PatchEmbed(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # [B, h/2 * w/2, D]
        return patches


class VectorEmbedder(nn.Module):
    def __init__(self, in_size: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.linear = nn.Linear(hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.modulate = Modulate()

    def forward(self, x: Tensor, silu_c: Tensor) -> Tensor:
        """x [B, L, D], silu_c [B, D] -> [B, L, patch * patch * C]."""
        shift, scale = self.adaLN_modulation[1](silu_c).unsqueeze(1).chunk(2, dim=-1)  # [B, 1, D]
        out: Tensor = self.linear(self.modulate(x, shift, scale))
        return out


class MMDiT(TransformerModel):
    """The denoiser. Predicts the velocity eps - x0 of a noisy latent (Esser et al. 2024, figure 2a)."""

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

    @property
    def blocks(self) -> nn.ModuleList:
        return self.joint_blocks

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in (quantized layers store others)."""
        return self.x_embedder.proj.weight.dtype

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, pos_embed: Tensor | None = None
    ) -> Tensor:
        """x [B, 16, h, w] noisy normalized latents, h and w even; timestep [B] float32 in 0..1000; context [B, L, 4096]; pooled
        [B, 2048] -> velocity [B, 16, h, w] in the model's dtype.

        pos_embed [1, h/2 * w/2, D] replaces the center crop of the model's own table.
        """
        height, width = x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size
        if pos_embed is None:
            pos_embed = crop_pos_embed(cast(Tensor, self.pos_embed), height, width)
        dtype = self.dtype
        c = self.t_embedder(timestep_embedding(timestep).to(dtype)) + self.y_embedder(pooled.to(dtype))
        silu_c = F.silu(c)  # [B, D]; adaLN_modulation[0] of all blocks and of the final layer
        # In float16 the residual streams of deep blocks pass 65504: they stay in float32, the matmuls in float16.
        stream_dtype = torch.float32 if dtype == torch.float16 else dtype
        x = (self.x_embedder(x.to(dtype)) + pos_embed.to(dtype)).to(stream_dtype)  # [B, h/2 * w/2, D]
        context = self.context_embedder(context.to(dtype)).to(stream_dtype)  # [B, L, D]
        for index, block in enumerate(self.joint_blocks):
            context, x = self.run_block(index, block, context, x, silu_c)
        return self.unpatchify(self.final_layer(x, silu_c), height, width)

    def smallest_input(self, device: torch.device) -> tuple[Tensor, ...]:
        config = self.config
        return (
            torch.zeros(1, config.in_channels, config.patch_size, config.patch_size, device=device),
            torch.zeros(1, device=device),
            torch.zeros(1, 1, config.context_size, device=device, dtype=self.dtype),
            torch.zeros(1, config.pooled_size, device=device, dtype=self.dtype),
        )

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, height * width, patch * patch * C] -> [B, C, height * patch, width * patch]."""
        patch = self.config.patch_size
        x = x.unflatten(1, (height, width)).unflatten(
            -1, (patch, patch, self.config.out_channels)
        )  # [B, h, w, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, h, p, w, p] -> [B, C, h * p, w * p]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over [B, L, H, 64] -> [B, L, H * 64]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, L, 64]
    return out.transpose(1, 2).flatten(2)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y in x's dtype: x, y [B, L, D], gate [B, 1, D]."""
    return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def timestep_embedding(timestep: Tensor, size: int = TIMESTEP_FREQUENCIES, max_period: float = 10000.0) -> Tensor:
    """[B] float32 -> [B, size] float32: cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, 3.5)."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
