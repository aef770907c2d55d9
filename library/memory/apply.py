"""The memory optimizations of a denoiser, in the order in which they are applied. Open this file first.

One file each: quantization.py, compilation.py, checkpointing.py, recompute.py (pointwise steps), block_swap.py; offload.py keeps
encoders and the VAE in host memory between uses. estimator/ computes what a step takes and chooses among the options.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.common.transformer import BlockRunner, TransformerModel, call_block
from library.memory.block_swap import BlockSwapper, evenly_spaced, move_resident
from library.memory.checkpointing import ActivationOffloader, CheckpointSettings, checkpointed
from library.memory.compilation import compiled
from library.memory.quantization import quantize_blocks
from library.memory.recompute import recompute_pointwise


@dataclass(frozen=True)
class MemorySettings:
    blocks_to_swap: int = 0
    checkpointing: CheckpointSettings | None = None
    compile_backend: str | None = None  # torch.compile's backend; None: eager
    dynamic_shapes: bool = False  # compiled blocks serve images of all sizes, instead of one size each
    quantization: str | None = None  # "fp8", "int8" or "nf4"
    fp8_matmul: bool = False  # with "fp8": multiply in float8 too
    recompute_pointwise: bool = False  # in blocks that are not checkpointed; not with compile_backend
    sharded: bool = False  # leave the weights in host memory: library/distributed/fsdp.py moves the shards


def apply_memory_optimizations(
    model: TransformerModel, settings: MemorySettings, device: torch.device
) -> BlockSwapper | None:
    """Move `model` (frozen, in host memory) to `device` and set `model.run_block`. Return the swapper if blocks are swapped.

    1. Quantize, which replaces the blocks' linear layers: everything after it sees the narrow weights.
    2. Compile one block's forward; compiled code is what checkpointing runs twice.
    3. Checkpoint blocks (or recompute their pointwise steps) around that.
    4. Swap blocks, outside of checkpointing: the recomputation uses the weights that the backward fetched. Or shard them:
       `settings.sharded` leaves the weights alone, and the caller makes a `ShardedModel` when step 5 is done.
    5. LoRA comes last and is the caller's: its hooks attach to the layers that are there now, and its weights, which are no part of
       the blocks, are neither swapped nor sharded.
    """
    blocks = list(model.blocks)
    if settings.quantization is not None:
        quantize_blocks(blocks, settings.quantization, device, settings.fp8_matmul)
    run: BlockRunner = call_block
    if settings.compile_backend:
        # On a CPU inductor's code for fixed shapes has wrong gradients where modulation is trained (PyTorch 2.13).
        run = compiled(settings.compile_backend, settings.dynamic_shapes or device.type == "cpu")
    not_checkpointed = recompute_pointwise(run) if settings.recompute_pointwise else run
    if settings.checkpointing is not None:
        offloader = ActivationOffloader(device) if settings.checkpointing.offload else None
        run = checkpointed(run, settings.checkpointing, offloader, not_checkpointed)
    else:
        run = not_checkpointed
    swapper = None
    swapped = evenly_spaced(len(blocks), settings.blocks_to_swap) if settings.blocks_to_swap else []
    if not settings.sharded:
        move_resident(model, blocks, swapped, device)
    if swapped:
        swapper = BlockSwapper(blocks, swapped, device)
        run = swapper.runner(run)
    model.run_block = run
    return swapper
