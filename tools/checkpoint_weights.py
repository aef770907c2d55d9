"""The weights of a checkpoint that a LoRA may name, read one at a time in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from library.common.safetensors_header import TensorInfo
from library.common.tensor_io import TORCH_DTYPES
from library.sd3.checkpoint import ModelFiles
from networks.diffusers_names import diffusers_paths
from networks.network_layer import BaseLayer

if TYPE_CHECKING:
    from safetensors import safe_open

PREFIXES = {"mmdit": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
TITLES = {"lora_unet_": "the MMDiT", "lora_te1_": "CLIP-L", "lora_te2_": "CLIP-G", "lora_te3_": "T5"}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Weight:
    """One layer of a checkpoint. Names are those in the file."""

    stored: str
    info: TensorInfo
    bias: str | None
    bias_info: TensorInfo | None
    scale: str | None  # of a float8 weight that means stored * scale

    def empty_layer(self) -> BaseLayer:
        """The layer without memory, for checks of shapes."""
        shape, bias = self.info.shape, self.bias is not None
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=bias, device="meta")
        return nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias, device="meta")  # type: ignore[arg-type]


def lora_weights(files: ModelFiles) -> dict[str, Weight]:
    """The layers by LoRA name of those parts that the checkpoint's own file holds."""
    if files.mmdit.pickled:
        raise UserError(f"{files.mmdit.path} is a PyTorch file; a .safetensors checkpoint is needed.")
    weights = {}
    for part in (files.mmdit, files.clip_l, files.clip_g, files.t5xxl):
        if part is None or part.path != files.mmdit.path:
            continue
        for key, info in part.tensors.items():
            path = key.removesuffix(".weight")
            name = PREFIXES[part.name] + path.replace(".", "_")
            if path != key and diffusers_paths(name) is not None:
                bias = path + ".bias"
                has_bias = bias in part.tensors
                weights[name] = Weight(
                    part.stored_name(key),
                    info,
                    part.stored_name(bias) if has_bias else None,
                    part.tensors[bias] if has_bias else None,
                    part.scales.get(key),
                )
    return weights


@contextmanager
def open_weights(path: Path) -> Iterator[WeightReader]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        yield WeightReader(file)


class WeightReader:
    """Reads layers' weights from an open checkpoint."""

    def __init__(self, file: safe_open):
        self.file = file

    def stored(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def read(self, weight: Weight) -> Tensor:
        """What the weight means, [out, in, ...] in float32."""
        value = self.stored(weight.stored).float()
        return value if weight.scale is None else value * self._scale(weight, value)

    def in_stored_form(self, weight: Weight, value: Tensor) -> Tensor:
        """A float32 weight as the file holds it: divided by its scale, in its dtype, float8 within its range."""
        if weight.scale is not None:
            value = value / self._scale(weight, value)
        return as_stored(value, weight.info)

    def _scale(self, weight: Weight, value: Tensor) -> Tensor:
        """One number, or one a row, in a shape that multiplies the weight."""
        assert weight.scale is not None
        return self.stored(weight.scale).float().reshape(-1, *(1,) * (value.dim() - 1)).to(value.device)


def as_stored(value: Tensor, info: TensorInfo) -> Tensor:
    """A float32 tensor in a stored dtype; float8 has no infinity, so that values beyond its range become its largest."""
    dtype = TORCH_DTYPES[info.dtype]
    if dtype in FLOAT8:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)
