"""Frozen base weights in fewer bits: float8 or int8 with a scale for each row, or nf4 with a scale for each 64 weights.

Matmuls are computed in the model's own dtype: weights are dequantized when they are used, in forward and again in
backward, so that autograd never keeps a wide copy and block swap may move the narrow one in between. Only the linear
layers inside the blocks (or of an encoder) are quantized: they are nearly all of the weights; embedders, norms and
the final layer stay as they are. The exception is Fp8MatmulLinear, an option of its own: its forward multiplies float8
matrices. int8 and nf4 are bitsandbytes' formats and kernels; its own layers are not used because
they hold on to the weight's storage between forward and backward, which block swap reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_MAX = 448.0  # the largest float8_e4m3fn
INT8_MAX = 127.0
NF4_BLOCK = 64
MODULATION = "adaLN"  # DiT's name for the layers that compute shifts, scales and gates

Dequantize = Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a narrow weight and a scale; a subclass says how to quantize and how to dequantize."""

    weight_scale: Tensor
    shape: torch.Size  # [out, in] of the wide weight
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]  # the wide weight -> the narrow one and its scales
    dequantize: Dequantize  # back to the weight that they stand for

    @classmethod
    def of(cls, layer: nn.Linear) -> QuantizedLinear:
        """Take over a layer's weight and bias."""
        new = cls(1, 1, bias=False, device="meta")
        new.in_features, new.out_features, new.shape = layer.in_features, layer.out_features, layer.weight.shape
        weight, scale = cls.quantize(layer.weight.data)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = layer.bias
        new.register_buffer("weight_scale", scale)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in the compute dtype -> [..., out]."""
        product = _DequantizedLinear.apply(x, self.weight, self.weight_scale, self.bias, self.shape, self.dequantize)
        return cast(Tensor, product)


class _DequantizedLinear(torch.autograd.Function):
    """x W^T + b with W dequantized on use; the gradient reaches x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        dequantize: Dequantize,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.dequantize = shape, dequantize
        return F.linear(x, dequantize(weight, scale, shape, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradient @ ctx.dequantize(weight, scale, ctx.shape, gradient.dtype), None, None, None, None, None


class Fp8Linear(QuantizedLinear):
    """float8_e4m3fn, each row scaled so that its largest entry is 448. A float8 checkpoint is kept bit for bit, with scale 1."""

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        if weight.dtype == torch.float8_e4m3fn:
            return weight, torch.ones(weight.shape[0], 1, device=weight.device)
        wide = weight.float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_MAX
        return (wide / scale).to(torch.float8_e4m3fn), scale

    @staticmethod
    def dequantize(weight: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * scale.to(dtype)


class Fp8MatmulLinear(Fp8Linear):
    """As Fp8Linear, but activations become float8 too, each token with a scale of its own, and the matmul is one of float8.

    Micikevicius et al. 2022, "FP8 Formats for Deep Learning": e4m3 for weights and activations. A GPU sums in its fast
    accumulator, which is shorter than float32. The backward pass dequantizes the weight: the gradient to the activations is not rounded. Needs `fp8_matmul_problems` to be empty.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in the compute dtype -> [..., out]."""
        rows = x.flatten(0, -2)  # [N, in]
        tokens, token_scale = Fp8Linear.quantize(rows.detach())
        product = _Fp8Matmul.apply(rows, tokens, token_scale, self.weight, self.weight_scale)  # [N, out]
        out = product if self.bias is None else product + self.bias.to(x.dtype)
        return cast(Tensor, out).view(*x.shape[:-1], self.out_features)


class _Fp8Matmul(torch.autograd.Function):
    """x W^T of float8 matrices; the gradient reaches x [N, in] alone, as if x had not been rounded to `tokens` [N, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        # the GPU's kernel for row-wise scales returns bfloat16 alone
        returned = torch.bfloat16 if x.device.type == "cuda" else x.dtype
        return torch._scaled_mm(
            tokens, weight.t(), scale_a=token_scale, scale_b=scale.t(), out_dtype=returned, use_fast_accum=True
        ).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        wide = Fp8Linear.dequantize(weight, scale, weight.shape, gradient.dtype)
        return gradient @ wide, None, None, None, None


def fp8_matmul_problems(device: torch.device) -> list[str]:
    """What keeps `device` from multiplying float8 matrices, a sentence; empty where it can (a CPU can, slowly)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return [f"--fp8_matmul: {name} has no float8 products (they came with Ada and Hopper). Leave it out."]
    return []


class Int8Linear(QuantizedLinear):
    """int8, each row scaled so that its largest entry is 127 (bitsandbytes' row-wise int8)."""

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        import bitsandbytes.functional as bnb

        wide = weight.to(torch.float16) if weight.device.type == "cuda" else weight.float()  # what its kernels take
        narrow, largest, _ = bnb.int8_vectorwise_quant(wide)
        return narrow, largest.float()[:, None] / INT8_MAX

    @staticmethod
    def dequantize(weight: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * scale.to(dtype)


class Nf4Linear(QuantizedLinear):
    """4-bit NormalFloat in blocks of 64 (Dettmers et al. 2023, "QLoRA", section 3), by bitsandbytes' kernels."""

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        import bitsandbytes.functional as bnb

        wide = weight if weight.dtype in (torch.float32, torch.float16, torch.bfloat16) else weight.float()
        narrow, state = bnb.quantize_4bit(wide.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        return narrow, state.absmax

    @staticmethod
    def dequantize(weight: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        state = bnb.QuantState(absmax=scale, shape=shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        # The kernels know nf4's sixteen values: the table (state.code) stays away, for sending it would wait for the device.
        return bnb.dequantize_4bit(weight, state)


KINDS: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}


# On the meta device: the sizes of the real layers, without the kernels that need real weights.


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


def quantize(
    model: nn.Module,
    kind: str,
    within: Callable[[str], bool] = lambda path: True,
    device: torch.device | None = None,
    fp8_matmul: bool = False,
) -> int:
    """Replace the linear layers whose path satisfies `within`. kind: "fp8", "int8" or "nf4". Returns how many were replaced.

    With `device` each layer is quantized there and comes back, so that a GPU does the work and holds one wide layer at a time.
    fp8_matmul (with "fp8"): layers that work on tokens multiply in float8. Those of the modulation, which see one vector an image
    and steer all tokens of it, do not.
    """
    if not fp8_matmul:
        return replace_linears(model, KINDS[kind], within, device)
    on_tokens = replace_linears(model, Fp8MatmulLinear, lambda path: within(path) and MODULATION not in path, device)
    return on_tokens + replace_linears(model, Fp8Linear, within, device)


def quantize_blocks(
    blocks: Iterable[nn.Module], kind: str, device: torch.device | None = None, fp8_matmul: bool = False
) -> int:
    """Quantize a transformer's blocks, which hold nearly all of its weights, and leave the layers around them."""
    return sum(quantize(block, kind, device=device, fp8_matmul=fp8_matmul) for block in blocks)


def replace_linears(
    model: nn.Module,
    kind: type[QuantizedLinear],
    within: Callable[[str], bool] = lambda path: True,
    device: torch.device | None = None,
) -> int:
    """As `quantize`, by class."""
    replaced = 0
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear) and within(path):
            home = layer.weight.device
            new = kind.of(layer.to(device) if device is not None else layer).to(home)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
            replaced += 1
    return replaced
