"""Text encoder outputs made once for each distinct caption: in memory, or in a file beside each image.

An image has one text, or N random variants of it (`--text_cache_variants`), of which each fetch takes one. The empty caption
is kept too, for caption dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.data.cache_files import FORMAT, cache_path, check_writable, read_cache, read_made_from, write_cache
from library.data.captions import CaptionPipeline, is_random, lost_in_variants
from library.data.records import IndexedDataset
from library.options.errors import UserError

EncodeCaptions = Callable[[Sequence[str]], list[dict[str, Tensor]]]
"""Captions -> one dict of tensors each, on the CPU."""
SEPARATOR = "|"  # between a tensor's name and the number of its variant


@dataclass(frozen=True)
class TextCacheSettings:
    fingerprint: str  # of the encoders, token length and masks
    variants: int | None = None  # None: one text an image, without chance
    seed: int = 0
    on_disk: bool = False
    cache_dir: Path | None = None
    trust: bool = False


class TextCache:
    """Outputs for all texts of some datasets. `get` after `fill`."""

    def __init__(self, datasets: Sequence[IndexedDataset], settings: TextCacheSettings):
        self.settings = settings
        self.paths = {
            (d, n): record.path for d, dataset in enumerate(datasets) for n, record in enumerate(dataset.records)
        }
        self.texts = {key: self._texts_of(datasets[key[0]], key[1]) for key in self.paths}
        self.memory: dict[str, dict[str, Tensor]] = {}

    def get(self, dataset: int, number: int, variant: int, dropped: bool) -> tuple[str, dict[str, Tensor]]:
        """The text that is fed and its outputs; `variant` in 0..variants-1 (0 without variants)."""
        texts = self.texts[dataset, number]
        text = "" if dropped else texts[variant % len(texts)]
        if text in self.memory:
            return text, self.memory[text]
        found = read_cache(self._path(dataset, number))
        place = "" if text == texts[0] else f"{SEPARATOR}{texts.index(text)}"
        names = [name for name in found if SEPARATOR not in name]
        return text, {name: found[f"{name}{place}"] for name in names}

    def missing(self) -> list[tuple[int, int]]:
        """The images whose texts are not there, or are stale: another caption, token length, mask setting or encoder."""
        if not self.settings.on_disk:
            return [key for key, texts in self.texts.items() if any(text not in self.memory for text in texts)]
        if self.settings.trust:
            return [key for key in self.texts if not self._path(*key).exists()]
        with ThreadPoolExecutor(8) as pool:
            fresh = pool.map(self._is_fresh, self.texts)
            return [key for key, is_fresh in zip(self.texts, fresh) if not is_fresh]

    def check(self, missing: Sequence[tuple[int, int]]) -> list[str]:
        return check_writable({self._path(*key).parent for key in missing}) if self.settings.on_disk else []

    def fill(self, missing: Sequence[tuple[int, int]], encode: EncodeCaptions, chunk: int = 1024) -> None:
        """Encode each distinct text of the missing images once, `chunk` texts a call, and the empty caption."""
        if "" not in self.memory:
            self.memory[""] = encode([""])[0]
        if not self.settings.on_disk:
            wanted = dict.fromkeys(text for key in missing for text in self.texts[key] if text not in self.memory)
            todo = list(wanted)
            for start in range(0, len(todo), chunk):
                part = todo[start : start + chunk]
                self.memory.update(zip(part, encode(part)))
            return
        for group in self._grouped(missing, chunk):
            distinct = list(dict.fromkeys(text for key in group for text in self.texts[key]))
            found = dict(zip(distinct, encode(distinct)))
            for key in group:
                self._write(key, found)

    def _grouped(self, missing: Sequence[tuple[int, int]], chunk: int) -> list[list[tuple[int, int]]]:
        """Images in groups of about `chunk` texts; images that share their texts are in one group."""
        by_text = sorted(missing, key=lambda key: self.texts[key])
        groups: list[list[tuple[int, int]]] = []
        seen: set[str] = set()
        for key in by_text:
            new = set(self.texts[key]) - seen
            if not groups or len(seen) + len(new) > chunk:
                groups.append([])
                seen = set()
            groups[-1].append(key)
            seen |= set(self.texts[key])
        return groups

    def _write(self, key: tuple[int, int], found: dict[str, dict[str, Tensor]]) -> None:
        tensors = {}
        for place, text in enumerate(self.texts[key]):
            suffix = f"{SEPARATOR}{place}" if place else ""
            tensors.update({f"{name}{suffix}": tensor for name, tensor in found[text].items()})
        write_cache(self._path(*key), tensors, self._made_from(key))

    def _texts_of(self, dataset: IndexedDataset, number: int) -> list[str]:
        record = dataset.records[number]
        subset = dataset.subset_of(record)
        if self.settings.variants is None:
            return [CaptionPipeline(subset.captions, 1).deterministic(record.caption)]
        pipeline = CaptionPipeline(subset.captions, 1)
        return list(dict.fromkeys(pipeline.variants(record.caption, self.settings.variants, self.settings.seed)))

    def _path(self, dataset: int, number: int) -> Path:
        return cache_path(self.paths[dataset, number], "text", self.settings.cache_dir)

    def _made_from(self, key: tuple[int, int]) -> dict[str, object]:
        digests = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in self.texts[key]]
        return {"captions": digests, "encoders": self.settings.fingerprint}

    def _is_fresh(self, key: tuple[int, int]) -> bool:
        return read_made_from(self._path(*key)) == {"format": FORMAT, **self._made_from(key)}


def refuse_lost_chance(datasets: Sequence[IndexedDataset], variants: int | None) -> None:
    """UserError where caching would lose what a subset wants to be random. Dropout of whole captions works with caches."""
    always_kept = ("caption_dropout_rate", "caption_dropout_every_n_epochs")
    problems = []
    for subset in {subset.name: subset for dataset in datasets for subset in dataset.settings.subsets}.values():
        names = lost_in_variants(subset.captions) if variants else is_random(subset.captions)
        lost = [name for name in names if name not in always_kept]
        if lost:
            remedy = (
                "turn it off"
                if variants
                else "turn it off, or give --text_cache_variants N to cache N random texts an image"
            )
            problems.append(
                f"{subset.name}: {', '.join(lost)} would be lost by --cache_text_encoder_outputs; {remedy}."
            )
    if problems:
        raise UserError(problems)
