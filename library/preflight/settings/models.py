"""The models of a run: which files, how they are stored, what is trained on them."""

from __future__ import annotations

import argparse
import logging

from library.memory.apply import MemorySettings
from library.memory.block_swap import swap_limit
from library.memory.checkpointing import CheckpointSettings
from library.preflight.network import NetworkSettings
from library.preflight.sd3_inspector import Sd3Settings
from library.preflight.settings import tuple_or_none as _tuple
from library.saving.text_encoders import encoders_to_save

logger = logging.getLogger(__name__)


def network_settings(args: argparse.Namespace) -> NetworkSettings:
    return NetworkSettings(
        module=args.network_module,
        args=_tuple(args.network_args),
        dim=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout,
        weights=args.network_weights,
        dim_from_weights=args.dim_from_weights,
        save_format=args.save_format,
    )


def sd3_settings(args: argparse.Namespace) -> Sd3Settings:
    return Sd3Settings(
        checkpoint=args.pretrained_model_name_or_path,
        clip_l=args.clip_l,
        clip_g=args.clip_g,
        t5xxl=args.t5xxl,
        vae=args.vae,
        tokenizer_cache_dir=args.tokenizer_cache_dir,
        t5_tokens=args.t5xxl_max_token_length,
        t5_device=args.t5xxl_device,
        t5_dtype=args.t5xxl_dtype,
        fp8_t5=args.fp8_base and not args.fp8_base_unet,
        whole_vae=args.no_half_vae,
        scaled_pos_embed=args.enable_scaled_pos_embed,
        compile_backend=args.dynamo_backend if args.torch_compile else None,
        fp8_matmul=args.fp8_matmul,
        train_unet_only=args.network_train_unet_only,
        scale_weight_norms=args.scale_weight_norms,
        base_weights=tuple(args.base_weights or ()),
        saved_encoders=tuple(encoders_to_save(args.save_clip, args.save_t5xxl)),
    )


def base_weight_files(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The paths of --base_weights with their strengths: 1.0 for those that have none."""
    paths, strengths = args.base_weights or [], args.base_weights_multiplier or []
    return [(path, strengths[index] if index < len(strengths) else 1.0) for index, path in enumerate(paths)]


def checkpoint_settings(args: argparse.Namespace) -> CheckpointSettings | None:
    blocks = args.gradient_checkpointing_blocks
    if not (args.gradient_checkpointing or args.cpu_offload_checkpointing or args.selective_checkpointing or blocks):
        return None
    return CheckpointSettings(blocks, args.selective_checkpointing, args.cpu_offload_checkpointing)


def memory_settings(
    args: argparse.Namespace, depth: int, sharded: bool = False, several_sizes: bool = False
) -> MemorySettings:
    """How the denoiser spares memory. depth: the model's number of blocks. several_sizes: of images, in the run."""
    requested = int(args.blocks_to_swap or 0)
    if requested > swap_limit(depth):
        logger.warning(
            "blocks_to_swap %d is lowered to %d: this model has %d blocks.", requested, swap_limit(depth), depth
        )
    return MemorySettings(
        blocks_to_swap=min(requested, swap_limit(depth)),
        checkpointing=checkpoint_settings(args),
        compile_backend=args.dynamo_backend if args.torch_compile else None,
        dynamic_shapes=several_sizes,
        quantization="fp8" if args.fp8_base else args.base_quantization,
        fp8_matmul=args.fp8_matmul,
        recompute_pointwise=args.lean_activations,
        sharded=sharded,
    )


def memory_advice(args: argparse.Namespace, whole_copies: bool = False) -> list[str]:
    """Options that the run does not use yet and that lower its peak, in order of what they cost.

    whole_copies: there are several processes, each with the whole model.
    """
    steps = [
        (args.memory_plan is None, "--memory_plan auto (chooses among the options below what fits)"),
        (
            not args.cache_text_encoder_outputs and args.network_train_unet_only,
            "--cache_text_encoder_outputs (frees the text encoders)",
        ),
        (not args.cache_latents, "--cache_latents (frees the VAE)"),
        (args.mixed_precision == "no", "--mixed_precision bf16"),
        (not args.gradient_checkpointing, "--gradient_checkpointing (a third to a half slower)"),
        (
            (args.train_batch_size or 1) > 1,
            "a smaller batch_size, with --gradient_accumulation_steps to make up for it",
        ),
        (not args.blocks_to_swap, "--blocks_to_swap 12, or as many more as it takes"),
        (not args.fp8_base and not args.base_quantization, "--fp8_base_unet (base weights in eight bits)"),
        (args.optimizer_type == "AdamW", "--optimizer_type AdamW8bit"),
        (not args.cpu_offload_checkpointing and not args.blocks_to_swap, "--cpu_offload_checkpointing"),
        (whole_copies, "docs/configs/fsdp2.yaml for accelerate launch (shares the model out over the devices)"),
        (True, "a lower resolution"),
    ]
    return [text for useful, text in steps if useful]
