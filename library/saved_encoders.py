"""`--save_clip` and `--save_t5xxl`: the text encoders as files of their own, with the trained LoRA merged in.

Keys are transformers' (`text_model.…`, `encoder.block.…`), which ComfyUI's and diffusers' loaders of single encoders read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.files import save_safetensors
from library.sd3.checkpoint import ModelFiles, Part, load_tensors
from library.sd3.text_encoder_sizes import source_keys
from networks.merging import merged_weight
from networks.weight_files import group_by_layer

PREFIXES = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}


def encoders_to_save(save_clip: bool, save_t5xxl: bool) -> list[str]:
    return [*(("clip_l", "clip_g") if save_clip else ()), *(("t5xxl",) if save_t5xxl else ())]


def write_encoders(
    files: ModelFiles, names: list[str], lora: Mapping[str, Tensor], folder: Path, stem: str
) -> list[Path]:
    """Write each named encoder that the files hold to `folder/stem_<name>.safetensors`, one in memory at a time.

    lora: the tensors of the LoRA file; those of other parts are passed over.
    """
    written = []
    for name in names:
        part = files.encoders()[name]
        if part is not None:
            path = folder / f"{stem}_{name}.safetensors"
            save_safetensors(path, merged_encoder(part, lora, PREFIXES[name]), {"format": "pt"})
            written.append(path)
    return written


def merged_encoder(part: Part, lora: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An encoder's tensors in their stored dtype under transformers' names, the LoRA's layers computed in float32."""
    stored = load_tensors(part)
    tensors = {key: stored[source] for key, source in source_keys(part).items()}
    if source_keys(part).get("text_projection.weight") == "text_projection":  # a bare matrix is stored transposed
        tensors["text_projection.weight"] = tensors["text_projection.weight"].T.contiguous()
    targets = {
        prefix + key.removesuffix(".weight").replace(".", "_"): key for key in tensors if key.endswith(".weight")
    }
    for layer, change in group_by_layer(lora, "the LoRA").items():
        if layer.startswith(prefix):
            key = targets[layer]
            tensors[key] = merged_weight(tensors[key], change).to(tensors[key].dtype)
    return tensors
