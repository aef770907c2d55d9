"""A training step of an MMDiT by its shapes: inputs without content and operations, for estimates of memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from library.common.transformer import BlockFlops, StepShape
from library.data.images import VAE_SCALE_FACTOR
from library.sd3.mmdit import JointBlock, MMDiT
from library.sd3.mmdit_config import PATCH_SIZE, MMDiTConfig

META = torch.device("meta")


def stream_tokens(shape: StepShape) -> int:
    """Tokens of both streams of the batch."""
    side = VAE_SCALE_FACTOR * PATCH_SIZE
    return shape.batch * (shape.height // side * (shape.width // side) + shape.context_tokens)


def meta_inputs(config: MMDiTConfig, dtype: torch.dtype, shape: StepShape) -> tuple[Tensor, ...]:
    """What `MMDiT.forward` takes, on the meta device: latents, timesteps, context and pooled, the text in `dtype`."""
    size = (shape.batch, config.in_channels, shape.height // VAE_SCALE_FACTOR, shape.width // VAE_SCALE_FACTOR)
    text = (shape.batch, shape.context_tokens, config.context_size)
    return (
        torch.empty(size, device=META),
        torch.empty(shape.batch, device=META),
        torch.empty(text, device=META, dtype=dtype, requires_grad=shape.trains_text),
        torch.empty(shape.batch, config.pooled_size, device=META, dtype=dtype),
    )


def block_of(name: str) -> int | None:
    """The number of the block that a LoRA name belongs to; None for encoders, embedders and the final layer."""
    _, separator, rest = name.partition("joint_blocks_")
    return int(rest.split("_", 1)[0]) if separator else None


def block_flops(model: MMDiT, shape: StepShape) -> Iterator[BlockFlops]:
    """Each block's operations: two for each matmul of a weight and a token, four for each pair of tokens and channel."""
    text = shape.batch * shape.context_tokens
    image = stream_tokens(shape) - text
    for block in cast("list[JointBlock]", model.joint_blocks):
        halves = ((block.x_block, image), (block.context_block, text))
        matmul = sum(
            2.0 * layer.in_features * layer.out_features * (shape.batch if "adaLN" in path else tokens)
            for half, tokens in halves
            for path, layer in half.named_modules()
            if isinstance(layer, nn.Linear)
        )
        pairs = (image + text) ** 2 + (image**2 if block.x_block.attn2 is not None else 0)
        yield BlockFlops(matmul, 4.0 * pairs * model.config.hidden_size / shape.batch)
