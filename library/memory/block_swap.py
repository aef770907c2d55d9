"""Block swap: some frozen blocks are kept in host memory and copied to the device when they run.

A swapped block's weights are packed into one pinned host tensor. On the device there are a few buffers of a block's size,
each for one block at a time. Copies run on a stream of their own, ahead of use: forward in rising order, backward in falling
order. The trained LoRA weights are not part of the blocks and stay on the device. Nothing is allocated after the start.
On a CPU the same schedule runs with copies between buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.common.transformer import BlockRunner, TransformerBlock

ALIGNMENT = 256  # bytes; device kernels want aligned weights
RESIDENT_AT_LEAST = 2  # blocks that always stay on the device


def swap_limit(depth: int) -> int:
    """The most blocks of a model that can be swapped."""
    return max(0, depth - RESIDENT_AT_LEAST)


def evenly_spaced(depth: int, count: int) -> list[int]:
    """Indices of the `count` of `depth` blocks to swap: evenly spaced, so that copies overlap with the blocks between them."""
    return [int((number + 0.5) * depth / count) for number in range(count)]


@dataclass
class PackedBlock:
    """A block's frozen tensors as one host tensor of bytes, and the offset of each of them."""

    host: Tensor  # [bytes] uint8, pinned when the device is a GPU
    views: list[tuple[Tensor, int, torch.Size, torch.dtype]]  # tensor to rebind, byte offset, shape, dtype

    def rebind_storage(self, buffer: Tensor) -> None:
        """Let the block's tensors be views into `buffer`, which holds (or will hold) the bytes of `host`."""
        for tensor, offset, shape, dtype in self.views:
            size = shape.numel() * dtype.itemsize
            tensor.data = buffer[offset : offset + size].view(dtype).view(shape)


def pack_block(block: nn.Module, pin: bool) -> PackedBlock:
    """Move a block's parameters and buffers into one host tensor; they become views of it."""
    views: list[tuple[Tensor, int, torch.Size, torch.dtype]] = []
    end = 0
    for tensor in [*block.parameters(), *block.buffers()]:
        views.append((tensor, end, tensor.shape, tensor.dtype))
        size = tensor.numel() * tensor.element_size()
        end += -(-size // ALIGNMENT) * ALIGNMENT
    packed = PackedBlock(torch.empty(end, dtype=torch.uint8, pin_memory=pin), views)
    for tensor, offset, shape, dtype in views:
        size = tensor.numel() * tensor.element_size()
        packed.host[offset : offset + size].view(dtype).view(shape).copy_(tensor.data)
    packed.rebind_storage(packed.host)
    return packed


@dataclass
class Slot:
    """One device buffer and the block whose weights it holds."""

    buffer: Tensor  # [bytes] uint8
    resident_block: int | None = None
    filled: torch.cuda.Event | None = None  # on the copy stream: the block's bytes have arrived
    used: torch.cuda.Event | None = None  # on the compute stream: the last use of the block has been issued
    in_use: bool = False


class BlockSwapper:
    """Copies swapped blocks to the device in time. Wrap the block runner with `runner`."""

    def __init__(self, blocks: Sequence[nn.Module], swapped: Sequence[int], device: torch.device, slots: int = 2):
        """blocks: all blocks of the model; those not in `swapped` must be on `device` already (see `move_resident`)."""
        self.order = sorted(swapped)
        self.device = device
        self.streams = device.type == "cuda"
        self.packed = {index: pack_block(blocks[index], pin=self.streams) for index in self.order}
        size = max((packed.host.numel() for packed in self.packed.values()), default=0)
        self.slots = [
            Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(min(slots, len(self.order)))
        ]
        self.copy_stream = torch.cuda.Stream(device) if self.streams else None
        if self.copy_stream is not None:
            # The buffers' memory may have been another tensor's, and will be: torch's allocator knows one stream by itself.
            self.copy_stream.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:
                slot.buffer.record_stream(self.copy_stream)
        self.copies = 0

    @property
    def host_bytes(self) -> int:
        return sum(packed.host.numel() for packed in self.packed.values())

    @property
    def device_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self.slots)

    def runner(self, run: BlockRunner) -> BlockRunner:
        """`run`, with the block's weights on the device when it starts and again when its backward starts.

        It goes outside of activation checkpointing: the recomputation then finds the weights that the backward fetched.
        """

        def swapped_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
            if index not in self.packed:
                return run(index, block, *inputs)
            self.prefetch(index, forward=True)
            streams = run(index, block, *inputs)
            if torch.is_grad_enabled() and any(stream.requires_grad for stream in streams):
                streams = cast("tuple[Tensor, ...]", PrefetchBackward.apply(self, index, *streams))
            return streams

        return swapped_run

    def prefetch(self, index: int, forward: bool) -> None:
        """Make block `index` ready on the device for work that is issued from now on, and start to fetch the one after it."""
        for slot in self.slots:
            if slot.in_use:  # whatever used it has been issued by now
                slot.in_use = False
                if self.streams:
                    slot.used = torch.cuda.current_stream(self.device).record_event(slot.used)
        slot = self._slot_of(index) or self._fetch(index, keep=None)
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        slot.in_use = True
        following = self._following(index, forward)
        if following is not None and self._slot_of(following) is None:
            self._fetch(following, keep=slot)

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.resident_block == index), None)

    def _following(self, index: int, forward: bool) -> int | None:
        """The swapped block that is needed next; after a forward without gradients the next one starts from the first block."""
        position = self.order.index(index) + (1 if forward else -1)
        if 0 <= position < len(self.order):
            return self.order[position]
        return self.order[0] if forward and not torch.is_grad_enabled() else None

    def _fetch(self, index: int, keep: Slot | None) -> Slot:
        """Start the copy of block `index` into a slot other than `keep`: an empty one, or that of the farthest block."""
        free = [slot for slot in self.slots if slot is not keep]
        if not free:  # a single slot: it is refilled when its turn comes
            return self.slots[0]
        slot = max(free, key=lambda s: float("inf") if s.resident_block is None else abs(s.resident_block - index))
        if slot.resident_block is not None:
            self.packed[slot.resident_block].rebind_storage(self.packed[slot.resident_block].host)
        packed = self.packed[index]
        target = slot.buffer[: packed.host.numel()]
        if self.copy_stream is None:
            target.copy_(packed.host)
        else:
            if slot.used is not None:
                self.copy_stream.wait_event(slot.used)
            with torch.cuda.stream(self.copy_stream):
                target.copy_(packed.host, non_blocking=True)
                slot.filled = self.copy_stream.record_event(slot.filled)
        packed.rebind_storage(slot.buffer)
        slot.resident_block = index
        self.copies += 1
        return slot


class PrefetchBackward(torch.autograd.Function):
    """The identity; its backward runs just before that of the block and fetches the block's weights."""

    @staticmethod
    def forward(ctx: Any, swapper: BlockSwapper, index: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.swapper, ctx.index = swapper, index
        ctx.set_materialize_grads(False)
        return tuple(stream.view_as(stream) for stream in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.swapper.prefetch(ctx.index, forward=False)
        return (None, None, *gradients)


def move_resident(model: nn.Module, blocks: Sequence[nn.Module], swapped: Sequence[int], device: torch.device) -> None:
    """Move everything but the swapped blocks to the device. The swapped ones stay where they are."""
    away = {id(tensor) for index in swapped for tensor in [*blocks[index].parameters(), *blocks[index].buffers()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
