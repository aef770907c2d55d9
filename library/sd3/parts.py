"""The parts of an SD3 checkpoint by the names of their tensors. No tensor data is read here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.common.safetensors_header import Header, TensorInfo
from library.common.tensor_io import Part, file_stamp

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")  # of a float8 weight; the second is ComfyUI's newer name
SCALE_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant")  # for float8 matmuls; weights need none of them
SCALED_MARKER = "scaled_fp8"


def make_part(
    name: str,
    path: Path,
    prefix: str,
    header: Header,
    other_prefixes: tuple[str, ...] = (),
    pickled: bool = False,
) -> Part:
    """The tensors of `header` under `prefix`, without those under `other_prefixes` (which matter where prefix is empty)."""
    tensors, elsewhere = {}, {}
    for full_name, info in header.tensors.items():
        if full_name.startswith(prefix) and not _belongs_to(full_name, other_prefixes, prefix):
            tensors[full_name[len(prefix) :]] = info
    outer = prefix.removesuffix("transformer.")
    if name.startswith("clip") and outer != prefix:
        # ComfyUI keeps the projection one level above the transformer, as a bare tensor in older files.
        for key in ("text_projection", "text_projection.weight"):
            if outer + key in header.tensors:
                tensors[key] = header.tensors[outer + key]
                elsewhere[key] = outer + key
    tensors, scales = _without_scales(tensors, prefix)
    if name.startswith("clip") and "embeddings.token_embedding.weight" in tensors:
        # transformers 5 saves a CLIPTextModel without the level that every other file has.
        elsewhere = {"text_model." + key: prefix + key for key in tensors}
        tensors = {"text_model." + key: info for key, info in tensors.items()}
    return Part(name, path, prefix, tensors, scales, elsewhere, pickled, file_stamp(path))


def _belongs_to(full_name: str, prefixes: tuple[str, ...], own: str) -> bool:
    return any(other != own and len(other) > len(own) and full_name.startswith(other) for other in prefixes)


def _without_scales(tensors: Mapping[str, TensorInfo], prefix: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Split off the scales of float8 weights: (the other tensors, weight key -> full name of its scale)."""
    scales = {}
    for key in tensors:
        for suffix in SCALE_SUFFIXES:
            weight = key.removesuffix(suffix) + ".weight"
            if key.endswith(suffix) and weight in tensors:
                scales[weight] = prefix + key
    if not scales:
        return {key: info for key, info in tensors.items() if key != SCALED_MARKER}, {}
    dropped = SCALE_SUFFIXES + SCALE_COMPANIONS
    return {key: info for key, info in tensors.items() if not key.endswith(dropped) and key != SCALED_MARKER}, scales
