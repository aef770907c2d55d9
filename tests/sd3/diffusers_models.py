"""diffusers' models filled with our weights, through diffusers' own converters: the reference of the numerics tests."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from library.sd3.mmdit import MMDiT
from library.sd3.vae import Vae


def randomised(model: torch.nn.Module, seed: int = 0, spread: float = 0.3) -> torch.nn.Module:
    """Fill every parameter and buffer with noise of a sensible size, so that no term of the forward is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = tensor[0].numel() if tensor.dim() > 1 and name != "pos_embed" else 1
            centre = (
                1.0
                if name.endswith(("ln_q.weight", "ln_k.weight")) or ("norm" in name and name.endswith("weight"))
                else 0.0
            )
            tensor.copy_(centre + noise * (spread if fan_in == 1 else fan_in**-0.5))
    return model.eval().requires_grad_(False)


def diffusers_transformer(model: MMDiT) -> SD3Transformer2DModel:
    config = model.config
    prefixed = {f"model.diffusion_model.{key}": value.clone() for key, value in model.state_dict().items()}
    reference = SD3Transformer2DModel(
        sample_size=2 * config.pos_embed_max_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_size,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_size,
        out_channels=config.out_channels,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_blocks,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    reference.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(prefixed), strict=True)
    return reference.eval().requires_grad_(False)


def diffusers_vae(model: Vae) -> AutoencoderKL:
    config = model.config
    widths = [config.base_channels * m for m in config.multipliers]
    reference = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    prefixed = {f"first_stage_model.{key}": value.clone() for key, value in model.state_dict().items()}
    reference.load_state_dict(convert_ldm_vae_checkpoint(prefixed, reference.config), strict=True)
    return reference.eval().requires_grad_(False)
