"""How many bytes of tensors are alive, and were at most: of real tensors, or of tensors on the meta device that hold nothing.

On the meta device a whole training step runs through the very code that trains, with shapes alone: what it would allocate on
a GPU is counted without one. Attention needs help there: without a device torch would take its slowest form, which keeps a
matrix of all pairs, so the fused form that the device has is called by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # bytes; torch's CUDA allocator hands out multiples of it
FLASH_HEAD_SIZE = 256  # flash attention takes no larger heads


class StorageTracker(TorchDispatchMode):
    """Inside it, `live` is the bytes of all tensors that were made in it (or passed to `watch`) and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already. Tensors that share their storage count once."""
        for tensor in tensors:
            self._count(tensor)

    def restart(self) -> None:
        """Let `peak` begin again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        arguments: tuple[object, ...] = (),
        keywords: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*arguments, **(keywords or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class FusedAttention(TorchFunctionMode):
    """Inside it, attention on the meta device is the fused kernel of a device: it keeps its inputs, its output and a number a row."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.nn.functional.scaled_dot_product_attention and arguments[0].is_meta:
            return self._attention(*arguments[:3])
        return func(*arguments, **(keywords or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        aten = torch.ops.aten
        if self.device_type == "cpu":
            out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        elif q.dtype == torch.float32 or q.shape[-1] > FLASH_HEAD_SIZE:
            keep_sums = torch.is_grad_enabled() and q.requires_grad
            out = aten._scaled_dot_product_efficient_attention(q, k, v, None, keep_sums)[0]
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return cast(Tensor, out)
