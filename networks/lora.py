"""LoRA: a low-rank change of one frozen Linear or Conv2d (Hu et al. 2021, "LoRA", section 4.1), added by a forward hook.

    y = W x + b + multiplier * scale * Up(Down(x)),   scale = alpha / rank (or alpha / sqrt(rank), Kalajdzievski 2023)

The base layer keeps its class, its path and its state dict, and the hook never reads its weight: so it may be swapped,
quantized or stored in float8. Down and Up are float32 masters, cast to the activation's dtype at use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.common.errors import UserError
from networks.lora_init import empty_factors, init_factors_, init_pissa_
from networks.network_layer import BaseLayer, NetworkLayer, dense_weight


@dataclass(frozen=True)
class LayerSettings:
    rank: int
    alpha: float | None = None  # None or 0: the rank
    dropout: float = 0.0  # of single values of Down(x), rescaled
    rank_dropout: float = 0.0  # of a sample's whole ranks, rescaled
    module_dropout: float = 0.0  # of the whole change in a forward, not rescaled
    parts: int = 1  # 3: one pair each for the q, k and v of a fused layer (split_qkv)
    rslora: bool = False
    init: str = "kaiming"  # one of lora_arguments.INITS


class LoRALayer(NetworkLayer):
    """Down [parts * rank, in, ...] and Up [out, rank, ...]; with parts = 3 the rows of Up are q's, k's and v's thirds.

    A file holds one pair for the layer, `export_state`: with several parts Up is block-diagonal, and with init="pissa" the
    change from the start has twice the ranks. The buffer `alpha` is the file's: scale = alpha / rows of the file's Down.
    """

    alpha: Tensor
    initial_down: Tensor
    initial_up: Tensor

    def __init__(self, layer: BaseLayer, settings: LayerSettings):
        super().__init__(layer)
        rows = settings.rank * settings.parts
        self.lora_down, self.lora_up = empty_factors(layer, rows, settings.rank)
        self.settings = settings
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.file_rank = rows * (2 if settings.init == "pissa" else 1)
        divisor = math.sqrt(settings.rank) if settings.rslora else settings.rank
        self.register_buffer("alpha", torch.tensor((settings.alpha or settings.rank) * self.file_rank / divisor))
        self.scale = 1.0
        self._refresh_scale()
        self.register_load_state_dict_post_hook(_refresh_scale_after_load)
        self._init_weights(layer)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, ..., in] and the base layer's out [B, ..., out] (images: [B, C, H, W]) -> out with this change added."""
        down, up = self.factors()
        z = self._dropout(self._project_down(x, down)).to(out.dtype)  # [B, ..., file_rank]
        up = up.to(out.dtype)
        scale = self.scale * self.multiplier
        if self.is_conv:
            return torch.add(out, F.conv2d(z, up), alpha=scale)
        # addmm adds and scales inside the matmul: no pass of its own over the large output
        return torch.addmm(out.flatten(0, -2), z.flatten(0, -2), up.t(), alpha=scale).view(out.shape)

    def factors(self, values: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Down [file_rank, in, ...] and Up [out, file_rank, ...] whose product, times scale, is the change. `values`: see export_state."""
        values = values or {}
        down = values.get("lora_down.weight", self.lora_down.weight)
        up = values.get("lora_up.weight", self.lora_up.weight)
        if self.settings.init != "pissa":
            return down, self._block_diagonal(up)
        # U D - U0 D0 = (U - U0) D + U0 (D - D0): the differences are taken here, before low precision could swallow them
        initial_down, initial_up = self.initial_down.to(down), self.initial_up.to(up)
        ups = (self._block_diagonal(up - initial_up), self._block_diagonal(initial_up))
        return torch.cat([down, down - initial_down]), torch.cat(ups, dim=1)

    def _project_down(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        if isinstance(self.lora_down, nn.Conv2d):
            return F.conv2d(x, weight, None, self.lora_down.stride, self.lora_down.padding, self.lora_down.dilation)
        return F.linear(x, weight)

    def _dropout(self, z: Tensor) -> Tensor:
        """Neuron, rank and module dropout of z [B, ..., file_rank] (images: [B, file_rank, H, W]); in training alone.

        Decided on the device, without a branch: nothing waits for the device, and checkpointing replays it from the RNG state.
        """
        settings = self.settings
        if not self.training:
            return z
        if settings.dropout:
            z = F.dropout(z, settings.dropout)
        if settings.rank_dropout:
            rank_axis = 1 if self.is_conv else z.dim() - 1
            shape = [size if axis in (0, rank_axis) else 1 for axis, size in enumerate(z.shape)]
            kept = torch.rand(shape, device=z.device) >= settings.rank_dropout
            z = z * (kept / (1 - settings.rank_dropout)).to(z.dtype)
        if settings.module_dropout:
            z = z * self._module_kept(z.device).to(z.dtype)
        return z

    def _module_kept(self, device: torch.device) -> Tensor:
        return torch.rand((), device=device) >= self.settings.module_dropout

    @torch.no_grad()
    def _init_weights(self, layer: BaseLayer) -> None:
        settings, down, up = self.settings, self.lora_down.weight, self.lora_up.weight
        init_factors_(down, up, settings.init)
        if settings.init == "pissa":
            init_pissa_(down, up, dense_weight(layer), settings.rank, settings.parts, self.scale)
            self.register_buffer("initial_down", down.clone())
            self.register_buffer("initial_up", up.clone())

    # --- files ---------------------------------------------------------------------------------------------------------

    def export_state(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        down, up = self.factors(values)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": self.alpha}

    def check_compatible(self, tensors: Mapping[str, Tensor]) -> str | None:
        if self.settings.parts > 1:
            up = tensors["lora_up.weight"].float()
            halves = up.split(self.lora_down.weight.shape[0], dim=1)  # two with PiSSA
            rebuilt = torch.cat([self._block_diagonal(self._diagonal_blocks(half)) for half in halves], dim=1)
            if not torch.equal(up, rebuilt):
                return "is not a file of split_qkv=True (its lora_up is not block-diagonal)"
        return None

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        rows = self.lora_down.weight.shape[0]
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        self.lora_down.weight.copy_(down[:rows])
        self.lora_up.weight.copy_(self._diagonal_blocks(up[:, :rows]))
        if self.settings.init == "pissa":
            initial_up = self._diagonal_blocks(up[:, rows:])
            self.initial_down.copy_(down[:rows].float() - down[rows:].float())
            self.initial_up.copy_(initial_up)
            self.lora_up.weight.add_(initial_up.to(self.lora_up.weight))
        self.alpha.fill_(float(tensors.get("alpha", self.file_rank)))
        self._refresh_scale()

    def _block_diagonal(self, up: Tensor) -> Tensor:
        """Up as the file holds it: [out, rank] -> [out, parts * rank], block-diagonal where there are several parts."""
        if self.settings.parts == 1:
            return up
        expanded: Tensor = torch.block_diag(*up.chunk(self.settings.parts, dim=0))
        return expanded

    def _diagonal_blocks(self, up: Tensor) -> Tensor:
        """The inverse of `_block_diagonal`: [out, parts * rank] -> [out, rank]."""
        if self.settings.parts == 1:
            return up
        rank = self.settings.rank
        blocks = up.chunk(self.settings.parts, dim=0)
        return torch.cat([block[:, i * rank : (i + 1) * rank] for i, block in enumerate(blocks)])

    # --- the trainer's side --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """As NetworkLayer: D = scale * Up @ Down, and both factors shrink by the root.

        ||UD||^2 = sum((U'U) * (DD')), so only rank by rank matrices are made.
        """
        if self.settings.init == "pissa":
            raise UserError("--scale_weight_norms can't cap a LoRA with init=pissa: leave one of them out.")
        down = self.lora_down.weight.float().flatten(1)  # [rows, in]
        up = self._block_diagonal(self.lora_up.weight.float().flatten(1))  # [out, rows]
        squared = ((up.t() @ up) * (down @ down.t())).sum()
        norm = abs(self.scale) * squared.clamp(min=0).sqrt()
        ratio = (max_norm / norm.clamp(min=max_norm / 2)).clamp(max=1.0)
        self.lora_down.weight.mul_(ratio.sqrt())
        self.lora_up.weight.mul_(ratio.sqrt())
        return norm * ratio, ratio < 1

    def summary(self) -> tuple[str, str]:
        rank = str(self.settings.rank) if self.settings.parts == 1 else f"{self.settings.parts} x {self.settings.rank}"
        return rank, f"{self.scale * self.settings.rank:g}"

    def _refresh_scale(self) -> None:
        self.scale = float(self.alpha) / self.file_rank


def _refresh_scale_after_load(layer: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(layer, LoRALayer)
    layer._refresh_scale()
