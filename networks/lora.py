"""One LoRA: a low-rank change of one frozen Linear or Conv2d (Hu et al. 2021, "LoRA", section 4.1), added by a forward hook.

    y = W x + b + multiplier * scale * Up(Down(x)),   scale = alpha / rank (or alpha / sqrt(rank), Kalajdzievski 2023)

The frozen layer keeps its class, its path and its state dict, and the hook never reads its weight: so it may be swapped,
quantised or stored in float8. Down and Up are float32 masters, cast to the activation's dtype at use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.common.errors import UserError
from networks.network_layer import BaseLayer, NetworkLayer, dense_weight

PISSA_OVERSAMPLING = 8  # Halko et al. 2011, section 4.2: some more random vectors than the rank
PISSA_ITERATIONS = 4  # as PEFT's fast PiSSA; any start is exact here, a finer one is not worth the time


@dataclass(frozen=True)
class LayerSettings:
    rank: int
    alpha: float | None = None  # None or 0: the rank
    dropout: float = 0.0  # of single values of Down(x), rescaled
    rank_dropout: float = 0.0  # of a sample's whole ranks, rescaled
    module_dropout: float = 0.0  # of the whole change in a forward, not rescaled
    parts: int = 1  # 3: one pair each for the q, k and v of a fused layer (split_qkv)
    rslora: bool = False
    init: str = "kaiming"  # or "orthogonal", "pissa"


class LoRALayer(NetworkLayer):
    """Down [parts * rank, in, ...] and Up [out, rank, ...]; with parts = 3 the rows of Up are q's, k's and v's thirds.

    A file holds one pair for the layer, `export_state`: with several parts Up is block-diagonal, and with init="pissa" the
    change from the start has twice the ranks. The buffer `alpha` is the file's: scale = alpha / rows of the file's Down.
    """

    exact: tuple[str, ...] = ("alpha",)  # stay float32 when the factors are trained in bfloat16
    alpha: Tensor
    initial_down: Tensor
    initial_up: Tensor
    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d

    def __init__(self, layer: BaseLayer, settings: LayerSettings):
        super().__init__(layer)
        rows = settings.rank * settings.parts
        self.lora_down, self.lora_up = _make_factors(layer, rows, settings.rank)
        self.settings = settings
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.file_rows = rows * (2 if settings.init == "pissa" else 1)
        divisor = math.sqrt(settings.rank) if settings.rslora else settings.rank
        self.register_buffer("alpha", torch.tensor((settings.alpha or settings.rank) * self.file_rows / divisor))
        self.scale = 1.0
        self._refresh_scale()
        self._initialise(layer)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, ..., in] and the frozen layer's out [B, ..., out] (images: [B, C, H, W]) -> out with this change added."""
        down, up = self.factors()
        z = self._drop(self._down(x, down)).to(out.dtype)  # [B, ..., file_rows]
        up = up.to(out.dtype)
        scale = self.scale * self.multiplier
        if self.is_conv:
            return torch.add(out, F.conv2d(z, up), alpha=scale)
        # addmm adds and scales inside the product: no pass of its own over the large output
        return torch.addmm(out.flatten(0, -2), z.flatten(0, -2), up.t(), alpha=scale).view(out.shape)

    def factors(self, values: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Down [file_rows, in, ...] and Up [out, file_rows, ...] whose product, times scale, is the change. `values`: see export_state."""
        values = values or {}
        down = values.get("lora_down.weight", self.lora_down.weight)
        up = values.get("lora_up.weight", self.lora_up.weight)
        if self.settings.init != "pissa":
            return down, self.expanded_up(up)
        # U D - U0 D0 = (U - U0) D + U0 (D - D0): the differences are taken here, before low precision could swallow them
        initial_down, initial_up = self.initial_down.to(down), self.initial_up.to(up)
        ups = (self.expanded_up(up - initial_up), self.expanded_up(initial_up))
        return torch.cat([down, down - initial_down]), torch.cat(ups, dim=1)

    def expanded_up(self, up: Tensor) -> Tensor:
        """Up as the file holds it: [out, rank] -> [out, parts * rank], block-diagonal where there are several parts."""
        if self.settings.parts == 1:
            return up
        return torch.block_diag(*up.chunk(self.settings.parts, dim=0))

    def export_state(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        down, up = self.factors(values)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": self.alpha}

    def check_compatible(self, tensors: Mapping[str, Tensor]) -> str | None:
        if self.settings.parts > 1:
            up = tensors["lora_up.weight"].float()
            if not torch.equal(up, self._reexpanded(up)):
                return "is not a file of split_qkv=True (its lora_up is not block-diagonal)"
        return None

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        rows = self.lora_down.weight.shape[0]
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        self.lora_down.weight.copy_(down[:rows])
        self.lora_up.weight.copy_(self._compacted(up[:, :rows]))
        if self.settings.init == "pissa":
            initial_up = self._compacted(up[:, rows:])
            self.initial_down.copy_(down[:rows].float() - down[rows:].float())
            self.initial_up.copy_(initial_up)
            self.lora_up.weight.add_(initial_up.to(self.lora_up.weight))
        self.alpha.fill_(float(tensors.get("alpha", self.file_rows)))
        self._refresh_scale()

    @torch.no_grad()
    def clip_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """As NetworkLayer: D = scale * Up @ Down, and both factors shrink by the root.

        ||UD||^2 = sum((U'U) * (DD')), so only rank by rank matrices are made.
        """
        if self.settings.init == "pissa":
            raise UserError("--scale_weight_norms can't cap a LoRA with init=pissa: leave one of them out.")
        down = self.lora_down.weight.float().flatten(1)  # [rows, in]
        up = self.expanded_up(self.lora_up.weight.float().flatten(1))  # [out, rows]
        squared = ((up.t() @ up) * (down @ down.t())).sum()
        norm = abs(self.scale) * squared.clamp(min=0).sqrt()
        ratio = (max_norm / norm.clamp(min=max_norm / 2)).clamp(max=1.0)
        self.lora_down.weight.mul_(ratio.sqrt())
        self.lora_up.weight.mul_(ratio.sqrt())
        return norm * ratio, ratio < 1

    def summary(self) -> tuple[str, str]:
        rank = str(self.settings.rank) if self.settings.parts == 1 else f"{self.settings.parts} x {self.settings.rank}"
        return rank, f"{self.scale * self.settings.rank:g}"

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        if isinstance(self.lora_down, nn.Conv2d):
            return F.conv2d(x, weight, None, self.lora_down.stride, self.lora_down.padding, self.lora_down.dilation)
        return F.linear(x, weight)

    def _drop(self, z: Tensor) -> Tensor:
        """Neuron, rank and module dropout of z [B, ..., file_rows] (images: [B, file_rows, H, W]); in training alone.

        Decided on the device, without a branch: nothing waits for the device, and checkpointing replays it from the RNG state.
        """
        settings = self.settings
        if not self.training:
            return z
        if settings.dropout:
            z = F.dropout(z, settings.dropout)
        if settings.rank_dropout:
            axis = 1 if self.is_conv else z.dim() - 1
            shape = [size if place in (0, axis) else 1 for place, size in enumerate(z.shape)]
            kept = torch.rand(shape, device=z.device) >= settings.rank_dropout
            z = z * (kept / (1 - settings.rank_dropout)).to(z.dtype)
        if settings.module_dropout:
            z = z * self._module_kept(z.device).to(z.dtype)
        return z

    def _module_kept(self, device: torch.device) -> Tensor:
        return torch.rand((), device=device) >= self.settings.module_dropout

    @torch.no_grad()
    def _initialise(self, layer: BaseLayer) -> None:
        """Up is zero and Down is random, so that training starts at the base model. PiSSA starts there by subtraction."""
        down, up = self.lora_down.weight, self.lora_up.weight
        nn.init.zeros_(up)
        if self.settings.init == "orthogonal":
            # orthogonal directions, each of the length that Kaiming's rows have on average
            nn.init.orthogonal_(down.view(down.shape[0], -1), gain=1 / math.sqrt(3))
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        if self.settings.init == "pissa":
            self._initialise_pissa(dense_weight(layer))
            self.register_buffer("initial_down", down.clone())
            self.register_buffer("initial_up", up.clone())

    def _initialise_pissa(self, weight: Tensor) -> None:
        """scale * Up @ Down = the principal part of the weight (Meng et al. 2024, "PiSSA", equation 2), part by part.

        The paper subtracts that part from the frozen weight. Here the weight stays and the start is subtracted in `factors`:
        the same function and gradients, for a base that may be swapped or quantised, and whose readers have it unchanged.
        Dropout drops ranks of the change alone, never of the principal part.
        """
        rank = self.settings.rank
        parts = weight.flatten(1).chunk(self.settings.parts, dim=0)  # each [out / parts, in]
        downs = self.lora_down.weight.flatten(1).chunk(len(parts), dim=0)  # views, each [rank, in]
        ups = self.lora_up.weight.flatten(1).chunk(len(parts), dim=0)  # views, each [out / parts, rank]
        for part, down, up in zip(parts, downs, ups):
            u, s, v = torch.svd_lowrank(part, q=min(rank + PISSA_OVERSAMPLING, *part.shape), niter=PISSA_ITERATIONS)
            count = min(rank, s.shape[0])  # a rank above the layer's own leaves some pairs at the usual start
            root = (s[:count] / self.scale).sqrt()
            down[:count] = root[:, None] * v[:, :count].t()
            up[:, :count] = u[:, :count] * root

    def _compacted(self, up: Tensor) -> Tensor:
        """The inverse of `expanded_up`."""
        if self.settings.parts == 1:
            return up
        rank = self.settings.rank
        blocks = up.chunk(self.settings.parts, dim=0)
        return torch.cat([block[:, i * rank : (i + 1) * rank] for i, block in enumerate(blocks)])

    def _reexpanded(self, up: Tensor) -> Tensor:
        rows = self.lora_down.weight.shape[0]
        return torch.cat([self.expanded_up(self._compacted(half)) for half in up.split(rows, dim=1)], dim=1)

    def _refresh_scale(self) -> None:
        self.scale = float(self.alpha) / self.file_rows

    def _apply(self, fn, recurse: bool = True):
        exact = {name: getattr(self, name).data for name in self.exact}
        super()._apply(fn, recurse)
        for name, data in exact.items():
            tensor = getattr(self, name)
            tensor.data = data.to(tensor.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh_scale()


def _make_factors(layer: BaseLayer, rows: int, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """Down and Up without values, on the CPU, in float32. Down of a convolution has its kernel, stride and padding.

    Those of a layer on the meta device, whose sizes alone are wanted, are there too.
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
