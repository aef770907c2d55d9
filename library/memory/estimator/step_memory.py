"""What a training step keeps and needs, block by block, measured by running it on the meta device.

The real model, the real network and the real checkpointing run with shapes alone, under library.memory.estimator.tracker. Blocks that are
alike (same shapes, same LoRA) cost alike, so one of each kind runs and its costs count for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.common.transformer import BlockRunner, TransformerBlock, TransformerModel, call_block
from library.memory.checkpointing import CheckpointSettings, checkpointed
from library.memory.estimator.tracker import FusedAttention, StorageTracker
from library.memory.recompute import recompute_pointwise

POLICIES = ("none", "pointwise", "selective", "full")
META = torch.device("meta")
ModelInputs = Callable[[], tuple[Tensor, ...]]
"""Makes the inputs of a model's forward on the meta device; those that require gradients continue into what made them."""
BlockOf = Callable[[str], "int | None"]
"""A trained tensor's name -> the number of its block, or None where it belongs to none."""


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one block under one policy."""

    forward: int  # at most above what is there at its start, while it runs forward
    kept: int  # from its forward to its backward
    carried: int  # at the start of its backward beside what is kept: the gradients of both streams
    backward: int  # at most above what is there at the start of its backward


@dataclass(frozen=True)
class PassCost:
    """Bytes of forward and backward under one policy, beside weights."""

    before: int  # the batch and what the embedders keep
    blocks: tuple[BlockCost, ...]  # in the model's order
    head: int  # the final layer and the loss, at most


@dataclass(frozen=True)
class TrainingStep:
    """A denoiser on the meta device with its network attached, and what one step of them takes."""

    model: TransformerModel
    network: nn.Module
    inputs: ModelInputs
    block_of: BlockOf  # of the network's tensors
    trains_inputs: bool = False  # gradients pass through all blocks, into text encoders

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    def block_kinds(self) -> list[tuple[object, ...]]:
        """For each block what decides its cost: its tensors, its LoRA, and whether a gradient has to pass through it."""
        trained = self._trained_shapes()
        first = next((index for index, shapes in enumerate(trained) if shapes or self.trains_inputs), len(trained))
        kinds: list[tuple[object, ...]] = []
        for index, block in enumerate(self.model.blocks):
            shapes = tuple(tuple(tensor.shape) for tensor in block.parameters())
            position = "below" if index < first else "first" if index == first else "above"
            kinds.append((shapes, trained[index], position, index == 0))
        return kinds

    def _trained_shapes(self) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
        """The names and shapes of the trained tensors in each block."""
        shapes: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(self.depth)]
        for name, parameter in self.network.named_parameters():
            index = self.block_of(name)
            if index is not None and index < self.depth:
                shapes[index].append((name.split("_block_", 1)[-1], tuple(parameter.shape)))
        return [tuple(sorted(each)) for each in shapes]

    def trained_bytes(self) -> list[int]:
        """The bytes of the trained tensors in each block."""
        sizes = [0] * self.depth
        for name, parameter in self.network.named_parameters():
            index = self.block_of(name)
            if index is not None and index < self.depth:
                sizes[index] += parameter.numel() * parameter.element_size()
        return sizes

    def run(self, log: _Log) -> None:
        """Forward and backward with a mean squared error."""
        log.empty = log.tracker.live
        prediction = self.model(*self.inputs())
        log.end_of_blocks()
        loss = (prediction.float() - torch.zeros_like(prediction, dtype=torch.float32)).pow(2).mean()
        del prediction
        loss.backward()
        log.end_of_backward()


def measure_pass(step: TrainingStep, policy: str, device_type: str) -> PassCost:
    """Run one forward and backward on the meta device.

    policy: one of POLICIES. device_type: "cuda" or "cpu", whose attention counts.
    """
    model, network = step.model, step.network
    kinds = step.block_kinds()
    chosen = {kinds.index(kind) for kind in set(kinds)}
    log = _Log(StorageTracker(), _runner(policy, _with_attention_of(device_type)), chosen)
    log.tracker.watch([*model.parameters(), *model.buffers(), *network.parameters(), *network.buffers()])
    before, model.run_block = model.run_block, log.run
    try:
        with log.tracker:
            step.run(log)
    finally:
        model.run_block = before
        network.zero_grad(set_to_none=True)
    costs = log.costs(step.trained_bytes())
    return PassCost(log.before, tuple(costs[kinds.index(kind)] for kind in kinds), log.head)


def _runner(policy: str, run: BlockRunner) -> BlockRunner:
    if policy == "none":
        return run
    if policy == "pointwise":
        return recompute_pointwise(run)
    return checkpointed(run, CheckpointSettings(selective=policy == "selective"), None)


def _with_attention_of(device_type: str) -> BlockRunner:
    """Runs a block with that device's attention, when it is computed again in backward too (where torch leaves all modes)."""

    def run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        with FusedAttention(device_type):
            return call_block(index, block, *inputs)

    return run


