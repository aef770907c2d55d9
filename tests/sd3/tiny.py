"""Tiny random SD3 models in the real layouts: one single file, separate files, and tokenizers on disk.

Everything is random but finite and of sensible size, so a tiny model trains, samples and saves as a real one does.
Sizes: MMDiT of 2 blocks and width 128, CLIP-L 64, CLIP-G 128, T5 192 wide, VAE of base width 8; 77 CLIP tokens.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.vae import Vae, VaeConfig

PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 64, 128, 192
TOKENIZER_FOLDERS = {
    "clip_l": "openai_clip-vit-large-patch14",
    "clip_g": "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google_t5-v1_1-xxl",
}
WORDS = [
    "a",
    "the",
    "of",
    "on",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "house",
    "square",
    "circle",
    "photo",
    "painting",
    "small",
    "big",
]
Tensors = dict[str, Tensor]


def tiny_mmdit_config(kind: str = "medium", depth: int = 2, hidden_size: int = 128) -> MMDiTConfig:
    """kind: "medium", "5-medium" (qk-norm, dual attention in the first block) or "5-large" (qk-norm)."""
    return MMDiTConfig(
        depth=depth,
        hidden_size=hidden_size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        context_size=T5_WIDTH,
        pooled_size=CLIP_L_WIDTH + CLIP_G_WIDTH,
        mlp_hidden_size=2 * hidden_size,
        pos_embed_max_size=12,
        qk_norm=kind != "medium",
        dual_attention_blocks=(0,) if kind == "5-medium" else (),
    )


def tiny_vae_config() -> VaeConfig:
    return VaeConfig(base_channels=8, multipliers=(1, 1, 2, 2), res_blocks=1, latent_channels=16)


def fill_with_noise(model: nn.Module, seed: int = 0) -> None:
    """Random parameters of the size that keeps activations near 1; norms' weights near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if ("norm" in name and name.endswith("weight")) or name.endswith(("ln_q.weight", "ln_k.weight")):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.dim() > 1 and "embedding" not in name and name not in ("pos_embed", "shared.weight"):
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_(0.1 * noise)
    model.eval().requires_grad_(False)


def tiny_clip(name: str, seed: int = 0, layers: int = 2) -> nn.Module:
    """A transformers CLIPTextModelWithProjection, "clip_l" or "clip_g"."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = CLIP_L_WIDTH if name == "clip_l" else CLIP_G_WIDTH
    config = CLIPTextConfig(
        vocab_size=len(clip_vocabulary()[0]),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="quick_gelu" if name == "clip_l" else "gelu",
        bos_token_id=0,
        eos_token_id=2,
    )
    model = CLIPTextModelWithProjection(config)
    fill_with_noise(model, seed)
    return model


def tiny_t5(seed: int = 0, layers: int = 2, width: int = T5_WIDTH) -> nn.Module:
    """A transformers T5EncoderModel with gated GELU, as T5 v1.1 has."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_vocabulary()),
        d_model=width,
        d_kv=64,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
    )
    model = T5EncoderModel(config)
    fill_with_noise(model, seed)
    return model


def tiny_parts(kind: str = "medium", seed: int = 0, **mmdit_sizes: int) -> dict[str, Tensors]:
    """Plain state dicts (keys without prefix) of "mmdit", "vae", "clip_l", "clip_g" and "t5xxl", float32."""
    mmdit, vae = MMDiT(tiny_mmdit_config(kind, **mmdit_sizes)), Vae(tiny_vae_config())
    fill_with_noise(mmdit, seed)
    fill_with_noise(vae, seed + 1)
    t5 = {key: value for key, value in tiny_t5(seed + 4).state_dict().items() if key != "encoder.embed_tokens.weight"}
    return {
        "mmdit": mmdit.state_dict(),
        "vae": vae.state_dict(),
        "clip_l": tiny_clip("clip_l", seed + 2).state_dict(),
        "clip_g": tiny_clip("clip_g", seed + 3).state_dict(),
        "t5xxl": t5,
    }


def save_single_file(
    path: Path,
    parts: Mapping[str, Tensors],
    dtype: torch.dtype | None = None,
    prefixes: Mapping[str, str] = PREFIXES,
) -> Path:
    """Write the parts into one safetensors file under their prefixes, floating-point tensors in `dtype`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, state in parts.items():
        for key, value in state.items():
            tensors[prefixes[name] + key] = value.to(dtype or value.dtype).contiguous().clone()
    save_file(tensors, str(path))
    return path


def tiny_checkpoint(
    path: Path, kind: str = "medium", seed: int = 0, dtype: torch.dtype | None = None, **mmdit_sizes: int
) -> Path:
    """A whole model in one file, in the layout of sd3_medium_incl_clips_t5xxl*.safetensors."""
    return save_single_file(path, tiny_parts(kind, seed, **mmdit_sizes), dtype)


def tiny_model_folder(
    folder: Path, kind: str = "medium", seed: int = 0, dtype: torch.dtype | None = None, **mmdit_sizes: int
) -> Path:
    """A checkpoint with its tokenizers beside it; returns the checkpoint's path."""
    save_tokenizers(folder / "tokenizers")
    return tiny_checkpoint(folder / "tiny_sd3.safetensors", kind, seed, dtype, **mmdit_sizes)


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges): letters, marks and WORDS, then begin and end, the highest ids as in the real vocabulary."""
    letters = string.punctuation + string.digits + string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            if merge not in merges:
                merges.append(merge)
                tokens.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def t5_vocabulary() -> list[tuple[str, float]]:
    """A Unigram vocabulary: pad, end and unknown, word beginnings and letters."""
    words = [("▁" + word, -2.0) for word in WORDS]
    letters = [(letter, -6.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *words, *letters]


def save_tokenizers(folder: Path) -> Path:
    """The three tokenizers, each in the folder that the Hub's name gives with "/" as "_"."""
    from transformers import CLIPTokenizer, T5Tokenizer

    vocabulary, merges = clip_vocabulary()
    for name in ("clip_l", "clip_g"):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77).save_pretrained(
            folder / TOKENIZER_FOLDERS[name]
        )
    T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0).save_pretrained(folder / TOKENIZER_FOLDERS["t5xxl"])
    return folder
