"""What a file of tensors is when it is not the expected one, from its tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# Tested in order; each names tensors by a piece of their key. The first kind whose pieces are all found is the answer.
_LORA = "a LoRA file, not a base model"
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_LORA, (".lora_down.",)),
    (_LORA, (".lora_up.",)),
    (_LORA, (".lora_A.",)),
    (_LORA, (".lora.down.",)),
    (_LORA, (".hada_w1_a",)),
    (_LORA, (".lokr_w1",)),
    ("a ControlNet", ("controlnet_",)),
    ("a ControlNet", ("control_model.",)),
    ("an SD3 model", ("joint_blocks.0.x_block.attn.qkv.",)),
    ("a FLUX model", ("double_blocks.0.img_attn.",)),
    ("a FLUX model in diffusers format", ("single_transformer_blocks.0.", "transformer_blocks.0.")),
    (
        "an SD3 transformer in diffusers format (use the single-file .safetensors of the model, whose keys begin with"
        " model.diffusion_model.joint_blocks)",
        ("transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj."),
    ),
    ("an SDXL model", ("input_blocks.0.0.", "conditioner.embedders.")),
    ("an SD 1.x model", ("input_blocks.0.0.", "cond_stage_model.transformer.")),
    ("an SD 2.x model", ("input_blocks.0.0.", "cond_stage_model.model.")),
    ("a U-Net of SDXL", ("input_blocks.0.0.", "label_emb.0.0.")),
    ("a U-Net of SD 1.x or 2.x", ("input_blocks.0.0.",)),
    ("a U-Net of SD 1.x, 2.x or SDXL in diffusers format", ("down_blocks.0.resnets.0.", "time_embedding.linear_1.")),
    ("a VAE in diffusers format", ("encoder.down_blocks.0.", "decoder.up_blocks.0.")),
    ("a VAE", ("encoder.down.0.block.0.", "decoder.up.0.block.0.")),
    ("a whole CLIP model in OpenCLIP format", ("transformer.resblocks.0.", "visual.")),
    ("a CLIP text encoder in OpenCLIP format", ("transformer.resblocks.0.",)),
    ("a CLIP text encoder", ("text_model.embeddings.token_embedding.",)),
    ("a CLIP vision model", ("vision_model.",)),
    ("a T5 text encoder", ("block.0.layer.0.SelfAttention.",)),
    ("a T5 text encoder with other key names (GGUF-style)", ("enc.blk.0.",)),
    ("a language model", ("model.layers.0.self_attn.",)),
    ("another diffusion transformer", ("transformer_blocks.0.",)),
    ("another diffusion transformer", ("blocks.0.",)),
)


def kind_by_keys(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a file with these tensors is, as a phrase: "a FLUX model", "a VAE with 4 latent channels ...", or the first names of an unknown one."""
    if not shapes:
        return "a file without any tensor"
    for kind, pieces in _KINDS:
        if all(_any_holds(shapes, piece) for piece in pieces):
            return kind + _details(kind, shapes)
    if len(shapes) <= 4 and shapes.keys() & {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param"}:
        return "a textual-inversion embedding"
    names = sorted(shapes)
    return (
        f"of an unknown kind: {len(names)} tensors, the first ones {', '.join(repr(name[:80]) for name in names[:3])}"
    )


def _any_holds(keys: Iterable[str], piece: str) -> bool:
    """Whether some key holds `piece` at the start of one of its dotted parts."""
    return any(key.startswith(piece) or f".{piece.lstrip('.')}" in key for key in keys)


def _details(kind: str, shapes: Mapping[str, Sequence[int]]) -> str:
    if kind == "a VAE":
        channels = next(
            (s[1] for key, s in shapes.items() if key.endswith("decoder.conv_in.weight") and len(s) > 1), 16
        )
        return "" if channels == 16 else f" with {channels} latent channels (SD 1.x, 2.x and SDXL have 4, SD3 has 16)"
    if kind == "a CLIP text encoder":
        width = next((s[1] for key, s in shapes.items() if key.endswith("token_embedding.weight") and len(s) > 1), 0)
        return {768: " (CLIP-L)", 1280: " (CLIP-G)", 1024: " (CLIP-H of SD 2.x)"}.get(width, f" of width {width}")
    return ""
