"""What a training step keeps and needs, block by block, found by running it on the meta device.

The real model, the real network and the real checkpointing run with shapes alone, under library.memory.estimator.tracker. Blocks that are
alike (same shapes, same LoRA) cost alike, so one of each kind runs and the others are reckoned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.memory.checkpointing import CheckpointSettings, checkpointed
from library.memory.estimator.tracker import FusedAttention, StorageTracker
from library.memory.recompute import lean
from library.sd3.mmdit import BlockRunner, JointBlock, MMDiT, call_block
from library.sd3.vae import Vae

POLICIES = ("none", "lean", "selective", "full")
META = torch.device("meta")


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

    @property
    def streams(self) -> int:
        """Tokens of both streams of the batch."""
        return self.batch * (self.height // 16 * (self.width // 16) + self.context_tokens)


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one block under one policy."""

    forward: int  # at most above what is there at its start, while it runs forward
    kept: int  # from its forward to its backward
    carried: int  # at the start of its backward beside what is kept: the gradients of both streams
    backward: int  # at most above what is there at the start of its backward


@dataclass(frozen=True)
class BlockWork:
    """Operations of one block's forward."""

    products: float
    attention: float


@dataclass(frozen=True)
class PassCost:
    """Bytes of forward and backward under one policy, beside weights."""

    before: int  # the batch and what the embedders keep
    blocks: tuple[BlockCost, ...]  # in the model's order
    head: int  # the final layer and the loss, at most


def block_kinds(model: MMDiT, network: nn.Module, trains_text: bool) -> list[tuple[Any, ...]]:
    """For each block what decides its cost: its tensors, its LoRA, and whether a gradient has to pass through it."""
    trained = lora_shapes(network, len(model.joint_blocks))
    first = next((index for index, shapes in enumerate(trained) if shapes or trains_text), len(trained))
    kinds = []
    for index, block in enumerate(model.joint_blocks):
        shapes = tuple(tuple(tensor.shape) for tensor in block.parameters())
        place = "below" if index < first else "first" if index == first else "above"
        kinds.append((shapes, trained[index], place, index == 0))
    return kinds


def lora_shapes(network: nn.Module, depth: int) -> list[tuple[Any, ...]]:
    """The shapes of the trained tensors in each block."""
    found: list[list[Any]] = [[] for _ in range(depth)]
    for name, parameter in network.named_parameters():
        index = block_of(name)
        if index is not None and index < depth:
            found[index].append((name.split("_block_", 1)[-1], tuple(parameter.shape)))
    return [tuple(sorted(shapes)) for shapes in found]


def block_of(name: str) -> int | None:
    """The number of the block that a LoRA name belongs to; None for encoders, embedders and the final layer."""
    _, found, rest = name.partition("joint_blocks_")
    return int(rest.split("_", 1)[0]) if found else None


def measure_pass(model: MMDiT, network: nn.Module, policy: str, shape: StepShape, device_type: str) -> PassCost:
    """Run one forward and backward on the meta device. `model` and `network` are there, and the network is attached.

    policy: one of POLICIES. device_type: "cuda" or "cpu", whose attention is meant.
    """
    kinds = block_kinds(model, network, shape.trains_text)
    chosen = {kinds.index(kind) for kind in set(kinds)}
    log = _Log(StorageTracker(), _runner(policy, _with_attention_of(device_type)), chosen)
    log.tracker.watch([*model.parameters(), *model.buffers(), *network.parameters(), *network.buffers()])
    before, model.run_block = model.run_block, log.run
    try:
        with log.tracker:
            _forward_and_backward(model, shape, log)
    finally:
        model.run_block = before
        network.zero_grad(set_to_none=True)
    costs = log.costs(lora_bytes(network, len(kinds)))
    return PassCost(log.before, tuple(costs[kinds.index(kind)] for kind in kinds), log.head)


def _runner(policy: str, run: BlockRunner) -> BlockRunner:
    if policy in ("none", "lean"):
        return run if policy == "none" else lean(run)
    return checkpointed(run, CheckpointSettings(selective=policy == "selective"), None)


