"""Activation checkpointing of blocks: keep a block's inputs, compute its inside again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Three additions: only as many blocks as needed, a
selective policy that keeps attention outputs (dear to compute, cheap to keep), and inputs kept in host memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from library.common.transformer import BlockRunner, TransformerBlock


@dataclass(frozen=True)
class CheckpointSettings:
    blocks: int | None = None  # how many blocks recompute their inside; None: all
    selective: bool = False  # keep attention outputs
    offload: bool = False  # keep block inputs in host memory


def checkpointed(
    run: BlockRunner,
    settings: CheckpointSettings,
    offloader: ActivationOffloader | None,
    otherwise: BlockRunner | None = None,
) -> BlockRunner:
    """`run` with activation checkpointing; blocks that are not chosen for it run by `otherwise` (None: by `run`).

    The first blocks are the ones that recompute: their activations would live longest.
    """

    def checkpointed_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        recomputes = settings.blocks is None or index < settings.blocks
        if not (recomputes and torch.is_grad_enabled()):
            return (otherwise or run)(index, block, *inputs)
        options: dict[str, Any] = {"use_reentrant": False}
        if settings.selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
        with offloader.saving(index) if offloader is not None else nullcontext():
            return cast("tuple[Tensor, ...]", checkpoint(run, index, block, *inputs, **options))

    return checkpointed_run


def keep_attention(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Keep what attention kernels return; recompute all else."""
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


ATTENTION_OPERATORS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math",
    )
    if hasattr(torch.ops.aten, name)
)


class ActivationOffloader:
    """Keeps checkpoints (block inputs) in pinned host memory between forward and backward.

    Copies out run on a stream of their own while the next blocks compute; copies in are issued one block ahead in backward.
    Host buffers are reused from step to step, and by images of other sizes: they have powers of two of bytes, which is what
    torch takes for pinned memory anyway. On a CPU the tensors are copied between host buffers, by the same code.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.streams = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.streams else None
        self.spare: dict[int, list[Tensor]] = {}  # buffers by their bytes
        self.kept: dict[int, list[OffloadedTensor]] = {}

    def saving(self, index: int) -> AbstractContextManager[object]:
        """A context in which tensors that autograd saves belong to block `index` and go to host memory."""
        self.kept[index] = []
        return torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index), self._unpack)

    def _pack(self, index: int, tensor: Tensor) -> OffloadedTensor | Tensor:
        if tensor.device.type != self.device.type or not tensor.is_floating_point() or tensor.dim() < 3:
            return tensor  # the timestep vector and random states are small
        buffer = self._buffer(tensor.nbytes)
        host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if self.stream is None:
            host.copy_(tensor)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)
        kept = OffloadedTensor(index, host, buffer)
        self.kept[index].append(kept)
        return kept

    def _unpack(self, kept: OffloadedTensor | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = kept.returned if kept.returned is not None else self._fetch(kept)
        kept.returned = None
        if kept.arrived is not None:  # for this copy alone: those fetched ahead arrive during the computation
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
            tensor.record_stream(torch.cuda.current_stream(self.device))
        self._release(kept)
        for ahead in [*self.kept[kept.index], *self.kept.get(kept.index - 1, [])]:
            if ahead.returned is None and ahead.host is not None:
                ahead.returned = self._fetch(ahead)
        return tensor

    def _fetch(self, kept: OffloadedTensor) -> Tensor:
        assert kept.host is not None
        if self.stream is None:
            return kept.host.clone()
        with torch.cuda.stream(self.stream):
            tensor = kept.host.to(self.device, non_blocking=True)
        kept.arrived = self.stream.record_event()
        return tensor

    def _buffer(self, size: int) -> Tensor:
        rounded = 1 << (size - 1).bit_length()
        spare = self.spare.get(rounded)
        return spare.pop() if spare else torch.empty(rounded, dtype=torch.uint8, pin_memory=self.streams)

    def _release(self, kept: OffloadedTensor) -> None:
        """The host buffer may be filled again: later copies into it run on the same stream, after the copy out of it."""
        self.spare.setdefault(kept.buffer.numel(), []).append(kept.buffer)
        kept.host = None


@dataclass
class OffloadedTensor:
    """A tensor that waits in host memory for its backward."""

    index: int
    host: Tensor | None  # in `buffer`; None when it was fetched
    buffer: Tensor
    returned: Tensor | None = None  # the copy on the device, when it was fetched ahead
    arrived: torch.cuda.Event | None = None  # on the copy stream, behind that copy
