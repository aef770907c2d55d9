"""`--save_clip` and `--save_t5xxl`: the text encoders as files of their own, with --base_weights and the trained LoRA merged in.

Keys are transformers' (`text_model.…`, `encoder.block.…`), which ComfyUI's and diffusers' loaders of single encoders read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from library.common.files import save_safetensors
from library.common.tensor_io import Part, load_tensors
from library.sd3.checkpoint import ModelFiles
from library.sd3.text_encoder_sizes import source_keys
from networks.merging import merged_weight

Change = tuple[float, Mapping[str, Mapping[str, Tensor]]]
"""(strength, layers by LoRA name with their tensors by suffix)"""
PREFIXES = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}


def encoders_to_save(save_clip: bool, save_t5xxl: bool) -> list[str]:
    return [*(("clip_l", "clip_g") if save_clip else ()), *(("t5xxl",) if save_t5xxl else ())]


def write_encoders(
    files: ModelFiles, names: list[str], changes: Sequence[Change], folder: Path, stem: str
) -> list[Path]:
    """Write each named encoder that the files hold to `folder/stem_<name>.safetensors`, one in memory at a time.

    changes: in the order in which they act, each with its strength; those of other parts are passed over.
    """
    written = []
    for name in names:
        part = files.encoders()[name]
        if part is not None:
            path = folder / f"{stem}_{name}.safetensors"
            save_safetensors(path, merged_encoder(part, changes, PREFIXES[name]), {"format": "pt"})
            written.append(path)
    return written


def merged_encoder(part: Part, changes: Sequence[Change], prefix: str) -> dict[str, Tensor]:
    """An encoder's tensors in their stored dtype under transformers' names, the changed layers computed in float32."""
    stored = load_tensors(part)
    tensors = {key: stored[source] for key, source in source_keys(part).items()}
    if source_keys(part).get("text_projection.weight") == "text_projection":  # a bare matrix is stored transposed
        tensors["text_projection.weight"] = tensors["text_projection.weight"].T.contiguous()
    targets = {
        prefix + key.removesuffix(".weight").replace(".", "_"): key for key in tensors if key.endswith(".weight")
    }
    merged: dict[str, Tensor] = {}
    for strength, layers in changes:
        for layer, change in layers.items():
            if layer.startswith(prefix):
                key = targets[layer]
                merged[key] = merged_weight(merged.get(key, tensors[key]), change, strength)
    return tensors | {key: weight.to(tensors[key].dtype) for key, weight in merged.items()}
