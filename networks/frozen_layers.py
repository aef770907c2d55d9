"""What a network may ask of a frozen layer, whatever its storage: its weight, and products with it."""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from library.memory.quantization import QuantisedLinear

FrozenLayer: TypeAlias = nn.Linear | nn.Conv2d
PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_target(module: nn.Module) -> TypeGuard[FrozenLayer]:
    """Whether a network can act on the module. Quantised layers count: they are kinds of nn.Linear."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def plain_weight(layer: FrozenLayer) -> Tensor | None:
    """The weight itself, where it is stored as plain floats; None where it is quantised or packed."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d):
        return weight.detach()
    shape = (layer.out_features, layer.in_features)
    return weight.detach() if weight.dtype in PLAIN_DTYPES and weight.shape == shape else None


@torch.no_grad()
def dense_weight(layer: FrozenLayer) -> Tensor:
    """The effective weight in float32 [out, in, ...]: of a quantised Linear what its products are computed with."""
    weight = plain_weight(layer)
    return (_widened(layer) if weight is None else weight).float()


@torch.no_grad()
def left_product(u: Tensor, layer: FrozenLayer) -> Tensor:
    """u [rows, out] times the weight [out, in] -> [rows, in] in float32, without a gradient."""
    weight = plain_weight(layer)
    weight = _widened(layer) if weight is None else weight
    return (u.to(weight.dtype) @ weight.flatten(1)).float()


def _widened(layer: FrozenLayer) -> Tensor:
    """A quantised layer's weight in the dtype of activations that it takes: its bias tells, float32 where it has none."""
    assert isinstance(layer, QuantisedLinear)
    dtype = torch.float32 if layer.bias is None else layer.bias.dtype
    return layer.widen(layer.weight, layer.weight_scale, layer.shape, dtype)
