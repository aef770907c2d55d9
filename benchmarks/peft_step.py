#!/usr/bin/env python3
"""The same training step with diffusers and PEFT, to stand beside `benchmarks.step`: their model and their LoRA, a plain loop.

    python -m benchmarks.step --scale 0.25 --resolution 256 --against 'python -m benchmarks.peft_step --scale 0.25 --resolution 256'

It takes the sizes that benchmarks.step takes and prints the same numbers. It is written as diffusers' own example of LoRA for
SD3 is: frozen weights in the mixed precision's format, LoRA weights in float32 under autocast, AdamW, gradients clipped to 1. LoRA is on
the same layers, of the same rank; diffusers has queries, keys and values as layers of their own, so there are more of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.job import CLIP_TOKENS, add_sizes, sizes
from benchmarks.measuring import report
from benchmarks.step import measure_steps
from library.sd3.mmdit_config import MMDiTConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"),
)


def main(words: Sequence[str] | None = None) -> None:
    chosen = parser().parse_args(words)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    step = make_step(sizes(chosen), chosen, device)
    measured = measure_steps(step, chosen.steps, device)
    report("peft_step", [{"what": "diffusers and PEFT", **measured.row(chosen.train_batch_size)}])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sizes(made)
    made.add_argument("--resolution", type=int, default=1024, help="the images' side in pixels (1024)")
    made.add_argument("--steps", type=int, default=5, help="steps that are timed, after a first one (5)")
    made.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    made.add_argument("--train_batch_size", type=int, default=1)
    made.add_argument("--network_dim", type=int, default=4, help="the rank of the LoRA (4)")
    made.add_argument("--mixed_precision", choices=list(DTYPES), default="no")
    made.add_argument("--gradient_checkpointing", action="store_true")
    made.add_argument("--t5xxl_max_token_length", type=int, default=256)
    return made


def make_step(config: MMDiTConfig, chosen: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    """A function that makes one training step and returns its loss, on the device."""
    dtype = DTYPES[chosen.mixed_precision]
    transformer = make_transformer(config, chosen, dtype, device)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch, tokens = chosen.train_batch_size, CLIP_TOKENS + chosen.t5xxl_max_token_length
    side = chosen.resolution // 8
    latents = torch.randn(batch, config.in_channels, side, side, device=device, dtype=dtype)
    context = torch.randn(batch, tokens, config.context_size, device=device, dtype=dtype)
    pooled = torch.randn(batch, config.pooled_size, device=device, dtype=dtype)
    mixed = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step() -> Tensor:
        sigma = torch.sigmoid(torch.randn(batch)).to(device)
        noise = torch.randn_like(latents)
        noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
        with mixed:
            velocity = transformer(noisy.to(dtype), context, pooled, sigma * 1000, return_dict=False)[0]
        loss = (velocity.float() - (noise - latents).float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def make_transformer(
    config: MMDiTConfig, chosen: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """diffusers' model of these sizes with PEFT's adapter, on the device. Its weights are what diffusers starts from."""
    from diffusers import SD3Transformer2DModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        transformer: Any = SD3Transformer2DModel(
            sample_size=2 * config.pos_embed_max_size,
            num_layers=config.depth,
            attention_head_dim=64,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_size,
            caption_projection_dim=config.hidden_size,
            pooled_projection_dim=config.pooled_size,
            pos_embed_max_size=config.pos_embed_max_size,
            dual_attention_layers=config.dual_attention_blocks,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    finally:
        torch.set_default_dtype(before)
    transformer.requires_grad_(False).to(device, dtype)
    if chosen.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    rank = chosen.network_dim
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=1, target_modules=list(LORA_LAYERS)))
    cast_training_params([transformer], dtype=torch.float32)
    return transformer.train()


if __name__ == "__main__":
    main()
