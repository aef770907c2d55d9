"""From the raw caption of a file to the text that is fed.

The order: line and wildcard choice, then the pieces (keep_tokens or its separator fix the head and the tail, warm-up, shuffle and
tag dropout change what lies between), then prefix and suffix around it all, then the secondary separator. Dropout of the whole
caption comes before everything. Rejoined pieces get their own separator back, and markers never reach the text encoder.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from library.data.settings import CaptionSettings

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")

Choose = Callable[[Sequence[str]], str]
"""Picks one of several texts."""


@dataclass(frozen=True)
class Pieces:
    """A caption cut at its separator. Only `flexible` may be shuffled or dropped."""

    head: list[str]
    flexible: list[str]
    tail: list[str]

    def joined(self, separator: str) -> str:
        return joiner(separator).join([*self.head, *self.flexible, *self.tail])


class CaptionPipeline:
    """Makes the text that is fed from raw captions, as the settings of one subset say.

    `max_train_steps` turns a token_warmup_step below 1 into steps; it is needed in that case alone.
    """

    def __init__(self, settings: CaptionSettings, max_train_steps: int | None = None):
        self.settings = settings
        self.warmup_steps = settings.token_warmup_step
        if 0 < settings.token_warmup_step < 1:
            if max_train_steps is None:
                raise ValueError("token_warmup_step below 1 is a fraction of the run: max_train_steps is needed")
            self.warmup_steps = math.floor(settings.token_warmup_step * max_train_steps)

    def deterministic(self, raw: str) -> str:
        """The caption with everything random left out: its first line, and the first choice of every wildcard."""
        return self._text(raw, lambda texts: texts[0], self._cut)

    def at(self, raw: str, rng: random.Random, step: int, epoch: int) -> str:
        """The caption for one fetch. `step` counts optimizer steps from 0, `epoch` from 1."""
        return "" if self.is_dropped(rng, epoch) else self.variant(raw, rng, step)

    def is_dropped(self, rng: random.Random, epoch: int) -> bool:
        """Whether this fetch feeds the empty caption (`epoch` counts from 1). Draws once where there is a rate."""
        every, rate = self.settings.caption_dropout_every_n_epochs, self.settings.caption_dropout_rate
        by_rate = rate > 0 and rng.random() < rate
        return by_rate or (every > 0 and epoch % every == 0)

    def variant(self, raw: str, rng: random.Random, step: int | None = None) -> str:
        """One random form of the caption, never dropped as a whole. `step` None means that the warm-up is over."""
        return self._text(raw, rng.choice, lambda text: self._vary(self._cut(text), rng, step))

    def variants(self, raw: str, count: int, seed: int) -> list[str]:
        """`count` random forms for a cache, the same for the same caption and seed. The warm-up is over in all of them.

        Dropout of whole captions isn't among them: whoever reads the cache asks `is_dropped` at each fetch and feeds "".
        """
        rng = random.Random(f"{seed}\n{raw}")
        return [self.variant(raw, rng) for _ in range(count)]

    def _text(self, raw: str, choose: Choose, cut: Callable[[str], Pieces]) -> str:
        settings = self.settings
        prefix, suffix = settings.caption_prefix, settings.caption_suffix
        lines = raw.split("\n")
        if settings.enable_wildcard:
            line = expand_wildcards(choose(lines), choose)
            prefix, suffix = expand_wildcards(prefix, choose), expand_wildcards(suffix, choose)
        else:
            line = lines[0]
        marker = settings.keep_tokens_separator
        if marker and (marker in prefix or marker in suffix):  # then they take part in the cut: "trigger |||"
            line, prefix, suffix = f"{prefix} {line} {suffix}", "", ""
        body = cut(line).joined(settings.caption_separator) if self._must_cut(line) else line.strip()
        text = " ".join(part for part in (prefix, body, suffix) if part)
        if settings.secondary_separator and settings.secondary_separator in text:
            text = joiner(settings.caption_separator).join(split(text, settings.secondary_separator))
        return text

    def _must_cut(self, line: str) -> bool:
        """Whether the pieces matter; a caption that nothing changes keeps its own spacing."""
        settings = self.settings
        marked = bool(settings.keep_tokens_separator) and settings.keep_tokens_separator in line
        return marked or settings.shuffle_caption or settings.caption_tag_dropout_rate > 0 or self.warmup_steps > 0

    def _cut(self, line: str) -> Pieces:
        """Head, middle and tail. A marker in the caption decides, else the first keep_tokens pieces are the head."""
        separator, marker = self.settings.caption_separator, self.settings.keep_tokens_separator
        if marker and marker in line:
            head, flexible, *tail = line.split(marker)
            return Pieces(split(head, separator), split(flexible, separator), split(separator.join(tail), separator))
        pieces = split(line, separator)
        return Pieces(pieces[: self.settings.keep_tokens], pieces[self.settings.keep_tokens :], [])

    def _vary(self, pieces: Pieces, rng: random.Random, step: int | None) -> Pieces:
        settings = self.settings
        flexible = list(pieces.flexible)
        if step is not None and step < self.warmup_steps:
            flexible = flexible[: warm_up_length(len(flexible), settings.token_warmup_min, step, self.warmup_steps)]
        if settings.shuffle_caption:
            rng.shuffle(flexible)
        if settings.caption_tag_dropout_rate > 0:
            flexible = [piece for piece in flexible if rng.random() >= settings.caption_tag_dropout_rate]
        return replace(pieces, flexible=flexible)


def is_random(settings: CaptionSettings) -> list[str]:
    """The names of the settings that make the text differ from fetch to fetch, which a cache of one text a caption would lose."""
    return [name for name in _RANDOM if getattr(settings, name)]


def lost_in_variants(settings: CaptionSettings) -> list[str]:
    """The names of the settings that even several cached variants a caption would lose: what depends on the step."""
    return [name for name in ("token_warmup_step",) if getattr(settings, name)]


_RANDOM = (
    "shuffle_caption",
    "enable_wildcard",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "token_warmup_step",
)


def deterministic(settings: CaptionSettings) -> CaptionSettings:
    """The settings with every random part off but wildcards: `first_choices` takes those out of the captions themselves."""
    return replace(
        settings,
        shuffle_caption=False,
        enable_wildcard=False,
        caption_prefix=first_choices(settings.caption_prefix, settings),
        caption_suffix=first_choices(settings.caption_suffix, settings),
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0.0,
    )


def first_choices(text: str, settings: CaptionSettings) -> str:
    """The first line of `text` with the first choice of every wildcard, where wildcards are on; else its first line."""
    line = text.split("\n")[0]
    return expand_wildcards(line, lambda texts: texts[0]) if settings.enable_wildcard else line


def expand_wildcards(text: str, choose: Choose) -> str:
    """Replace each `{a|b|c}` by a choice, and `{{` and `}}` by single braces. Wildcards don't nest."""

    def replaced(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group(0)[0]
        return choose(match.group(1).split("|"))

    return _WILDCARD.sub(replaced, text)


def split(text: str, separator: str) -> list[str]:
    """The pieces of `text`, stripped, without empty ones."""
    return [piece for piece in map(str.strip, text.split(separator)) if piece]


def joiner(separator: str) -> str:
    """What stands between rejoined pieces: the separator, and a space unless it ends in one or is a full-width sign."""
    wide = unicodedata.east_asian_width(separator[-1]) in "FW"
    return separator if wide or separator[-1].isspace() else separator + " "


def warm_up_length(pieces: int, smallest: int, step: int, warmup_steps: float) -> int:
    """How many flexible pieces are used at `step` < `warmup_steps`: from `smallest` (or all, if fewer) linearly to all."""
    start = min(smallest, pieces)
    return start + math.floor(step * (pieces - start) / warmup_steps)
