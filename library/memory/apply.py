"""Puts a denoiser on its device with the memory savers that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from library.memory.block_swap import BlockSwapper, move_resident, spread_blocks
from library.memory.checkpointing import ActivationOffloader, CheckpointSettings, checkpointed
from library.memory.quantization import in_joint_blocks, quantise
from library.memory.recompute import lean
from library.sd3.mmdit import BlockRunner, MMDiT, call_block

GRAPHS_AT_MOST = 256  # of all kinds and shapes


@dataclass(frozen=True)
class MemorySettings:
    blocks_to_swap: int = 0
    checkpointing: CheckpointSettings | None = None
    compile_backend: str | None = None  # torch.compile's backend; None: eager
    dynamic_shapes: bool = False  # compiled blocks serve images of all sizes, instead of one size each
    quantisation: str | None = None  # "fp8", "int8" or "nf4"
    fp8_products: bool = False  # with "fp8": multiply in float8 too
    lean: bool = False  # blocks that are not checkpointed keep lean activations; not with compile_backend
    stays: bool = False  # the weights stay where they are: library/distributed/fsdp.py moves the shares


def arrange(model: MMDiT, settings: MemorySettings, device: torch.device) -> BlockSwapper | None:
    """Move the model (on the CPU, frozen) to `device` and set its block runner. Returns the swapper, if blocks are swapped.

    Call it before LoRA is attached: quantising replaces layers. From the inside out: the block (compiled if asked for), activation
    checkpointing or lean activations, block swap.
    """
    if settings.quantisation is not None:
        quantise(model, settings.quantisation, in_joint_blocks, device, settings.fp8_products)
    blocks = list(model.joint_blocks)
    run: BlockRunner = call_block
    if settings.compile_backend:
        # On a CPU inductor's code for fixed shapes has wrong gradients where modulation is trained (PyTorch 2.13).
        run = compiled(settings.compile_backend, settings.dynamic_shapes or device.type == "cpu")
    plain = lean(run) if settings.lean else run
    if settings.checkpointing is not None:
        offloader = ActivationOffloader(device) if settings.checkpointing.offload else None
        run = checkpointed(run, settings.checkpointing, offloader, plain)
    else:
        run = plain
    swapper = None
    swapped = spread_blocks(len(blocks), settings.blocks_to_swap) if settings.blocks_to_swap else []
    if not settings.stays:
        move_resident(model, blocks, swapped, device)
    if swapped:
        swapper = BlockSwapper(blocks, swapped, device)
        run = swapper.runner(run)
    model.run_block = run
    return swapper


def compiled(backend: str | Callable[..., Any], dynamic: bool) -> BlockRunner:
    """A block runner that compiles the joint block, once for all blocks of one kind (layers, LoRA, gradients wanted or not).

    dynamic: once for all shapes too, else once for each. It is one or the other, never a fixed shape first: with two graphs that
    fit a shape, activation checkpointing could compute again by another one than it had computed by.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, GRAPHS_AT_MOST)  # beyond it torch runs uncompiled without a word

    @torch.compile(backend=backend, dynamic=dynamic)
    def forward(block, context, x, c):
        return block(context, x, c)

    def compiled_run(index, block, context, x, c):
        return forward(block, context, x, c)

    return compiled_run
