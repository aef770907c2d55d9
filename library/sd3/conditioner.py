"""What the MMDiT is conditioned on: the joined outputs of the text encoders, and the position embedding of the image's size."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.seeds import StepGenerators
from library.data.batch import Batch
from library.data.prompts import PreviewPrompt
from library.data.settings import Size
from library.sd3.checkpoint import ModelFiles
from library.sd3.conditioning import (
    ContextSizes,
    DropoutRates,
    TextEncoding,
    TextSettings,
    apply_dropout,
    missing_encoder_notes,
    to_context,
)
from library.sd3.mmdit import MMDiT
from library.sd3.pos_embed import LATENT_AND_PATCH, ScaledPosEmbed, crop_pos_embed, random_offset
from library.sd3.text_encoder_manager import EncoderPlacement, TextEncoderManager
from library.sd3.text_encoder_sizes import sizes_of
from library.sd3.tokenizers import load_tokenizers, vocabulary_problems

logger = logging.getLogger(__name__)
Conditioning = tuple[Tensor, Tensor, Tensor | None]
"""context [B, 77 + T, 4096], pooled [B, 2048], position embedding [1, patches, D] or None for the model's own centered crop"""


@dataclass(frozen=True)
class EncoderUse:
    """Which text encoders run in a training step."""

    live: Sequence[str]  # all that run in a step
    trained: Sequence[str]  # those of them that the network trains


class PositionEmbedding:
    """The position embedding for an image size: the centered crop of a table, or at `crop_rate` in training a random one."""

    def __init__(
        self, model: MMDiT, device: torch.device, crop_rate: float = 0.0, scaled: ScaledPosEmbed | None = None
    ):
        """crop_rate: 0..1. scaled: tables for several resolutions, in place of the model's own, [1, P * P, D]."""
        self.model, self.device, self.crop_rate, self.scaled = model, device, crop_rate, scaled

    def of_size(self, size: Size, training: bool) -> Tensor | None:
        """size: (W, H) in pixels -> [1, patches, D]; None is the centered crop of the model's own table."""
        width, height = size[0] // LATENT_AND_PATCH, size[1] // LATENT_AND_PATCH
        table = None if self.scaled is None else self.scaled.table_for(height, width)
        # Python's generator is seeded for each micro-batch, like torch's.
        if not (training and self.crop_rate > random.random()):
            return None if table is None else crop_pos_embed(table, height, width)
        table = cast(Tensor, self.model.pos_embed) if table is None else table
        rng = random.Random(random.random())
        return crop_pos_embed(table, height, width, random_offset(math.isqrt(table.shape[1]), height, width, rng))


class Sd3Conditioner:
    """Makes the conditioning of training batches and of preview prompts."""

    def __init__(
        self,
        encoders: TextEncoderManager,
        use: EncoderUse,
        sizes: ContextSizes,
        dropout: DropoutRates,
        positions: PositionEmbedding,
        dtype: torch.dtype,
    ):
        """dtype: the denoiser's."""
        self.encoders, self.use, self.sizes, self.dropout = encoders, use, sizes, dropout
        self.positions, self.dtype = positions, dtype

    def of_batch(self, batch: Batch, generators: StepGenerators, training: bool) -> Conditioning:
        """Cached outputs joined with those of the encoders that run live; text dropout acts in training alone."""
        encoding = TextEncoding.from_dict(batch.text) if batch.text else TextEncoding()
        if self.use.live:
            encoding = encoding.merged(self.encoders.encode(batch.captions, self.use.live, self.use.trained))
        if training:
            encoding = apply_dropout(encoding, self.dropout, generators.cpu)
        return self._joined(encoding, batch.size, training)

    def of_prompt(self, prompt: PreviewPrompt, text: str, precomputed: Mapping[str, Tensor]) -> Conditioning:
        """text: the prompt or its negative prompt. precomputed: the untrained encoders' outputs; the trained ones run now."""
        encoding = TextEncoding.stack([precomputed])
        if self.use.trained:
            encoding = encoding.merged(self.encoders.encode([text], self.use.trained))
        return self._joined(encoding, (prompt.width, prompt.height), training=False)

    def join(self, first: Conditioning, second: Conditioning) -> Conditioning:
        """Two conditionings of one image size as one batch; the position embedding is the same."""
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2]

    def _joined(self, encoding: TextEncoding, size: Size, training: bool) -> Conditioning:
        context, pooled = to_context(encoding, self.sizes, self.positions.device, self.dtype)
        return context, pooled, self.positions.of_size(size, training)


def build_text_encoders(
    files: ModelFiles, tokenizer_folder: str | None, settings: TextSettings, placement: EncoderPlacement
) -> TextEncoderManager:
    """The encoders of `files` with their tokenizers; none is loaded yet. UserError where there is none, or a vocabulary does not fit."""
    for note in missing_encoder_notes(files):
        logger.warning(note)
    parts = {name: part for name, part in files.encoders().items() if part is not None}
    tokenizers = load_tokenizers(tokenizer_folder, files.mmdit.path, list(parts))
    problems = vocabulary_problems(tokenizers, {name: sizes_of(part).vocabulary for name, part in parts.items()})
    if problems:
        raise UserError(problems)
    return TextEncoderManager(files, tokenizers, settings, placement)
