"""From captions to what the denoiser reads: the three encoders' outputs, masked, dropped, joined.

Esser et al. 2024, section 4 and appendix B.3: the next-to-last hidden states of CLIP-L and CLIP-G side by side, filled up with
zeros to T5's width, then T5's rows; and the two pooled vectors side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.common.errors import UserError
from library.sd3.checkpoint_checks import TITLES, pooled_width, text_width
from library.sd3.text_encoder_sizes import CLIP_TOKENS
from library.sd3.tokenizers import MAX_T5_TOKENS, Tokenizer, Tokenizers

if TYPE_CHECKING:
    from library.sd3.checkpoint import ModelFiles


@dataclass(frozen=True)
class TextSettings:
    """How captions are encoded. A cache made with other settings is stale."""

    t5_tokens: int = 256  # 1..512
    mask_clip: bool = False  # CLIP-L and CLIP-G see no padding, and their rows at padded positions are zero
    mask_t5: bool = False  # the same for T5

    def __post_init__(self) -> None:
        if not 1 <= self.t5_tokens <= MAX_T5_TOKENS:
            raise UserError(f"--t5xxl_max_token_length {self.t5_tokens} is not within 1 to {MAX_T5_TOKENS}.")


@dataclass(frozen=True)
class TextEncoding:
    """What the encoders say about B captions; None where an encoder is missing or was not asked.

    With masks asked for, the rows at padded positions are zero already: no mask travels along.
    """

    clip_l: Tensor | None = None  # [B, 77, 768]
    pooled_l: Tensor | None = None  # [B, 768]
    clip_g: Tensor | None = None  # [B, 77, 1280]
    pooled_g: Tensor | None = None  # [B, 1280]
    t5: Tensor | None = None  # [B, T, 4096]

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        outputs = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in outputs.items() if tensor is not None}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> TextEncoding:
        """The inverse of `to_dict`; other keys are a TypeError."""
        return cls(**tensors)

    def rows(self) -> list[dict[str, Tensor]]:
        """One dict a caption, without the batch dimension and without shared memory, for caches."""
        tensors = self.to_dict()
        return [{name: tensor[i].clone() for name, tensor in tensors.items()} for i in range(self.batch_size)]

    @classmethod
    def stack(cls, rows: Sequence[Mapping[str, Tensor]]) -> TextEncoding:
        """A batch from dicts as `rows` makes them; all must hold the same names and shapes."""
        return cls(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def merged(self, other: TextEncoding) -> TextEncoding:
        """This with what `other` holds, so that the encoders can work one after another."""
        return replace(self, **other.to_dict())

    @property
    def batch_size(self) -> int:
        return next(iter(self.to_dict().values())).shape[0]


@dataclass(frozen=True)
class ContextSizes:
    """The shape of the conditioning, so that the share of a missing encoder can be filled with zeros."""

    clip_l: int  # channels of CLIP-L's rows
    pooled_l: int
    pooled: int  # of both CLIPs
    context: int  # channels of a context row, T5's width
    t5_tokens: int
    clip_tokens: int = CLIP_TOKENS

    @classmethod
    def from_files(cls, files: ModelFiles, t5_tokens: int) -> ContextSizes:
        """Sizes from the headers. A missing CLIP-L is as wide as what the denoiser takes beyond CLIP-G."""
        pooled = files.mmdit.tensors["y_embedder.mlp.0.weight"].shape[1]
        beyond_g = pooled - (pooled_width(files.clip_g) if files.clip_g is not None else 0)
        return cls(
            clip_l=text_width(files.clip_l) if files.clip_l is not None else beyond_g,
            pooled_l=pooled_width(files.clip_l) if files.clip_l is not None else beyond_g,
            pooled=pooled,
            context=files.mmdit.tensors["context_embedder.weight"].shape[1],
            t5_tokens=t5_tokens,
        )


def missing_encoder_notes(files: ModelFiles) -> list[str]:
    """A sentence for each encoder that is nowhere, for the log. UserError where all three are: captions would do nothing."""
    missing = [name for name, part in files.encoders().items() if part is None]
    if len(missing) == len(files.encoders()):
        raise UserError(
            f"No text encoder was found: {files.mmdit.path} holds none. Give at least one with --clip_l, --clip_g or --t5xxl."
        )
    return [
        f"{TITLES[name]} is missing (not in {files.mmdit.path}, and no --{name}): its share of the conditioning is zeros."
        for name in missing
    ]


def encode_clip(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ids [B, 77] (and mask [B, 77], 1 text, 0 padding) -> next-to-last hidden states [B, 77, W] without final norm, and the
    projected output at the end token [B, P], in the model's dtype and on its device. Gradients flow where LoRA asks for them.
    """
    ids, mask = _to_model(model, ids, mask)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return _without_padding(out.hidden_states[-2], mask), out.text_embeds


