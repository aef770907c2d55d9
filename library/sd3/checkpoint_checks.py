"""Do located parts make a model? The tensors that give the sizes, the dtypes, and whether one part fits the other. Headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from library.common.safetensors_header import TensorInfo
from library.common.tensor_io import TORCH_DTYPES, Part
from library.sd3.file_kinds import kind_by_keys

LATENT_CHANNELS = 16
TITLES = {
    "mmdit": "an SD3 model",
    "clip_l": "the CLIP-L text encoder",
    "clip_g": "the CLIP-G text encoder",
    "t5xxl": "the T5-XXL text encoder",
    "vae": "a VAE",
}
_CLIP_CORE = {
    "text_model.embeddings.token_embedding.weight": 2,
    "text_model.embeddings.position_embedding.weight": 2,
    "text_model.encoder.layers.0.mlp.fc1.weight": 2,
}
# Tensors from which a model's sizes are read, with their number of dimensions.
CORE = {
    "mmdit": {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "context_embedder.weight": 2,
        "y_embedder.mlp.0.weight": 2,
        "joint_blocks.0.x_block.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    },
    "clip_l": _CLIP_CORE,
    "clip_g": _CLIP_CORE,
    "t5xxl": {
        "encoder.block.0.layer.0.SelfAttention.q.weight": 2,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2,
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": 2,
    },
    "vae": {"decoder.conv_in.weight": 4, "encoder.conv_in.weight": 4, "encoder.down.0.block.0.conv1.weight": 4},
}


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in tensors.items()}


def count_layers(pattern: str, keys: Iterable[str]) -> int:
    """Number of different layer numbers in the group of `pattern`. Each is counted once, so that no key can claim a billion
    layers; where numbers are left out, tensors of the counted layers are missing, which is reported."""
    compiled = re.compile(pattern, re.ASCII)
    return len({match[1] for key in keys if (match := compiled.match(key))})


def shard_hint(path: Path) -> str:
    """A remark where the file's name says that it is one of several."""
    match = re.search(r"-(\d{5})-of-(\d{5})\.", path.name)
    return f" (the file is number {int(match[1])} of {int(match[2])}: join them into one)" if match else ""


def core_problems(part: Part) -> list[str]:
    """What keeps a model's sizes from being read, or its tensors from being loaded."""
    problems = []
    for key, dimensions in CORE[part.name].items():
        info = part.tensors.get(key)
        if info is None:
            problems.append(
                f"{part.path}: {part.stored_name(key)} is missing from {TITLES[part.name]}{shard_hint(part.path)}."
            )
        elif len(info.shape) != dimensions or 0 in info.shape:
            problems.append(f"{part.path}: {part.stored_name(key)} has the impossible shape {info.shape}.")
    strange = sorted({info.dtype for info in part.tensors.values()} - TORCH_DTYPES.keys())
    if strange:
        problems.append(f"{part.path}: {TITLES[part.name]} is stored as {', '.join(strange)}, which cannot be read.")
    return problems


def fit_problems(parts: Mapping[str, Part]) -> list[str]:
    """What keeps the parts (checked by `core_problems`) from working together."""
    problems = _mistaken_clips(parts)
    mmdit = parts["mmdit"]
    shapes = shapes_of(mmdit.tensors)
    channels, context = shapes["x_embedder.proj.weight"][1], shapes["context_embedder.weight"][1]
    if channels != LATENT_CHANNELS:
        problems.append(f"{mmdit.path}: the model takes {channels} latent channels, SD3 takes {LATENT_CHANNELS}.")
    vae = parts.get("vae")
    if vae is not None and vae.tensors["decoder.conv_in.weight"].shape[1] != LATENT_CHANNELS:
        problems.append(f"{vae.path} is {kind_by_keys(shapes_of(vae.tensors))}; the VAE of SD3 is needed.")
    if problems:
        return problems
    t5 = parts.get("t5xxl")
    if t5 is not None and text_width(t5) != context:
        problems.append(f"{t5.path}: this T5 is {text_width(t5)} wide, the model takes {context}.")
    clips = [parts[name] for name in ("clip_l", "clip_g") if name in parts]
    widths, pooled = [text_width(part) for part in clips], [pooled_width(part) for part in clips]
    pooled_size = shapes["y_embedder.mlp.0.weight"][1]
    if sum(widths) > context or sum(pooled) > pooled_size or (len(clips) == 2 and sum(pooled) != pooled_size):
        problems.append(
            f"The CLIP text encoders ({' and '.join(str(part.path) for part in clips)}) give {' + '.join(map(str, pooled))}"
            f" pooled channels; the model in {mmdit.path} takes {pooled_size}."
        )
    return problems


def _mistaken_clips(parts: Mapping[str, Part]) -> list[str]:
    """CLIP-G given as CLIP-L or the other way round, told by the released models' widths."""
    problems = []
    for name, other_width, other in (("clip_l", 1280, "CLIP-G"), ("clip_g", 768, "CLIP-L")):
        if name in parts and text_width(parts[name]) == other_width:
            problems.append(f"--{name}: {parts[name].path} is {other}; {TITLES[name]} is needed.")
    return problems


def text_width(part: Part) -> int:
    """Channels of a text encoder's tokens."""
    key = next(key for key in CORE[part.name])  # the token embedding of a CLIP, a query projection of T5
    return part.tensors[key].shape[1]


def pooled_width(part: Part) -> int:
    """Channels of a CLIP's pooled output: those of its projection, or of its tokens where it has none."""
    layer, bare = part.tensors.get("text_projection.weight"), part.tensors.get("text_projection")
    if layer is not None and len(layer.shape) == 2:
        return layer.shape[0]
    if bare is not None and len(bare.shape) == 2:  # stored transposed: tokens' width first
        return bare.shape[1]
    return text_width(part)
