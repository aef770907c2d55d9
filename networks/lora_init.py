"""How a LoRA's factors start: empty, Kaiming or orthogonal with a zero Up, or PiSSA."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from networks.network_layer import BaseLayer

PISSA_OVERSAMPLING = 8  # Halko et al. 2011, section 4.2: some more random vectors than the rank
PISSA_ITERATIONS = 4  # as PEFT's fast PiSSA; any start is exact here, a finer one is not worth the time


def empty_factors(layer: BaseLayer, rows: int, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Down [rows, in, ...] and Up [out, rank, ...] without values, in float32; Down of a convolution has its kernel, stride and padding.

    On the CPU; on the meta device for a layer of the meta device, where only the sizes count.
    """
    skip_init = partial(nn.utils.skip_init, device="meta" if layer.weight.is_meta else "cpu")
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise ValueError(f"no LoRA for a convolution with groups={layer.groups}, padding_mode={layer.padding_mode}")
        shape = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        return (
            skip_init(nn.Conv2d, layer.in_channels, rows, bias=False, **shape),
            skip_init(nn.Conv2d, rank, layer.out_channels, kernel_size=1, bias=False),
        )
    return (
        skip_init(nn.Linear, layer.in_features, rows, bias=False),
        skip_init(nn.Linear, rank, layer.out_features, bias=False),
    )


def init_factors_(down: Tensor, up: Tensor, init: str) -> None:
    """Random Down and zero Up, so that training starts at the base model."""
    nn.init.zeros_(up)
    if init == "orthogonal":
        # orthogonal directions, each of the length that Kaiming's rows have on average
        nn.init.orthogonal_(down.view(down.shape[0], -1), gain=1 / math.sqrt(3))
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))


def init_pissa_(down: Tensor, up: Tensor, weight: Tensor, rank: int, parts: int, scale: float) -> None:
    """scale * Up @ Down = the principal part of the weight [out, in, ...] (Meng et al. 2024, "PiSSA", equation 2), part by part.

    The paper subtracts that part from the base weight. Here the weight stays, and `LoRALayer.factors` subtracts the start:
    the same function and gradients, for a base that may be swapped or quantized, and whose readers have it unchanged.
    Dropout drops ranks of the change alone, never of the principal part.
    """
    weights = weight.flatten(1).chunk(parts, dim=0)  # each [out / parts, in]
    downs = down.flatten(1).chunk(len(weights), dim=0)  # views, each [rank, in]
    ups = up.flatten(1).chunk(len(weights), dim=0)  # views, each [out / parts, rank]
    for weight_part, down_part, up_part in zip(weights, downs, ups):
        oversampled = min(rank + PISSA_OVERSAMPLING, *weight_part.shape)
        u, s, v = torch.svd_lowrank(weight_part, q=oversampled, niter=PISSA_ITERATIONS)
        count = min(rank, s.shape[0])  # with a rank above the layer's own, some pairs keep their random start
        root = (s[:count] / scale).sqrt()
        down_part[:count] = root[:, None] * v[:, :count].t()
        up_part[:, :count] = u[:, :count] * root
