"""What a run computes once, before it trains: the text encoders' outputs for captions and prompts, and the images' latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from library.caching.files import cache_folder
from library.caching.fill import EncoderRoles, Processes, encoder_roles, fill_latents, fill_texts
from library.caching.latents import LatentCache, LatentCacheSettings, Progress
from library.caching.text import TextCache, TextCacheSettings
from library.common.model_family import LatentCodec, TextEncoders
from library.common.processes import remove_stale_temporaries
from library.data.index import DatasetIndex


@dataclass(frozen=True)
class Texts:
    """The outputs of the encoders that do not run in training. training, validation: None where all of them do."""

    roles: EncoderRoles
    training: TextCache | None
    validation: TextCache | None
    prompts: dict[str, dict[str, Tensor]]  # by the text of a preview prompt


@dataclass(frozen=True)
class Latents:
    """The latents of the images; None where images are encoded in training."""

    training: LatentCache | None = None
    validation: LatentCache | None = None


def cache_texts(
    encoders: TextEncoders,
    trains: Mapping[str, bool],
    cached: bool,
    index: DatasetIndex,
    prompts: Sequence[str],
    settings: TextCacheSettings,
    batch_size: int,
    processes: Processes,
    wrap: Callable[[Iterable[Sequence[str]]], Iterable[Sequence[str]]],
) -> Texts:
    """Encode every distinct caption and prompt once with the encoders that do not run in training.

    They are loaded only if something is missing, once for all texts. trains: the family's encoders, and whether each is trained. cached: whether outputs
    of untrained encoders are cached. settings: without their fingerprint. wrap: puts a progress bar around an encoder's batches.
    """
    roles = encoder_roles(encoders.present, trains, cached)
    if not roles.precomputed:
        for name in roles.untrained if prompts else ():
            encoders.model(name)  # stays loaded for the training steps, which need it too
        rows = encoders.precompute(prompts, roles.untrained, batch_size) if prompts else []
        return Texts(roles, None, None, dict(zip(prompts, rows)))

    def encode(texts: Sequence[str]) -> list[dict[str, Tensor]]:
        return encoders.precompute(texts, roles.precomputed, batch_size, wrap)

    settings = replace(settings, fingerprint=encoders.fingerprint(roles.precomputed))
    _remove_leftovers(index, settings)
    training = TextCache(index.training, settings, prompts)
    validation = TextCache(index.validation, replace(settings, variants=None))
    fill_texts([training, validation], encode, processes)
    for cache in (training, validation):
        cache.encode_again = partial(encoders.precompute, names=roles.precomputed, batch_size=batch_size)
    return Texts(roles, training, validation, {text: training.of_text(text) for text in prompts})


def cache_latents(
    codec: LatentCodec,
    index: DatasetIndex,
    settings: LatentCacheSettings,
    batch_size: int,
    processes: Processes,
    wrap: Progress,
) -> Latents:
    """Encode every image once; the VAE is loaded only if something is missing."""
    _remove_leftovers(index, settings)
    training = fill_latents(LatentCache(index.training, settings), codec.encode, batch_size, wrap, processes)
    validation = fill_latents(LatentCache(index.validation, settings), codec.encode, batch_size, wrap, processes)

    def encode_again(images: Tensor, noise: Tensor) -> Tensor:
        latents = codec.encode(images, noise)
        codec.release(keep_on_cpu=True)
        return latents

    training.encode_again = validation.encode_again = encode_again
    return Latents(training, validation)


def _remove_leftovers(index: DatasetIndex, settings: LatentCacheSettings | TextCacheSettings) -> None:
    """Remove what killed processes have left in the caches' folders. Those of living ones, which fill the same caches, stay."""
    if settings.on_disk:
        records = (record for dataset in (*index.training, *index.validation) for record in dataset.records)
        remove_stale_temporaries(Path(folder) for folder in {cache_folder(r.path, settings.cache_dir) for r in records})
