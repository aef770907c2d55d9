"""LoRA files that are merged into the frozen models before anything else sees them (`--base_weights`)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from networks.lora_file import read_lora
from networks.lora_sd3 import TEXT_ENCODER_PREFIXES, layers_by_name
from networks.merging import merge_layers
from networks.parameter_groups import PARTS, part_of, parts_of
from networks.weight_files import listed

logger = logging.getLogger(__name__)


class BaseWeights:
    """The changes of LoRA and LyCORIS files, ready to be merged part by part: each encoder when it is loaded, then the MMDiT.

    A part must be merged before it is quantized. Sums are made in float32, where the weights are, and kept in their dtype.
    """

    def __init__(self, files: Iterable[tuple[str, float]]):
        """files: paths with their strengths. UserError where one can't be read or names parts that no SD3 model has."""
        self.files = [(path, strength, read_lora(path, damaged=True).layers) for path, strength in files]
        for path, _, changes in self.files:
            strange = [name for name in changes if part_of(name) is None]
            if strange:
                raise UserError(
                    f"{path} has LoRAs for parts that SD3 lacks: {listed(strange)}. Take it out of --base_weights."
                )

    @property
    def changes(self) -> list[tuple[float, dict[str, dict[str, Tensor]]]]:
        """Each file's strength and layers, in the order of the files."""
        return [(strength, layers) for _, strength, layers in self.files]

    @property
    def parts(self) -> set[str]:
        """The prefixes in parameter_groups.PARTS of all parts that change."""
        return {part for _, _, changes in self.files for part in parts_of(changes)}

    def encoder_merges(
        self, names: Sequence[str], present: Sequence[str]
    ) -> dict[str, tuple[Callable[[nn.Module], int], str]]:
        """For each of the present text encoders that changes: (merges into the loaded model, fingerprint).

        names: the family's encoders in the order of their LoRA prefixes. A change of a missing one is left out with a warning.
        """
        merges: dict[str, tuple[Callable[[nn.Module], int], str]] = {}
        for index, (name, part) in enumerate(zip(names, TEXT_ENCODER_PREFIXES)):
            if part in self.parts and name not in present:
                logger.warning("--base_weights has a LoRA for %s, which is missing: it is left out.", name)
            elif part in self.parts:
                merges[name] = (partial(self._merge_encoder, index, len(names)), self.fingerprint(part))
        return merges

    def _merge_encoder(self, index: int, count: int, model: nn.Module) -> int:
        return self.merge([model if number == index else None for number in range(count)], None)

    def merge(self, text_encoders: Sequence[nn.Module | None], mmdit: nn.Module | None) -> int:
        """Change the models' weights (text_encoders: CLIP-L, CLIP-G, T5-XXL, or None) and return the number of changed layers.

        UserError where a file names layers that they lack, or does not fit; that file then changes nothing.
        """
        layers = layers_by_name(text_encoders, mmdit)
        present, total = parts_of(layers), 0
        for path, strength, changes in self.files:
            mine = {name: tensors for name, tensors in changes.items() if part_of(name) in present}
            if mine:
                count = merge_layers(mine, layers, strength, path)
                titles = ", ".join(PARTS[part] for part in sorted(parts_of(mine)))
                logger.info("Merged %s at strength %g into %s: %d layers changed.", path, strength, titles, count)
                total += count
        return total

    def fingerprint(self, part: str) -> str:
        """Changes with what is merged into the part (a key of PARTS); "" where nothing is. For caches of its outputs."""
        digest = hashlib.blake2b(digest_size=8)
        if part not in self.parts:
            return ""
        for _, strength, changes in self.files:
            digest.update(f"{strength!r}".encode())
            for name, tensors in sorted(changes.items()):
                if part_of(name) == part:
                    for suffix, tensor in sorted(tensors.items()):
                        digest.update(f"{name}.{suffix} {tensor.dtype} {list(tensor.shape)}".encode())
                        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
