"""LoRA files of any layout, kohya's, diffusers' or PEFT's, read as the tensors of kohya's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from library.common.errors import UserError
from library.common.safetensors_header import read_header
from networks.arguments import nearest_name
from networks.diffusers_layout import ADAPTER_CONFIG, PEFT_PREFIX, fit, is_diffusers, kohya_layers, to_kohya
from networks.parameter_groups import parts_of, without_absent_parts
from networks.weight_files import PICKLED, group_by_layer, listed, read_network_file

logger = logging.getLogger(__name__)
MIN_DIMENSIONS = {
    "dora_scale": 1,
    "diff_b": 1,
    "bias": 1,
    "scalar": 0,
    "rescale": 0,
}  # of those that may have fewer than 2
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraFile:
    path: Path
    tensors: dict[str, Tensor]  # in kohya's layout, on the CPU
    metadata: dict[str, str]
    layout: str  # of the file: "kohya" or "diffusers"

    @property
    def layers(self) -> dict[str, dict[str, Tensor]]:
        """LoRA name -> suffix -> tensor."""
        return group_by_layer(self.tensors, self.path)


def read_lora(path: str | Path, damaged: bool = False) -> LoraFile:
    """A LoRA or LyCORIS file of kohya's, or a LoRA file of diffusers' or PEFT's layout. UserError where it can't be read or is none.

    damaged: accept layers of kohya's layout whose tensors don't fit each other, for callers that report them in more detail.
    """
    path = Path(path)
    tensors = read_network_file(path)
    metadata = {} if path.suffix in PICKLED else read_header(path).metadata
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    if is_diffusers(tensors):
        alphas = metadata | _config_beside(path, tensors, metadata)
        return LoraFile(path, to_kohya(tensors, alphas, str(path)), metadata, "diffusers")
    broken = [name for name, layer in group_by_layer(tensors, path).items() if not _is_whole(layer)]
    if broken and not damaged:
        raise UserError(f"{path} is damaged, in {listed(broken)}: tools/check_lora.py says how.")
    return LoraFile(path, tensors, metadata, "kohya")


@dataclass(frozen=True)
class FileLayers:
    """The layers of a network under --dim_from_weights."""

    where: str  # the file, for errors
    tensors: Mapping[str, Tensor]  # all of it, in kohya's layout
    layers: dict[str, dict[str, Tensor]]  # LoRA name -> suffix -> tensor, of the parts that the model has

    @property
    def tensors_of_layers(self) -> dict[str, Tensor]:
        return {f"{name}.{suffix}": tensor for name, layer in self.layers.items() for suffix, tensor in layer.items()}


def layers_of_file(
    file: str | None, weights: Mapping[str, Tensor] | None, available: Mapping[str, nn.Module]
) -> FileLayers:
    """The layers of a LoRA file, or of `weights` in kohya's layout, that belong to `available`, a model's layers by LoRA name.

    Parts that the model lacks are left out with a warning. UserError for a layer that it lacks in a part that it has.
    """
    where = str(file or "the given weights")
    tensors = read_lora(where, damaged=True).tensors if weights is None else weights
    layers = without_absent_parts(group_by_layer(tensors, where), parts_of(available), where)
    unknown = [name for name in layers if name not in available]
    if unknown:
        near = nearest_name(unknown[0], available)
        raise UserError(f"{where} has LoRAs for layers that this model lacks: {listed(unknown)}.{near}")
    flat = [
        f"{name}.{suffix}"
        for name, tensors_of_layer in layers.items()
        for suffix, tensor in tensors_of_layer.items()
        if (
            tensor.numel() != 1
            if suffix == "alpha"
            else tensor.numel() == 0 or tensor.dim() < MIN_DIMENSIONS.get(suffix, 2)
        )
    ]
    if flat:
        raise UserError(
            f"{where} is damaged: these are empty or have too few dimensions, or an alpha is not one number: {listed(flat)}."
        )
    return FileLayers(where, tensors, layers)


def names_in_file(path: str | Path) -> set[str]:
    """The kohya names of a LoRA file's layers. Reads no tensor but of a pickled file. UserError as `read_lora`, and for unknown names."""
    path = Path(path)
    keys = read_network_file(path).keys() if path.suffix in PICKLED else read_header(path).tensors.keys()
    if is_diffusers(keys):
        return kohya_layers(keys, str(path))
    return set(group_by_layer(dict.fromkeys(keys), path))


def check_lora_file(path: str | Path) -> list[str]:
    """What is wrong with a LoRA file according to its names, a sentence each: for the checks before a run."""
    try:
        names_in_file(path)
    except UserError as error:
        return error.problems
    return []


def _config_beside(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """The alphas of a file of PEFT's own, which keeps them in a file beside it, as diffusers has them in the metadata."""
    names = list(keys)
    has_alphas = ADAPTER_CONFIG in metadata or any(name.endswith(".alpha") for name in names)
    if has_alphas or not any(name.startswith(PEFT_PREFIX) for name in names):
        return {}
    config = path.with_name(PEFT_CONFIG)
    try:
        return {ADAPTER_CONFIG: config.read_text(encoding="utf-8")}
    except FileNotFoundError:
        logger.warning("%s: there is no %s beside it: alphas are taken to be the ranks.", path, PEFT_CONFIG)
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config} cannot be read ({error}).") from error


def _is_whole(layer: Mapping[str, Tensor]) -> bool:
    if "alpha" in layer and layer["alpha"].numel() != 1:
        return False
    if "lora_down.weight" not in layer:
        return "lora_up.weight" not in layer
    up = layer.get("lora_up.weight")
    return up is not None and fit(layer["lora_down.weight"], up, layer.get("alpha"))
