"""Recompute pointwise steps: keep what matmuls and attention return for backward, compute norms, modulations and GELU again.

A block's norms, modulations, GELU and the joining of both streams' queries, keys and values are about half of what autograd
would keep, and some percent of the time. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.2, asks for
just that; here it works on single modules (`Pointwise`), with the values that a plain block has, to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.common.transformer import BlockRunner, Pointwise, TransformerBlock

Eager = Callable[..., Tensor]
"""A Pointwise module's forward."""


def recompute_pointwise(run: BlockRunner) -> BlockRunner:
    """`run`, keeping less for backward. Not for blocks that are checkpointed or compiled."""

    def recomputing_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return run(index, block, *inputs)
        recipes = _Recipes()
        with recomputed(cast(nn.Module, block), recipes.recompute), saved_tensors_hooks(recipes.pack, _unpack):
            return run(index, block, *inputs)

    return recomputing_run


@contextmanager
def recomputed(block: nn.Module, recompute: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, each Pointwise module of `block` runs as `recompute(eager forward, *inputs)`."""
    steps = [module for module in block.modules() if isinstance(module, Pointwise)]
    for step in steps:
        step.forward = partial(recompute, step.forward)
    try:
        yield
    finally:
        for step in steps:
            del step.forward  # the class's forward again


class _Recipe:
    """How to compute a tensor again: a module's forward, which may use frozen weights, and its inputs."""

    def __init__(self, eager: Eager, inputs: tuple[object, ...]):
        self.eager = eager
        self.inputs = [
            each.detach().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each for each in inputs
        ]
        self.made: Tensor | None = None

    def value(self) -> Tensor:
        """Made once for all who saved it."""
        if self.made is None:
            with torch.enable_grad():
                self.made = self.eager(*self.inputs)
        return self.made

    def gradients(self, gradient: Tensor) -> list[Tensor | None]:
        """With respect to the inputs. All who saved the value have been here by now: it is released, and the inputs too."""
        needed = [isinstance(each, Tensor) and each.requires_grad for each in self.inputs]
        trained = [each for each in self.inputs if isinstance(each, Tensor) and each.requires_grad]
        gradients = iter(torch.autograd.grad(self.value(), trained, gradient))
        self.made = None
        self.inputs.clear()  # autograd keeps what it calls until the whole pass is over
        return [next(gradients) if is_needed else None for is_needed in needed]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *inputs: object) -> Tensor:
        ctx.recipe = recipe
        return recipe.eager(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.recipe.gradients(gradients[0]))


@dataclass(frozen=True)
class _Packed:
    """A saved tensor that is a recipe's value, or a view of it."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recipes:
    """The recipes of one block's forward, by the storage of the tensors that they made."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Recipe]] = {}

    def recompute(self, eager: Eager, *inputs: object) -> Tensor:
        """eager(*inputs), not kept for backward by anyone. inputs: tensors, and modules that `eager` calls."""
        if not torch.is_grad_enabled():  # a step inside of another one, which is computed again as a whole
            return eager(*inputs)
        recipe = _Recipe(eager, inputs)
        out: Tensor = _Recomputed.apply(recipe, *inputs)
        storage = out.untyped_storage()
        key = storage._cdata
        # once the storage is gone its address may be another tensor's
        self._by_storage[key] = (weakref.ref(storage, lambda _: self._by_storage.pop(key, None)), recipe)
        return out

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        entry = self._by_storage.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return tensor
        return _Packed(entry[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _Packed) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.recipe.value().detach().as_strided(saved.size, saved.stride, saved.offset)