class _Log:
    """Notes how much is alive when blocks begin and end, forward and backward."""

    def __init__(self, tracker: StorageTracker, run: BlockRunner, chosen: set[int]):
        self.tracker, self.inner, self.chosen = tracker, run, chosen
        self.empty = self.before = self.head = 0
        self.forward: dict[int, tuple[int, int]] = {}  # peak above the start, kept
        self.after_blocks = 0
        self.began: list[tuple[int, int, int]] = []  # block, alive at the start of its backward, peak until then
        self.streams = 0  # how many of a block's inputs it returns

    def run(self, index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        if index not in self.chosen:
            return inputs[: self.streams]
        start = self.tracker.live
        if not self.forward:
            self.before = start - self.empty
        self.tracker.restart()
        streams = self.inner(index, block, *inputs)
        self.streams = len(streams)
        self.forward[index] = (self.tracker.peak - start, self.tracker.live - start)
        if torch.is_grad_enabled() and any(stream.requires_grad for stream in streams):
            streams = cast("tuple[Tensor, ...]", _NoteBackward.apply(self, index, *streams))
        self.after_blocks = self.tracker.live
        self.tracker.restart()
        return streams

    def end_of_blocks(self) -> None:
        self.head = self.tracker.peak - self.after_blocks

    def begin_backward(self, index: int) -> None:
        if not self.began:
            self.head = max(self.head, self.tracker.peak - self.after_blocks)
        self.began.append((index, self.tracker.live, self.tracker.peak))
        self.tracker.restart()

    def end_of_backward(self) -> None:
        self.began.append((-1, self.tracker.live, self.tracker.peak))

    def costs(self, gradients: Sequence[int]) -> dict[int, BlockCost]:
        """gradients: bytes of the trained tensors of each block."""
        costs = {}
        later = 0  # of the blocks above: what they kept is gone, their gradients have come
        ends = {index: peak for (index, _, _), (_, _, peak) in zip(self.began, self.began[1:])}
        starts = {index: live for index, live, _ in self.began}
        for index in sorted(self.forward, reverse=True):
            above, kept = self.forward[index]
            if index in starts:
                carried = max(0, starts[index] - (self.after_blocks + later))
                costs[index] = BlockCost(above, kept, carried, ends[index] - starts[index])
                later += gradients[index] - kept
            else:  # nothing is trained below it: its output replaces its input
                costs[index] = BlockCost(above, 0, 0, 0)
        return costs


class _NoteBackward(torch.autograd.Function):
    """The identity; its backward runs just before that of the block."""

    @staticmethod
    def forward(ctx: Any, log: _Log, index: int, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.log, ctx.index = log, index
        ctx.set_materialize_grads(False)
        return tuple(stream.view_as(stream) for stream in streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.log.begin_backward(ctx.index)
        return (None, None, *gradients)


def measure_forward(model: TransformerModel, inputs: ModelInputs, device_type: str) -> int:
    """The most bytes that a forward without gradients takes beside weights: a preview's step."""
    before, streams = model.run_block, 0

    def run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal streams
        if index not in (0, len(model.blocks) - 1):
            return inputs[:streams]
        outputs = call_block(index, block, *inputs)
        streams = len(outputs)
        return outputs

    model.run_block = run
    try:
        return measure_call(model, lambda: model(*inputs()), device_type)
    finally:
        model.run_block = before


def measure_call(model: nn.Module, call: Callable[[], object], device_type: str, trained: bool = False) -> int:
    """The most bytes that `call`, which runs `model` on the meta device, takes beside weights. trained: with gradients."""
    tracker = StorageTracker()
    tracker.watch([*model.parameters(), *model.buffers()])
    start = tracker.live
    with FusedAttention(device_type), torch.set_grad_enabled(trained), tracker:
        outputs = call()
    del outputs
    return tracker.peak - start


def measure_encoder(encoder: nn.Module, batch: int, tokens: int, device_type: str, trained: bool) -> int:
    """The most bytes that a text encoder takes beside weights; of a trained one most of it stays for its backward."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
    return measure_call(encoder, lambda: encoder(input_ids=ids, output_hidden_states=True), device_type, trained)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, each counted once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
