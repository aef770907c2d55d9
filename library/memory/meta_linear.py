"""Quantized layers on the meta device: the sizes of the real ones, without the kernels that need real weights."""

from __future__ import annotations

import torch
from torch import Tensor

from library.memory.quantization import NF4_BLOCK, Fp8Linear, Int8Linear, QuantizedLinear


class MetaInt8Linear(Int8Linear):
    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(weight, dtype=torch.int8), torch.empty(weight.shape[0], 1, device=weight.device)


class MetaNf4Linear(QuantizedLinear):
    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
        return packed, torch.empty(-(-weight.numel() // NF4_BLOCK), device=weight.device)

    @staticmethod
    def dequantize(weight: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)


META_KINDS: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": MetaInt8Linear, "nf4": MetaNf4Linear}
