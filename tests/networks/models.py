"""Small models with the module paths of the real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from networks.network import Network

TINY = {
    "depth": 3,
    "hidden_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "context_size": 24,
    "pooled_size": 20,
    "mlp_hidden_size": 128,
    "pos_embed_max_size": 8,
    "qk_norm": True,
    "dual_attention_blocks": (0,),
}
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def tiny_mmdit(seed: int = 0, **changes) -> MMDiT:
    """A frozen MMDiT in float32 whose random weights let every layer matter."""
    torch.manual_seed(seed)
    model = MMDiT(MMDiTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model.requires_grad_(False).eval()


def meta_mmdit(**changes) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(MMDiTConfig(**{**TINY, **changes}))


def tiny_clip(hidden: int = 16, layers: int = 2) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * hidden
    )
    return CLIPTextModelWithProjection(config).requires_grad_(False).eval()


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).requires_grad_(False).eval()


def mmdit_inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "x": torch.randn(batch, 16, 6, 8, generator=generator).to(dtype),
        "timestep": torch.linspace(50, 900, batch),
        "context": torch.randn(batch, 5, TINY["context_size"], generator=generator).to(dtype),
        "pooled": torch.randn(batch, TINY["pooled_size"], generator=generator).to(dtype),
    }


def trained(network: Network, size: float = 0.3, seed: int = 5) -> Network:
    """Give every factor values as if training had gone on for a while."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size / parameter.shape[-1] ** 0.5)
    return network


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