def encode_t5(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """ids [B, T] (and mask [B, T], 1 text, 0 padding) -> last hidden states [B, T, D], as `encode_clip`."""
    ids, mask = _to_model(model, ids, mask)
    return _without_padding(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def encode_captions(
    captions: Sequence[str],
    tokenizers: Tokenizers,
    settings: TextSettings,
    *,
    clip_l: nn.Module | None = None,
    clip_g: nn.Module | None = None,
    t5: nn.Module | None = None,
) -> TextEncoding:
    """Encode B captions with the encoders that are passed; the others' fields are None (see `TextEncoding.merged`).

    Each distinct caption is encoded once. The same function serves training, caching, validation and previews, so the
    masks act alike in all. Call it under torch.no_grad() unless an encoder is trained.
    """
    distinct = list(dict.fromkeys(captions))
    rows = {caption: index for index, caption in enumerate(distinct)}
    order = torch.tensor([rows[caption] for caption in captions])
    outputs: dict[str, Tensor] = {}
    for name, pooled, model, tokenizer in (
        ("clip_l", "pooled_l", clip_l, tokenizers.clip_l),
        ("clip_g", "pooled_g", clip_g, tokenizers.clip_g),
    ):
        if model is not None:
            ids, mask = _tokenize(tokenizer, name, distinct, CLIP_TOKENS)
            outputs[name], outputs[pooled] = encode_clip(model, ids, mask if settings.mask_clip else None)
    if t5 is not None:
        ids, mask = _tokenize(tokenizers.t5, "t5xxl", distinct, settings.t5_tokens)
        outputs["t5"] = encode_t5(t5, ids, mask if settings.mask_t5 else None)
    if len(distinct) < len(captions):
        outputs = {name: tensor[order.to(tensor.device, non_blocking=True)] for name, tensor in outputs.items()}
    return TextEncoding(**outputs)


def to_context(
    encoding: TextEncoding, sizes: ContextSizes, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Join an encoding to context [B, 77 + T, 4096] and pooled [B, 2048] on `device` in `dtype`.

    A missing encoder's share is zeros; a missing T5 has its full T rows of them.
    """
    batch = encoding.batch_size

    def get(tensor: Tensor | None, *shape: int) -> Tensor:
        if tensor is None:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)
        return tensor.to(device, dtype, non_blocking=True)

    clip_l = get(encoding.clip_l, sizes.clip_tokens, sizes.clip_l)
    clip_g = get(encoding.clip_g, sizes.clip_tokens, 0)  # a missing CLIP-G is part of the zeros that follow
    clip = torch.cat([clip_l, clip_g], dim=-1)  # [B, 77, 768 + 1280]
    clip = F.pad(clip, (0, sizes.context - clip.shape[-1]))  # [B, 77, 4096]
    context = torch.cat([clip, get(encoding.t5, sizes.t5_tokens, sizes.context)], dim=1)  # [B, 77 + T, 4096]
    pooled_l = get(encoding.pooled_l, sizes.pooled_l)
    pooled_g = get(encoding.pooled_g, sizes.pooled - pooled_l.shape[-1])
    return context, torch.cat([pooled_l, pooled_g], dim=-1)


@dataclass(frozen=True)
class DropoutRates:
    """Probability, 0..1, with which a caption's share of each encoder becomes zeros in training."""

    clip_l: float = 0.0
    clip_g: float = 0.0
    t5: float = 0.0

    def __post_init__(self) -> None:
        for option, rate in (("clip_l", self.clip_l), ("clip_g", self.clip_g), ("t5", self.t5)):
            if not 0.0 <= rate <= 1.0:
                raise UserError(f"--{option}_dropout_rate {rate} is not within 0 to 1.")


def apply_dropout(encoding: TextEncoding, rates: DropoutRates, generator: torch.Generator) -> TextEncoding:
    """Zero each encoder's share of each caption independently with its rate; for training alone.

    generator: on the CPU; 3 * B numbers are drawn unless every rate is 0. The tensors are left as they are.
    """
    if rates == DropoutRates():
        return encoding
    draws = torch.rand(3, encoding.batch_size, generator=generator)
    kept = {
        "clip_l": draws[0] >= rates.clip_l,
        "pooled_l": draws[0] >= rates.clip_l,
        "clip_g": draws[1] >= rates.clip_g,
        "pooled_g": draws[1] >= rates.clip_g,
        "t5": draws[2] >= rates.t5,
    }  # bool [B] each
    return TextEncoding(**{name: _where(kept[name], tensor) for name, tensor in encoding.to_dict().items()})


def _where(kept: Tensor, tensor: Tensor) -> Tensor:
    """tensor [B, ...] where kept [B], zeros elsewhere, also in place of inf and NaN."""
    kept = kept.to(tensor.device, non_blocking=True).reshape(-1, *[1] * (tensor.dim() - 1))
    return torch.where(kept, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def _without_padding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """hidden [B, L, D] with zeros where mask [B, L] is 0."""
    return hidden if mask is None else hidden.masked_fill(mask[..., None] == 0, 0.0)


def _to_model(model: nn.Module, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device  # sent without waiting for what the device is still doing
    sent = None if mask is None else mask.to(device, non_blocking=True)
    return ids.to(device, non_blocking=True), sent


def _tokenize(tokenizer: Tokenizer | None, name: str, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    if tokenizer is None:
        raise ValueError(f"{name} is to encode, but its tokenizer was not loaded")
    return tokenizer(captions, length)
