"""Files of named tensors, read with care and written whole, and the kohya layout: `<lora name>.<suffix>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.files import atomic_write, save_safetensors
from library.common.safetensors_header import read_header

PICKLED = (".pt", ".ckpt", ".bin", ".pth")
Value = TypeVar("Value")
FP32_SUFFIXES = (".alpha", ".dora_scale")  # a rounded magnitude scales the whole output, not only the change
LISTED = 10  # names that an error lists before it counts the rest


def read_network_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a LoRA file under its own names, on the CPU. UserError where it is absent, damaged or holds other things than tensors."""
    path = Path(path)
    if path.suffix not in PICKLED:
        from safetensors.torch import load_file

        read_header(path)  # names what is wrong with the file
        try:
            return load_file(str(path))
        except Exception as error:  # a dtype that torch lacks, a file that changes while it is read
            raise UserError(f"{path} can't be read as a file of weights: {error}") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # torch's unpickler raises whatever damaged bytes lead to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} can't be read as a file of weights: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a LoRA file: it holds other things than tensors by name.")
    return dict(tensors)


def write_network_file(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically: safetensors with metadata, or torch.save for .pt and .ckpt, which have no place for metadata."""
    path = Path(path)
    if path.suffix in PICKLED:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(tensors), file)  # with a path, torch reports a full disk by an error of its own
    else:
        save_safetensors(path, tensors, metadata)


def group_by_layer(tensors: Mapping[str, Value], where: str | Path) -> dict[str, dict[str, Value]]:
    """{"name.suffix": tensor} -> {name: {suffix: tensor}}. UserError where names are not of the kohya layout."""
    layers: dict[str, dict[str, Value]] = {}
    strange = []
    for key, tensor in tensors.items():
        name, dot, suffix = key.partition(".")
        if not dot or not name.startswith(("lora_unet_", "lora_te")):
            strange.append(key)
        layers.setdefault(name, {})[suffix] = tensor
    if strange:
        raise UserError(
            f"{where}: names are not those of the kohya layout (lora_unet_….lora_down.weight): {listed(strange)}."
        )
    if not layers:
        raise UserError(f"{where} holds no tensors.")
    return layers


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: str | Path, optional: str = ".alpha"
) -> list[str]:
    """Differences between the tensors that a network has and those of a file, a sentence a kind. Names that end in `optional` may be absent."""
    missing = [key for key in expected if key not in tensors and not key.endswith(optional)]
    unexpected = [key for key in tensors if key not in expected]
    wrong = [
        f"{key} is {list(tensors[key].shape)}, here {list(expected[key])}"
        for key in expected
        if key in tensors and tuple(tensors[key].shape) != tuple(expected[key])
    ]
    problems = []
    for what, keys in (("lacks", missing), ("has, unknown here,", unexpected), ("differs in shape:", wrong)):
        if keys:
            problems.append(f"{where} {what} {listed(keys)}.")
    return problems


def listed(names: list[str]) -> str:
    """The first LISTED names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def in_dtype(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the CPU in `dtype` (None: its own). Alphas and DoRA's magnitudes are float32, as is a number that `dtype` can't hold."""
    if key.endswith(FP32_SUFFIXES):
        dtype = torch.float32
    copy = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if tensor.dim() == 0 and not torch.equal(copy.double(), tensor.detach().cpu().double()):
        return tensor.detach().to("cpu", torch.float32, copy=True)
    return copy
