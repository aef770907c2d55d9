"""The names of SD3's layers in diffusers' pipeline against kohya's names of their LoRAs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# a layer of a joint block, kohya's name -> the names in diffusers' block; three of them where the layer is fused
BLOCK_LAYERS: Mapping[str, tuple[str, ...]] = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
OTHER_LAYERS: Mapping[str, str] = {
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "x_embedder_proj": "pos_embed.proj",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "final_layer_linear": "proj_out",
}
TEXT_ENCODERS: Mapping[str, str] = {
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoders.t5xxl.transformer.",  # the name that ComfyUI reads; diffusers loads no LoRA of T5
}
OLDER_PREFIXES: Mapping[str, str] = {"lora_te3_": "text_encoder_3."}  # read from older files; no client loads it
BLOCK = re.compile(r"lora_unet_joint_blocks_(\d+)_(\w+)")
CLIP_LAYER = re.compile(r"text_model_encoder_layers_(\d+)_(self_attn_[qkv]_proj|self_attn_out_proj|mlp_fc[12])")
T5_LAYER = re.compile(r"encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)")
ATTENTION_OR_MLP = re.compile(r"(self_attn|mlp)_")


def diffusers_paths(name: str) -> tuple[str, ...] | None:
    """The modules in diffusers' pipeline that a kohya name stands for: one, or three of a fused layer; None for an unknown name."""
    block = BLOCK.fullmatch(name)
    if block:
        layers = BLOCK_LAYERS.get(block[2])
        return layers and tuple(f"transformer.transformer_blocks.{block[1]}.{layer}" for layer in layers)
    for prefix, start in TEXT_ENCODERS.items():
        if name.startswith(prefix):
            path = _text_path(name.removeprefix(prefix))
            return path and (start + path,)  # type: ignore[return-value]
    other = OTHER_LAYERS.get(name.removeprefix("lora_unet_"))
    return other and (f"transformer.{other}",)  # type: ignore[return-value]


def _text_path(name: str) -> str | None:
    clip, t5 = CLIP_LAYER.fullmatch(name), T5_LAYER.fullmatch(name)
    if clip:
        layer = ATTENTION_OR_MLP.sub(r"\1.", clip[2])
        return f"text_model.encoder.layers.{clip[1]}.{layer}"
    return f"encoder.block.{t5[1]}.layer.{t5[2]}.{t5[3]}.{t5[4]}" if t5 else None


def kohya_names(paths: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Module path -> (kohya name, which third it is; 0 where the layer is whole, -1 where the path is the checkpoint's own)."""
    names = {}
    for path in paths:
        bare = path.removeprefix("transformer.")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", bare)
        in_block = [
            (name, layers.index(block[2])) for name, layers in BLOCK_LAYERS.items() if block and block[2] in layers
        ]
        others = [name for name, other in OTHER_LAYERS.items() if bare == other]
        own = "lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_")
        if block and in_block:
            names[path] = (f"lora_unet_joint_blocks_{block[1]}_{in_block[0][0]}", in_block[0][1])
        elif path.startswith("diffusion_model.") and diffusers_paths(own):
            names[path] = (own, -1)
        elif others:
            names[path] = ("lora_unet_" + others[0], 0)
        else:
            name = _text_name(path)
            if name is not None:
                names[path] = (name, 0)
    return names


def _text_name(path: str) -> str | None:
    for prefix, start in (*TEXT_ENCODERS.items(), *OLDER_PREFIXES.items()):
        if path.startswith(start):
            inner = path.removeprefix(start)
            if inner.startswith("encoder.layers."):  # transformers 5 has CLIP without the level that files have
                inner = "text_model." + inner
            name = prefix + inner.replace(".", "_")
            return name if diffusers_paths(name) else None
    return None
