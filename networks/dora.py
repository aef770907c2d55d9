"""DoRA: direction by LoRA, magnitude trained apart (Liu et al. 2024, "DoRA", section 4.1).

    W' = m * (W + D) / ||W + D||_c,   D = scale * Up @ Down,   m [1, in] starts as ||W||_c

||.||_c is the norm of each column, as in the paper: one magnitude per input. Files hold m as `dora_scale` [1, in] (convolution:
[1, in, 1, 1]): that form means the same to all readers. About one magnitude per output, [out, 1], they differ: some divide by the
merged weight's norm, some by the norm of W alone. With strength s readers apply W + s * (W' - W).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.lora import LayerSettings, LoRALayer
from networks.network_layer import BaseLayer, dense_weight, left_matmul

EPSILON = torch.finfo(torch.float32).eps  # readers add it to the norm


class DoRALayer(LoRALayer):
    """A LoRA layer whose columns carry a trained magnitude.

    Since W' x = (W + D) (m / norm * x), a pre-hook scales the base layer's input and the rest is LoRA: one matmul with W,
    and no weight is ever merged. The norm needs Up' W, so W's values must be there when the layer runs: plain, swapped in or
    quantized; on the meta device there are sizes alone. The norm counts as a constant in the gradient (section 4.3).
    """

    fp32_tensors = ("alpha", "dora_scale", "base_squared")
    base_squared: Tensor

    def __init__(self, layer: BaseLayer, settings: LayerSettings):
        super().__init__(layer, settings)
        device = "meta" if layer.weight.is_meta else "cpu"
        squared = column_norms_squared(dense_weight(layer)).to(device)  # [1, in] or [1, in, 1, 1]
        self.dora_scale = nn.Parameter(squared.sqrt())
        self.register_buffer("base_squared", squared, persistent=False)
        # handed from the pre-hook to the hook of one forward: input, m / norm, kept by module dropout
        self._pending: tuple[Tensor, Tensor, Tensor | None] | None = None

    def attach(self) -> None:
        if not self._handles:
            self._handles.append(self.layer.register_forward_pre_hook(self._before_layer))
            self._handles.append(self.layer.register_forward_hook(self._after_layer))

    def export_state(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        magnitude = (values or {}).get("dora_scale", self.dora_scale)
        return super().export_state(values) | {"dora_scale": magnitude}

    @torch.no_grad()
    def import_state(self, tensors: Mapping[str, Tensor]) -> None:
        super().import_state(tensors)
        self.dora_scale.copy_(tensors["dora_scale"])

    @torch.no_grad()
    def merged_norm(self) -> Tensor:
        """||W + D||_c in float32, in the shape of dora_scale, without making W + D of a Linear.

        Per column j: ||W_j||^2 + 2 <W_j, D_j> + ||D_j||^2, where <W_j, D_j> = scale * Down_j . (Up' W)_j.
        """
        down, up = (factor.float() for factor in self.factors())
        up = up.flatten(1)
        if self.is_conv:
            change = self.scale * torch.einsum("or,rihw->oihw", up, down)
            return column_norms_squared(dense_weight(self.layer) + change).sqrt()
        cross = (left_matmul(up.t(), self.layer) * down).sum(0)  # [in]
        own = ((up.t() @ up) @ down * down).sum(0)  # [in]
        return (self.base_squared.float() + 2 * self.scale * cross + self.scale**2 * own).clamp(min=0).sqrt()

    def _before_layer(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.enabled:
            return None
        x = args[0]
        factor = self.dora_scale.float() / (self.merged_norm() + EPSILON)  # m / norm, [1, in]
        kept = super()._module_kept(x.device) if self.training and self.settings.module_dropout else None
        self._pending = (x, factor, kept)
        strength = self.multiplier if kept is None else self.multiplier * kept
        applied = 1 + strength * (factor - 1)
        if not self.is_conv:
            applied = applied[0]  # [in]
        return ((x * applied).to(x.dtype), *args[1:])  # multiplied in float32: 1 + 1e-3 is 1 in bfloat16

    def _after_layer(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        assert self._pending is not None
        out = self(self._pending[0], out)
        self._pending = None
        return out

    def _project_down(self, x: Tensor, weight: Tensor) -> Tensor:
        assert self._pending is not None
        return super()._project_down(x, weight * self._pending[1])

    def _module_kept(self, device: torch.device) -> Tensor:
        assert self._pending is not None and self._pending[2] is not None
        return self._pending[2]


def column_norms_squared(weight: Tensor) -> Tensor:
    """[out, in] -> [1, in]; [out, in, kh, kw] -> [1, in, 1, 1]; float32."""
    return weight.float().square().sum(dim=[axis for axis in range(weight.dim()) if axis != 1], keepdim=True)
