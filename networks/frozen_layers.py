"""What a network may ask of a frozen layer, whatever its storage: its weight, and products with it."""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

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
    """The effective weight in float32 [out, in, ...]; that of a quantised Linear is what it does to the unit vectors."""
    weight = plain_weight(layer)
    if weight is not None:
        return weight.float()
    assert isinstance(layer, nn.Linear)
    device = layer.weight.device
    identity = torch.eye(layer.in_features, device=device, dtype=_compute_dtype(layer))
    bias = torch.zeros((), device=device) if layer.bias is None else layer.bias.float()
    return (layer.forward(identity).float() - bias).t().contiguous()


def left_product(u: Tensor, layer: FrozenLayer) -> Tensor:
    """u [rows, out] times the weight [out, in] -> [rows, in] in float32, without a gradient.

    A quantised Linear gives it as the vector-Jacobian product of its own forward.
    """
    weight = plain_weight(layer)
    if weight is not None:
        return (u.detach().to(weight.dtype) @ weight.flatten(1)).float()
    assert isinstance(layer, nn.Linear)
    with torch.enable_grad():
        probe = torch.zeros(
            u.shape[0], layer.in_features, device=u.device, dtype=_compute_dtype(layer), requires_grad=True
        )
        out = layer.forward(probe)
        (product,) = torch.autograd.grad(out, probe, u.detach().to(out.dtype))
    return product.float()


def _compute_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype of activations that a quantised layer takes: its bias tells, float32 where it has none."""
    return torch.float32 if layer.bias is None else layer.bias.dtype
