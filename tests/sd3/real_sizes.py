"""Checkpoints with the shapes of the released models and no content: a header before a hole, which takes no room on the disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.vae import Vae, VaeConfig
from tests.sd3.tiny import PREFIXES

MMDITS = {
    "sd3m": MMDiTConfig(24, 1536, 2, 16, 16, 4096, 2048, 6144, 192, False, ()),
    "sd35m": MMDiTConfig(24, 1536, 2, 16, 16, 4096, 2048, 6144, 384, True, tuple(range(13))),
    "sd35l": MMDiTConfig(38, 2432, 2, 16, 16, 4096, 2048, 9728, 192, True, ()),
}
VAE = VaeConfig(base_channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=16)


def released_clip(name: str) -> nn.Module:
    width, layers = (768, 12) if name == "clip_l" else (1280, 32)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )
    )


def released_t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def hollow_checkpoint(path: Path, kind: str) -> Path:
    """One file with all parts of "sd3m", "sd35m" or "sd35l" in float16."""
    with torch.device("meta"):
        parts = {
            "mmdit": MMDiT(MMDITS[kind]),
            "vae": Vae(VAE),
            "clip_l": released_clip("clip_l"),
            "clip_g": released_clip("clip_g"),
            "t5xxl": released_t5(),
        }
    header, end = {}, 0
    for name, model in parts.items():
        for key, tensor in model.state_dict().items():
            if key != "encoder.embed_tokens.weight":
                size = 2 * tensor.numel()
                header[PREFIXES[name] + key] = {
                    "dtype": "F16",
                    "shape": list(tensor.shape),
                    "data_offsets": [end, end + size],
                }
                end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
