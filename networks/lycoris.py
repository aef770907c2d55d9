"""One of LyCORIS's algorithms as a network layer: its parameters and start are LyCORIS's, the rest is shared.

Factored algorithms (LoCon, LoHa, LoKr, GLoRA) act on activations and never read the base weight. For the others, and for
DoRA, the hook makes the changed weight as a reader of the file would (networks.merging), in float32: LyCORIS's own forward
adds the change in the base weight's dtype, where bfloat16 loses most of it, and without autocast mixes dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.common.errors import UserError
from networks.merging import merged_weight, weight_change
from networks.network_layer import NetworkLayer, dense_weight, plain_weight

FACTORED_MODULES = ("locon", "loha", "kron", "glora")  # kron is LoKr
ROTATIONS = ("diag-oft", "boft")


class LycorisLayer(NetworkLayer):
    fp32_tensors = ("alpha", "dora_scale")

    def __init__(self, inner: Any, bypass: bool, module_dropout: float = 0.0):
        """inner: a module of lycoris.modules, made for the base layer and not applied to it.

        bypass: act on activations where the algorithm can.
        """
        super().__init__(inner.org_module[0])
        self._inner = (inner,)
        # LyCORIS's modules fold and convert in their state_dict and load hooks; sharing their tables keeps the state plain
        self._parameters, self._buffers, self._modules = inner._parameters, inner._buffers, inner._modules
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self.module_dropout = module_dropout
        self.factored = bypass and inner.name in FACTORED_MODULES and not getattr(inner, "wd", False)
        if not self.factored and plain_weight(self.layer) is None:
            raise UserError(f"LyCORIS {inner.name} rebuilds weights and can't do that with a quantised base model.")
        self.float()  # masters, whatever the base's dtype
        if inner.name == "full":
            inner._org_weight, inner.org_bias = [], None  # LyCORIS's copy of the base weight, which is not needed here
        if inner.name == "glora":
            inner.alpha.fill_(inner.scale * inner.lora_dim)  # LyCORIS leaves out rs_lora's share

    @property
    def inner(self) -> Any:
        return self._inner[0]

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        self.inner.training = self.training  # LyCORIS's dropout asks its own module, which is no submodule of this one
        if self.factored:
            change = (
                self._glora(x) if self.inner.name == "glora" else self.inner.bypass_forward_diff(x, self.multiplier)
            )
        else:
            change = self._rebuilt(x)
        if self.training and self.module_dropout:
            change = change * (torch.rand((), device=x.device) >= self.module_dropout).to(change.dtype)
        return out + change.to(out.dtype)

    def export_state(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if not values:
            return self._own_tensors()
        with self._holding(values):
            # detached: a parameter itself would hold its own value again when the block is left
            return {suffix: tensor.detach() for suffix, tensor in self._own_tensors().items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        if self.inner.name == "full":
            tensors = {"diff": self.inner.weight}
            return tensors if self.inner.bias is None else tensors | {"diff_b": self.inner.bias}
        if self.inner.name in ROTATIONS:
            return {"oft_blocks": self.inner.oft_blocks, "alpha": self.inner.alpha.float()}
        own: dict[str, Tensor] = self.inner.custom_state_dict()
        return own

    def check_compatible(self, tensors: Mapping[str, Tensor]) -> str | None:
        return None

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        inner = self.inner
        if inner.name == "full":
            tensors = {{"diff": "weight", "diff_b": "bias"}[suffix]: tensor for suffix, tensor in tensors.items()}
        own = dict(self.named_parameters())
        for suffix, tensor in tensors.items():
            if suffix != "alpha":
                own[suffix].copy_(tensor)
        if isinstance(getattr(inner, "scalar", None), Tensor):
            inner.scalar.fill_(1.0)  # files have it folded in
        if inner.name in FACTORED_MODULES and not (getattr(inner, "use_w1", False) and getattr(inner, "use_w2", False)):
            inner.alpha.fill_(float(tensors.get("alpha", inner.lora_dim)))
            inner.scale = float(inner.alpha) / inner.lora_dim

    @torch.no_grad()
    def clip_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        if self.inner.name in ROTATIONS:
            raise UserError(f"--scale_weight_norms can't cap {self.inner.name}, whose change is a rotation.")
        norm = weight_change(self.export_state(), dense_weight(self.layer)).norm()
        ratio = (max_norm / norm.clamp(min=max_norm / 2)).clamp(max=1.0)
        factors = [p for name, p in self.named_parameters() if name not in ("dora_scale", "scalar")]
        # the change is a product of all its factors; GLoRA's is a sum of two such pairs, a full difference is one by itself
        count = {"glora": 2, "full": 1}.get(self.inner.name, len(factors))
        for factor in factors:
            factor.mul_(ratio ** (1 / count))
        return norm * ratio, ratio < 1

    def summary(self) -> tuple[str, str]:
        rank = getattr(self.inner, "lora_dim", None)
        return (self.inner.name, "") if rank is None else (f"{self.inner.name} {rank}", f"{self.inner.scale * rank:g}")

    def _glora(self, x: Tensor) -> Tensor:
        """strength * (W A1 A2 + B1 B2) x for a Linear, with W A1 made by the base layer itself, whatever its storage."""
        a1, a2, b1, b2 = (getattr(self.inner, name).weight.flatten(1).to(x.dtype) for name in ("a1", "a2", "b1", "b2"))
        if isinstance(self.layer, nn.Conv2d):
            return self._rebuilt(x)
        through = self.layer.forward(a1.t())  # [rank, out]
        if self.layer.bias is not None:
            through = through - self.layer.bias
        scalar = self.inner.scalar.to(x.dtype)
        z = torch.cat([F.linear(x, a2), F.linear(x, b2)], dim=-1)  # [B, ..., 2 rank]
        up = torch.cat([through.to(x.dtype).t(), b1], dim=1)  # [out, 2 rank]
        return F.linear(z * (scalar * (self.inner.scale * self.multiplier)), up)

    def _rebuilt(self, x: Tensor) -> Tensor:
        tensors = self.export_state()
        stored = plain_weight(self.layer)
        assert stored is not None
        # a copy, for block swap reuses the stored weight's memory before autograd is done with it
        weight = stored.to(torch.float32, copy=True)
        change = (merged_weight(weight, tensors, self.multiplier) - weight).to(x.dtype)
        bias = tensors["diff_b"].to(x.dtype) * self.multiplier if "diff_b" in tensors else None
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, change, bias, self.layer.stride, self.layer.padding, self.layer.dilation)
        return F.linear(x, change, bias)

    @contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the parameters named in `values` hold these."""
        own = dict(self.named_parameters())
        before = {name: own[name].data for name in values}
        for name, value in values.items():
            own[name].data = value.detach().clone()
        try:
            yield
        finally:
            for name, data in before.items():
                own[name].data = data
