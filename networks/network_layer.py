"""One adapted layer: the base layer as an adapter may read it, and what every kind of adapter does.

`BaseLayer` is the frozen Linear or Conv2d, whatever its storage; `NetworkLayer` is a trained change of it, added by a forward
hook. The kinds: lora.py, dora.py, lycoris.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from library.memory.quantization import QuantizedLinear

BaseLayer: TypeAlias = nn.Linear | nn.Conv2d
PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_target(module: nn.Module) -> TypeGuard[BaseLayer]:
    """Whether an adapter can act on the module. Quantized layers count: they are kinds of nn.Linear."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def plain_weight(layer: BaseLayer) -> Tensor | None:
    """The weight itself, where it is stored as plain floats; None where it is quantized or packed."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d):
        return weight.detach()
    shape = (layer.out_features, layer.in_features)
    return weight.detach() if weight.dtype in PLAIN_DTYPES and weight.shape == shape else None


@torch.no_grad()
def dense_weight(layer: BaseLayer) -> Tensor:
    """The effective weight in float32 [out, in, ...]; of a quantized Linear, the one that its matmul uses."""
    weight = plain_weight(layer)
    return (_dequantized(layer) if weight is None else weight).float()


@torch.no_grad()
def left_matmul(u: Tensor, layer: BaseLayer) -> Tensor:
    """u [rows, out] times the weight [out, in] -> [rows, in] in float32, without a gradient."""
    weight = plain_weight(layer)
    weight = _dequantized(layer) if weight is None else weight
    return (u.to(weight.dtype) @ weight.flatten(1)).float()


def _dequantized(layer: BaseLayer) -> Tensor:
    """A quantized layer's weight in the dtype of its bias, which is that of its activations; float32 where it has no bias."""
    assert isinstance(layer, QuantizedLinear)
    dtype = torch.float32 if layer.bias is None else layer.bias.dtype
    return layer.dequantize(layer.weight, layer.weight_scale, layer.shape, dtype)


class NetworkLayer(nn.Module, ABC):
    """Hold the base layer without owning it: its weights are no part of this module's state or parameters."""

    fp32_tensors: tuple[str, ...] = ("alpha",)  # stay float32 when the factors are trained in bfloat16

    def __init__(self, layer: BaseLayer):
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that the base layer is no submodule of this one
        self._handles: list[RemovableHandle] = []
        self.multiplier = 1.0
        self.enabled = True

    @property
    def layer(self) -> BaseLayer:
        return self._layer[0]

    def attach(self) -> None:
        """Hook onto the base layer, once."""
        if not self._handles:
            self._handles.append(self.layer.register_forward_hook(self._after_layer))

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    @abstractmethod
    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The base layer's input and output, [B, ..., in] and [B, ..., out] or images -> the changed output."""

    @abstractmethod
    def export_state(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This layer's tensors in a LoRA file, by suffix, as trained.

        values: parameters by name to use in place of this layer's own (those of an EMA, for example).
        """

    @abstractmethod
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in the form and shapes of `export_state`. A missing alpha means strength 1."""

    @abstractmethod
    def check_compatible(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why a file's tensors, of the right names and shapes, can't be this layer's, or None."""

    @abstractmethod
    def clip_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Shrink the change D so that its Frobenius norm n is at most max_norm: D * min(n, max_norm) / n.

        Returns 0-dim tensors on the device, unread: the norm afterwards, and whether it was shrunk. UserError where the kind
        of layer can't.
        """

    def summary(self) -> tuple[str, str]:
        """Rank and alpha as the table of layers shows them."""
        return "", ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NetworkLayer:
        """As nn.Module (`.to()`, `.bfloat16()` …), but `fp32_tensors` keep their dtype and values."""
        before = {name: getattr(self, name).data.float() for name in self.fp32_tensors if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, data in before.items():
            tensor = getattr(self, name)
            tensor.data = data.to(tensor.device)
        return self

    def _after_layer(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return self(args[0], out) if self.enabled else None
