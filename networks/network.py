"""The adapters of a whole model: its layers by name, as the optimizer, the trainer and files see them.

The layers may be of any kind of NetworkLayer: LoRA, DoRA, or one of LyCORIS.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from networks.lora_file import read_lora
from networks.merging import merge_into
from networks.network_layer import NetworkLayer
from networks.parameter_groups import (
    PARTS,
    LearningRates,
    LoraPlus,
    ParameterGroup,
    parameter_groups,
    parts_of,
    without_absent_parts,
)
from networks.weight_files import compare_shapes, group_by_layer, in_dtype, write_network_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormReport:
    """What `scale_weight_norms` did, as 0-dim tensors on the device: read them when the log does."""

    keys_scaled: Tensor  # layers that were shrunk
    average_norm: Tensor  # after shrinking
    maximum_norm: Tensor

    @classmethod
    def of(cls, norms: list[Tensor], shrunk: list[Tensor]) -> NormReport:
        all_norms = torch.stack(norms)
        return cls(torch.stack(shrunk).sum(), all_norms.mean(), all_norms.max())


class Network(nn.Module):
    """Layers as submodules by LoRA name (`lora_unet_joint_blocks_0_x_block_attn_qkv`), in the order of creation.

    `state_dict` is the trained state as it is, for resuming; `state_dict_for_saving` is what LoRA files hold. The base model
    is changed by hooks alone, between `attach` and `detach`, and by `merge`.
    """

    multiplier: float

    def __init__(self, layers: Mapping[str, NetworkLayer], plus: LoraPlus | None = None, multiplier: float = 1.0):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.plus = plus or LoraPlus()
        self.set_multiplier(multiplier)

    @property
    def layers(self) -> dict[str, NetworkLayer]:
        return {name: cast(NetworkLayer, layer) for name, layer in self.named_children()}

    def attach(self) -> None:
        """Let every layer act on its base layer. A second call has no effect."""
        for layer in self.layers.values():
            layer.attach()

    def detach(self) -> None:
        """Restore the base model."""
        for layer in self.layers.values():
            layer.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """The strength of the following forwards: a dataset's network_multiplier, 1 for training and previews."""
        self.multiplier = multiplier
        for layer in self.layers.values():
            layer.multiplier = multiplier

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Inside the block every forward is the base model's; afterwards each layer is as before."""
        before = {layer: layer.enabled for layer in self.layers.values()}
        for layer in before:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in before.items():
                layer.enabled = enabled

    @property
    def trained_parts(self) -> set[str]:
        """The prefixes in parameter_groups.PARTS of which there are layers."""
        return parts_of(self.layers)

    def parameter_groups(self, rates: LearningRates) -> list[ParameterGroup]:
        """The optimizer's groups; see parameter_groups.parameter_groups."""
        return parameter_groups(self.layers, rates, self.plus)

    @torch.no_grad()
    def state_dict_for_saving(
        self, dtype: torch.dtype | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What a LoRA file holds, in `dtype` (None: as trained; alphas and magnitudes in float32): copies on the CPU, so training may continue meanwhile.

        weights: parameters by their names in `named_parameters` to save in place of the live ones (those of an EMA, for
        example). KeyError for an unknown name.
        """
        values: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        known = dict(self.named_parameters())
        for key, value in (weights or {}).items():
            if key not in known:
                raise KeyError(f"the network has no parameter {key}")
            name, _, parameter = key.partition(".")
            values[name][parameter] = value
        tensors = {}
        for name, layer in self.layers.items():
            for suffix, tensor in layer.export_state(values[name]).items():
                key = f"{name}.{suffix}"
                tensors[key] = in_dtype(key, tensor, dtype)
        return tensors

    def save_weights(
        self, path: str | Path, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a LoRA file atomically: .safetensors with metadata, or .pt and .ckpt by torch.save."""
        write_network_file(path, self.state_dict_for_saving(dtype), metadata)

    def load_weights(self, path: str | Path) -> None:
        """Start from a LoRA file (--network_weights), its alphas included. UserError lists the names and shapes that don't fit."""
        self.load_tensors(read_lora(path, damaged=True).tensors, path)

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str | Path) -> None:
        """As `load_weights`, from tensors in memory; `where` names them in errors."""
        layers = without_absent_parts(group_by_layer(tensors, where), self.trained_parts, where)
        flat = {f"{name}.{suffix}": tensor for name, layer in layers.items() for suffix, tensor in layer.items()}
        with torch.no_grad():
            expected = {
                f"{name}.{suffix}": tuple(tensor.shape)
                for name, layer in self.layers.items()
                for suffix, tensor in layer.export_state().items()
            }
        problems = compare_shapes(expected, flat, where)
        if not problems:
            reasons = {name: layer.check_compatible(layers[name]) for name, layer in self.layers.items()}
            problems = [f"{where}: {name} {reason}." for name, reason in reasons.items() if reason]
        if problems:
            advice = "Give the same --network_dim and --network_args that made the file, or --dim_from_weights."
            raise UserError([*problems, advice])
        for name, layer in self.layers.items():
            layer.import_state(layers[name])

    def table(self) -> str:
        """Layer, rank, alpha, parameters; and their sum."""
        rows = [("layer", "rank", "alpha", "parameters")]
        total = 0
        for name, layer in self.layers.items():
            count = sum(parameter.numel() for parameter in layer.parameters())
            total += count
            rows.append((name, *layer.summary(), f"{count:,}"))
        rows.append((f"{len(self.layers)} layers", "", "", f"{total:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[c]:>{widths[c]}}" for c in (1, 2, 3)) for row in rows]
        return "\n".join(lines)

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> NormReport:
        """Clip the Frobenius norm of each layer's change at max_norm (--scale_weight_norms)."""
        norms, shrunk = zip(*(layer.clip_norm(max_norm) for layer in self.layers.values()))
        return NormReport.of(list(norms), list(shrunk))

    @torch.no_grad()
    def merge(self) -> None:
        """Add every change, at the current multiplier, to its base layer's weight, and detach."""
        for layer in self.layers.values():
            merge_into(layer.layer, layer.export_state(), layer.multiplier)
        self.detach()


def make_network(
    layers: Mapping[str, NetworkLayer], plus: LoraPlus, multiplier: float, kind: str, verbose: bool
) -> Network:
    """The network of these layers. Logs the number of layers of each part, and with `verbose` the whole table."""
    network = Network(layers, plus, multiplier)
    for prefix, title in PARTS.items():
        count = sum(name.startswith(prefix) for name in layers)
        if count:
            logger.info("%s for %s: %d layers", kind, title, count)
    if verbose:
        logger.info("%s", network.table())
    return network
