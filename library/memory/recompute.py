"""Lean activations: what products and attention return is kept for backward, what is cheap to compute is computed again.

A block's norms, modulations, GELU and the joining of both streams' queries, keys and values are about half of what autograd
would keep, and some percent of the time. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.2, asks for
just that; here it works on single functions, with the values that a plain block has, to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from library.sd3.mmdit import BlockRunner, JointBlock, plainly


def lean(run: BlockRunner) -> BlockRunner:
    """`run`, keeping less for backward. Not for blocks that are checkpointed or compiled."""

    def lean_run(index: int, block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return run(index, block, context, x, c)
        recipes = _Recipes()
        block.cheaply = recipes.compute
        try:
            with saved_tensors_hooks(recipes.pack, _unpack):
                return run(index, block, context, x, c)
        finally:
            block.cheaply = plainly

    return lean_run


class _Recipe:
    """How to compute a tensor again: a function, which may use frozen weights of the block, and its inputs."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.function = function
        self.inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        self.made: Tensor | None = None

    def value(self) -> Tensor:
        """Made once for all who saved it."""
        if self.made is None:
            with torch.enable_grad():
                self.made = self.function(*self.inputs)
        return self.made

    def gradients(self, gradient: Tensor) -> list[Tensor | None]:
        """With respect to the inputs. All who saved the value have been here by now: it is let go, and the inputs too."""
        needed = [tensor.requires_grad for tensor in self.inputs]
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(self.value(), wanted, gradient))
        self.made = None
        self.inputs.clear()  # autograd keeps what it calls until the whole pass is over
        return [next(found) if is_needed else None for is_needed in needed]


class _Cheap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        return recipe.function(*inputs)

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
        self._by_storage: dict[int, tuple[weakref.ref[Any], _Recipe]] = {}

    def compute(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), not kept for backward by anyone."""
        recipe = _Recipe(function, inputs)
        out: Tensor = _Cheap.apply(recipe, *inputs)
        storage = out.untyped_storage()
        key = storage._cdata
        # once the storage is gone its address may be another tensor's
        self._by_storage[key] = (weakref.ref(storage, lambda _: self._by_storage.pop(key, None)), recipe)
        return out

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _Packed(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _Packed) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.recipe.value().detach().as_strided(saved.size, saved.stride, saved.offset)