def _with_attention_of(device_type: str) -> BlockRunner:
    """Runs a block with that device's attention, when it is computed again in backward too (where torch leaves all modes)."""

    def run(index: int, block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        with FusedAttention(device_type):
            return call_block(index, block, context, x, c)

    return run


def lora_bytes(network: nn.Module, depth: int) -> list[int]:
    """The bytes of the trained tensors in each block."""
    sizes = [0] * depth
    for name, parameter in network.named_parameters():
        index = block_of(name)
        if index is not None and index < depth:
            sizes[index] += parameter.numel() * parameter.element_size()
    return sizes


def _forward_and_backward(model: MMDiT, shape: StepShape, log: _Log) -> None:
    log.empty = log.tracker.live
    velocity = model(*_inputs(model, shape))
    log.end_of_blocks()
    loss = (velocity.float() - torch.zeros_like(velocity, dtype=torch.float32)).pow(2).mean()
    del velocity
    loss.backward()
    log.end_of_backward()


def _inputs(model: MMDiT, shape: StepShape) -> tuple[Tensor, ...]:
    config = model.config
    size = (shape.batch, config.in_channels, shape.height // 8, shape.width // 8)
    return (
        torch.empty(size, device=META),
        torch.empty(shape.batch, device=META),
        torch.empty(
            (shape.batch, shape.context_tokens, config.context_size),
            device=META,
            dtype=model.dtype,
            requires_grad=shape.trains_text,
        ),
        torch.empty(shape.batch, config.pooled_size, device=META, dtype=model.dtype),
    )


class _Log:
    """Notes how much is alive when blocks begin and end, forward and backward."""

    def __init__(self, tracker: StorageTracker, run: BlockRunner, chosen: set[int]):
        self.tracker, self.inner, self.chosen = tracker, run, chosen
        self.empty = self.before = self.head = 0
        self.forward: dict[int, tuple[int, int]] = {}  # peak above the start, kept
        self.after_blocks = 0
        self.began: list[tuple[int, int, int]] = []  # block, alive at the start of its backward, peak until then

    def run(self, index: int, block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self.chosen:
            return context, x
        start = self.tracker.live
        if not self.forward:
            self.before = start - self.empty
        self.tracker.restart()
        context, x = self.inner(index, block, context, x, c)
        self.forward[index] = (self.tracker.peak - start, self.tracker.live - start)
        if torch.is_grad_enabled() and (x.requires_grad or context.requires_grad):
            context, x = _NoteBackward.apply(self, index, context, x)
        self.after_blocks = self.tracker.live
        self.tracker.restart()
        return context, x

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
        found = {}
        later = 0  # of the blocks above: what they kept is gone, their gradients have come
        ends = {index: peak for (index, _, _), (_, _, peak) in zip(self.began, self.began[1:])}
        starts = {index: live for index, live, _ in self.began}
        for index in sorted(self.forward, reverse=True):
            above, kept = self.forward[index]
            if index in starts:
                carried = max(0, starts[index] - (self.after_blocks + later))
                found[index] = BlockCost(above, kept, carried, ends[index] - starts[index])
                later += gradients[index] - kept
            else:  # nothing is trained below it: its output takes the place of its input
                found[index] = BlockCost(above, 0, 0, 0)
        return found


class _NoteBackward(torch.autograd.Function):
    """The identity; its backward runs just before that of the block."""

    @staticmethod
    def forward(ctx: Any, log: _Log, index: int, context: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.log, ctx.index = log, index
        ctx.set_materialize_grads(False)
        return context.view_as(context), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.log.begin_backward(ctx.index)
        return (None, None, *gradients)


def measure_forward(model: MMDiT, shape: StepShape, device_type: str) -> int:
    """The most bytes that a forward without gradients takes beside weights: a preview's step."""
    tracker = StorageTracker()
    tracker.watch([*model.parameters(), *model.buffers()])
    start, before = tracker.live, model.run_block

    def run(index: int, block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return call_block(index, block, context, x, c) if index in (0, len(model.joint_blocks) - 1) else (context, x)

    model.run_block = run
    try:
        with FusedAttention(device_type), torch.no_grad(), tracker:
            model(*_inputs(model, shape))
    finally:
        model.run_block = before
    return tracker.peak - start


def measure_vae(vae: Vae, method: str, shape: tuple[int, ...], device_type: str) -> int:
    """The most bytes that `encode` of images [B, 3, H, W] or `decode` of latents [B, 16, h, w] takes beside weights."""
    tracker = StorageTracker()
    tracker.watch([*vae.parameters(), *vae.buffers()])
    start = tracker.live
    with FusedAttention(device_type), torch.no_grad(), tracker:
        cast(Any, getattr(vae, method))(torch.empty(shape, device=META))
    return tracker.peak - start


def measure_encoder(encoder: nn.Module, batch: int, tokens: int, device_type: str, trained: bool) -> int:
    """The most bytes that a text encoder takes beside weights; of a trained one most of it stays for its backward."""
    tracker = StorageTracker()
    tracker.watch([*encoder.parameters(), *encoder.buffers()])
    start = tracker.live
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
    with FusedAttention(device_type), torch.set_grad_enabled(trained), tracker:
        kept = encoder(input_ids=ids, output_hidden_states=True)
    del kept
    return tracker.peak - start


def block_work(model: MMDiT, shape: StepShape) -> list[BlockWork]:
    """Operations of each block's forward: two for each product of a weight and a token, four for each pair and channel."""
    image, text = shape.streams - shape.batch * shape.context_tokens, shape.batch * shape.context_tokens
    width, found = model.config.hidden_size, []
    for block in cast(Sequence[JointBlock], model.joint_blocks):
        halves = ((block.x_block, image), (block.context_block, text))
        products = sum(
            2.0 * layer.in_features * layer.out_features * (shape.batch if "adaLN" in path else tokens)
            for half, tokens in halves
            for path, layer in half.named_modules()
            if isinstance(layer, nn.Linear)
        )
        pairs = (image + text) ** 2 + (image**2 if block.x_block.attn2 is not None else 0)
        found.append(BlockWork(products, 4.0 * pairs * width / shape.batch))
    return found


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, each counted once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
