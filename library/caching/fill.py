"""What a run encodes ahead of training: each caption and each image once, by all processes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from library.caching.latents import EncodeImages, LatentCache, Progress
from library.caching.text import EncodeCaptions, TextCache
from library.common.errors import UserError
from library.data.prompts import PreviewPrompt

Item = TypeVar("Item")

TEXTS_AT_ONCE = 1024  # captions whose outputs wait in host memory while the encoders take turns


class Cache(Protocol[Item]):
    """What the two caches have in common."""

    def missing(self) -> list[Item]: ...

    def check(self, missing: Sequence[Item], /) -> list[str]: ...

    def share(self, missing: Sequence[Item], rank: int, processes: int, /) -> list[Item]: ...


class Processes(Protocol):
    """Of accelerate's Accelerator what filling a cache needs."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    def wait_for_everyone(self) -> None: ...


@dataclass(frozen=True)
class EncoderRoles:
    """When each of the text encoders encodes."""

    trained: list[str]
    live: list[str]  # those that encode in every step: the trained ones, and the others where outputs are not cached
    precomputed: list[str]  # before training, for the cache

    @property
    def untrained(self) -> list[str]:
        """Those whose outputs for a prompt stay the same for the whole run."""
        return self.precomputed + [name for name in self.live if name not in self.trained]


def encoder_roles(present: Sequence[str], trains: Mapping[str, bool], cached: bool) -> EncoderRoles:
    """present: the encoders that the files hold, in order. cached: whether outputs of untrained ones are made before training."""
    trained = [name for name in present if trains[name]]
    live = trained if cached else list(present)
    return EncoderRoles(trained, live, [name for name in present if name not in live])


def texts_of_prompts(prompts: Sequence[PreviewPrompt]) -> list[str]:
    """Each text of the preview prompts once, the negative ones too."""
    return list(dict.fromkeys(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)))


class Lookahead:
    """Encode the texts that are asked for together with those that will be asked for next.

    Each call of `encode` loads the text encoders, so the captions and prompts of all caches share calls.
    """

    def __init__(self, encode: EncodeCaptions, upcoming: Iterable[str], at_once: int):
        """upcoming: texts in the order in which they will be asked for. at_once: how many texts a call of `encode` gets."""
        self.encode, self.at_once = encode, at_once
        self.upcoming = list(dict.fromkeys(upcoming))
        self.ready: dict[str, dict[str, Tensor]] = {}

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        missing = [text for text in dict.fromkeys(texts) if text not in self.ready]
        if missing:
            done = {*self.ready, *missing}
            self.upcoming = [text for text in self.upcoming if text not in done]
            count = max(0, self.at_once - len(missing))
            batch = [*missing, *self.upcoming[:count]]
            kept = {text: self.ready[text] for text in texts if text in self.ready}
            self.ready = kept | dict(zip(batch, self.encode(batch)))
        return [self.ready[text] for text in texts]


def fill_texts(caches: Sequence[TextCache], encode: EncodeCaptions, processes: Processes) -> None:
    """Make what is missing in the caches, which are all in memory or all on disk.

    `encode` is called only where this process has something to encode: once for all caches where their texts are few.
    """
    for shares in zip(*(_shares(cache, processes) for cache in caches), strict=True):
        work = [(cache, share) for cache, share in zip(caches, shares) if share or cache.missing_extra_prompts()]
        # a cache in memory holds all outputs anyway; files are written as their texts are encoded
        upcoming = [text for cache, share in work for text in cache.pending_texts(share)]
        on_disk = any(cache.on_disk for cache, _ in work)
        at_once = TEXTS_AT_ONCE if on_disk else max(1, len(upcoming))
        together = Lookahead(encode, upcoming, at_once)
        for cache, share in work:
            cache.fill(share, together, at_once)


def fill_latents(
    cache: LatentCache, encode: EncodeImages, batch_size: int, progress: Progress, processes: Processes
) -> LatentCache:
    """Make what is missing. `encode` is called only where this process has something to encode."""
    for share in _shares(cache, processes):
        if share:
            cache.fill(share, encode, batch_size, progress)
    return cache


def _shares(cache: Cache[Item], processes: Processes) -> Iterator[list[Item]]:
    """What this process has to make of a cache: its share, then what is still missing (the machines may share no disk)."""
    missing = cache.missing()
    problems = cache.check(missing)
    if problems:
        raise UserError(problems)
    processes.wait_for_everyone()  # nobody writes before all have looked: the shares are of one list
    yield cache.share(missing, processes.process_index, processes.num_processes)
    processes.wait_for_everyone()
    if processes.num_processes > 1:
        yield cache.missing()
        processes.wait_for_everyone()
