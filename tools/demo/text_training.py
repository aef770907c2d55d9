"""Pre-training of the demo's three text encoders by word prediction. No picture is involved; they are frozen afterwards."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.sd3.conditioning import encode_clip, encode_t5
from library.sd3.tokenizers import Tokenizer, Tokenizers
from tools.demo.captions import caption_of, invented_word, vocabulary_words
from tools.demo.scenes import random_scene

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

logger = logging.getLogger(__name__)

CLIP_WIDTHS = {"clip_l": 64, "clip_g": 128}
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
T5_WIDTH = 192
LAYERS = 2


@dataclass(frozen=True)
class TextTraining:
    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 2e-3
    tokens: int = 22
    hidden_words: float = 0.15  # share of T5's input tokens that are replaced by "unknown"
    seed: int = 0


@dataclass
class TextEncoders:
    clip_l: CLIPTextModelWithProjection
    clip_g: CLIPTextModelWithProjection
    t5: T5EncoderModel


def new_clip(name: str, vocabulary: int) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = CLIP_WIDTHS[name]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        hidden_act=ACTIVATIONS[name],
        bos_token_id=0,  # not used
        eos_token_id=2,  # means: pool at the highest id, which is the end token's
    )
    model = CLIPTextModelWithProjection(config)
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.4)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(model.text_projection.weight, std=width**-0.5)
    return model


def new_t5(vocabulary: int) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=256,
        num_layers=LAYERS,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def train_text_encoders(tokenizers: Tokenizers, settings: TextTraining) -> TextEncoders:
    """All three encoders, trained one after another on the same stream of sentences, in eval mode."""
    assert tokenizers.clip_l is not None and tokenizers.clip_g is not None and tokenizers.t5 is not None
    torch.manual_seed(settings.seed)
    encoders = TextEncoders(
        new_clip("clip_l", tokenizers.clip_l.vocabulary),
        new_clip("clip_g", tokenizers.clip_g.vocabulary),
        new_t5(tokenizers.t5.vocabulary),
    )
    fit(encoders.clip_l, ClipObjective(tokenizers.clip_l, CLIP_WIDTHS["clip_l"]), settings)
    fit(encoders.clip_g, ClipObjective(tokenizers.clip_g, CLIP_WIDTHS["clip_g"]), settings)
    fit(encoders.t5, T5Objective(tokenizers.t5, settings.hidden_words), settings)
    return encoders


def fit(model: nn.Module, objective: ClipObjective | T5Objective, settings: TextTraining) -> None:
    rng = random.Random(settings.seed)
    model.train()
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(settings.steps):
        loss = objective(model, [sentence(rng) for _ in range(settings.batch_size)], settings.tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == settings.steps - 1:
            seconds = time.monotonic() - started
            logger.info("%s step %d loss %.3f, %.0f s", type(model).__name__, step, loss.detach(), seconds)
    model.eval().requires_grad_(False)


class ClipObjective(nn.Module):
    """The words of the sentence from the pooled vector and from the rows at and behind its end, and each next token."""

    def __init__(self, tokenizer: Tokenizer, width: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.words_of_pooled = nn.Linear(width, tokenizer.vocabulary)
        self.words_of_row = nn.Linear(width, tokenizer.vocabulary)
        self.next_token = nn.Linear(width, tokenizer.vocabulary)

    def forward(self, model: nn.Module, sentences: list[str], tokens: int) -> Tensor:
        ids, mask = self.tokenizer(sentences, tokens)
        rows, pooled = encode_clip(model, ids)  # [B, L, W], [B, W]
        words = word_shares(ids, mask, self.tokenizer.vocabulary)
        past_end = (mask.cumsum(1) == mask.sum(1, keepdim=True)).float()
        row_loss = -(words[:, None] * self.words_of_row(rows).log_softmax(-1)).sum(-1)  # [B, L]
        following = F.cross_entropy(self.next_token(rows[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        return (
            -(words * self.words_of_pooled(pooled).log_softmax(-1)).sum(-1).mean()
            + weighted_mean(row_loss, past_end)
            + 0.3 * weighted_mean(following, mask[:, 1:].float())
        )


class T5Objective(nn.Module):
    """Each token, hidden ones too and capitals told as small letters, from its row; the sentence's words from its end."""

    def __init__(self, tokenizer: Tokenizer, hidden_words: float):
        super().__init__()
        self.tokenizer = tokenizer
        self.hidden_words = hidden_words
        self.token = nn.Linear(T5_WIDTH, tokenizer.vocabulary)
        self.words = nn.Linear(T5_WIDTH, tokenizer.vocabulary)
        self.register_buffer("small", small_letters(tokenizer.inner))

    def forward(self, model: nn.Module, sentences: list[str], tokens: int) -> Tensor:
        ids, mask = self.tokenizer(sentences, tokens)
        targets = self.get_buffer("small")[ids]
        hidden = (torch.rand(ids.shape) < self.hidden_words) & (mask == 1)
        inputs = ids.masked_fill(hidden, self.tokenizer.inner.unk_token_id)
        half = (
            len(sentences) // 2
        )  # half of the sentences with masked padding, half without, as users may choose either
        rows = torch.cat([encode_t5(model, inputs[:half], mask[:half]), encode_t5(model, inputs[half:])])  # [B, L, D]
        words = word_shares(targets, mask, self.tokenizer.vocabulary)
        end = rows[torch.arange(len(rows)), mask.sum(1) - 1]  # [B, D]
        tokens_loss = F.cross_entropy(self.token(rows).transpose(1, 2), targets, reduction="none")
        return weighted_mean(tokens_loss, mask.float()) - (words * self.words(end).log_softmax(-1)).sum(-1).mean()


def small_letters(inner: Any) -> Tensor:
    """Token id -> id of the same token in small letters, where there is one."""
    known = inner.get_vocab()
    table = torch.arange(len(inner))
    for piece, index in known.items():
        table[index] = known.get(piece.lower(), index)
    return table


def word_shares(ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """[B, vocabulary]: an equal share for each different token of the sentence, zero for others."""
    present = (F.one_hot(ids, vocabulary) * mask[..., None]).amax(1).float()
    return present / present.sum(1, keepdim=True).clamp_min(1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1)


def sentence(rng: random.Random) -> str:
    """A caption, often with an invented word in the figure's place, or a row of any words; sometimes with capitals."""
    kind = rng.random()
    if kind < 0.8:
        scene = random_scene(rng)
        text = caption_of(scene, rng)
        if kind < 0.3:
            text = text.replace(scene.figure, invented_word(rng))
    else:
        text = " ".join(loose_words(rng))
    if rng.random() < 0.15:
        text = rng.choice((str.capitalize, str.title))(text)
    return text + rng.choice(("", "", "", "", "."))


def loose_words(rng: random.Random) -> Iterator[str]:
    known = vocabulary_words()
    for _ in range(rng.randint(0, 8)):
        yield rng.choice(known) if rng.random() < 0.7 else invented_word(rng)
