"""What memory savers and sharding know of a denoiser: blocks that run one after another, through one seam.

A model family's transformer is a `TransformerModel`. It calls `self.run_block(index, block, *inputs)` where it would call
`block(*inputs)`; whoever keeps blocks elsewhere, recomputes, compiles or shards them replaces that function as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class TransformerBlock(Protocol):
    """A block of a transformer, as its runners see it."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Residual streams [B, L, D], then what conditions them (such as c [B, D]) -> the streams after the block."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class BlockRunner(Protocol):
    """Run block number `index` on its inputs; return its residual streams."""

    def __call__(self, index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]: ...


def call_block(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The runner without any saver."""
    return block(*inputs)


class TransformerModel(nn.Module):
    """A denoiser whose blocks run through `run_block`."""

    def __init__(self) -> None:
        super().__init__()
        self.run_block: BlockRunner = call_block

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in the order in which they run."""
        raise NotImplementedError

    def smallest_input(self, device: torch.device) -> tuple[Tensor, ...]:
        """What `forward` takes for the smallest image, of zeros: processes that share the weights join each other's forwards with it."""
        raise NotImplementedError(f"{type(self).__name__} names no smallest input, so its weights can't be sharded")


class Pointwise(nn.Module):
    """A step of a block that is cheap to compute again from its inputs: norms, modulations, activation functions.

    A subclass's forward takes and returns tensors. It may use frozen weights. `library.memory.recompute` finds these modules.
    """


@dataclass(frozen=True)
class StepShape:
    """The largest batch of a run."""

    batch: int
    height: int  # pixels
    width: int
    context_tokens: int
    trains_text: bool = False  # gradients go on into the text encoders

    def __str__(self) -> str:
        return f"batches of {self.batch} at {self.width}x{self.height}"


@dataclass(frozen=True)
class BlockFlops:
    """Floating-point operations of one block's forward."""

    matmul: float
    attention: float
