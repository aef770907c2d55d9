"""What a run encodes ahead of training: each caption and each image once, by all processes together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

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


def fill_texts(cache: TextCache, encode: EncodeCaptions, processes: Processes) -> TextCache:
    """Make what is missing. `encode` is called only where this process has something to encode."""
    for share in _shares(cache, processes):
        if share or cache.missing_extra_prompts():
            cache.fill(share, encode, TEXTS_AT_ONCE)
    return cache


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
