"""Text encoder outputs made once for each distinct caption: in memory, or in a file beside each image.

An image has one text, or N random variants of it (`--text_cache_variants`), of which each fetch takes one. Extra prompts (the
empty caption for dropout, preview prompts) are kept by themselves, so that a run with complete files loads no encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.caching.files import (
    FORMAT,
    cache_folder,
    cache_path,
    check_writable,
    missing_files,
    read_cache,
    read_cache_key,
    space_problems,
    write_cache,
)
from library.common.errors import UserError
from library.data.captions import CaptionPipeline, is_random, lost_in_variants
from library.data.dataset import IndexedDataset

REMADE_AT_ONCE = 256  # files: each call loads the encoders, and other processes wait meanwhile
EncodeCaptions = Callable[[Sequence[str]], list[dict[str, Tensor]]]
"""Captions -> one dict of tensors each, on the CPU."""
WRITERS = 4  # threads
SEPARATOR = "|"  # between a tensor's name and the number of its variant


@dataclass(frozen=True)
class TextCacheSettings:
    fingerprint: str  # of the encoders, token length and masks
    variants: int | None = None  # None: one text an image, without chance
    seed: int = 0
    on_disk: bool = False
    cache_dir: Path | None = None
    skip_validation: bool = False  # take files that exist without opening them
    bytes_each: int = 0  # of the outputs for one text, so that disk space can be checked


class TextCache:
    """Outputs for all texts of some datasets. `get` after `fill`."""

    def __init__(
        self, datasets: Sequence[IndexedDataset], settings: TextCacheSettings, extra_prompts: Sequence[str] = ()
    ):
        """extra_prompts: texts that are needed beside those of the images."""
        self.settings = settings
        self.paths = {
            (d, n): record.path for d, dataset in enumerate(datasets) for n, record in enumerate(dataset.records)
        }
        self.texts = {key: self._texts_of(datasets[key[0]], key[1]) for key in self.paths}
        self.stored: dict[
            str, list[str]
        ] = {}  # image -> the distinct texts in its file, those of all datasets that have it
        for key, path in self.paths.items():
            texts = self.stored.setdefault(path, [])
            texts += [text for text in dict.fromkeys(self.texts[key]) if text not in texts]
        subsets = [subset.captions for dataset in datasets for subset in dataset.settings.subsets]
        drops = any(s.caption_dropout_rate > 0 or s.caption_dropout_every_n_epochs > 0 for s in subsets)
        self.extra_prompts = list(dict.fromkeys([*([""] if drops else []), *extra_prompts]))
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.encode_again: EncodeCaptions | None = None  # makes files again that get lost in training

    def __getstate__(self) -> dict[str, object]:
        """What a data worker gets: everything but the encoders."""
        return {**self.__dict__, "encode_again": None}

    @property
    def on_disk(self) -> bool:
        """Whether `get` reads files."""
        return self.settings.on_disk

    def of_text(self, text: str) -> dict[str, Tensor]:
        """The outputs of one of the extra prompts."""
        return self.memory[text]

    def get(self, dataset: int, number: int, variant: int, dropped: bool) -> tuple[str, dict[str, Tensor]]:
        """The text that is fed and its outputs; `variant` in 0..variants-1 (0 without variants)."""
        texts = self.texts[dataset, number]
        text = "" if dropped else texts[variant % len(texts)]
        if text in self.memory:  # all texts of a cache in memory; the empty caption always
            return text, self.memory[text]
        path = self.paths[dataset, number]
        index = self.stored[path].index(text)
        mark = str(index) if index else ""
        tensors = read_cache(self._path(path), lambda name: name.partition(SEPARATOR)[2] == mark)
        return text, {name.partition(SEPARATOR)[0]: tensor for name, tensor in tensors.items()}

    def remake(self, dataset: int, number: int) -> None:
        """Make one image's file again, and others that are missing: the encoders are loaded once."""
        if self.encode_again is None:
            return
        path = self.paths[dataset, number]
        others = [image for image in self.missing() if image != path]
        self.fill([path, *others[: REMADE_AT_ONCE - 1]], self.encode_again)

    def missing(self) -> list[str]:
        """The images whose outputs are not there, or are stale. Nothing is missing: no reason to load an encoder."""
        if not self.settings.on_disk:
            return [path for path, texts in self.stored.items() if any(text not in self.memory for text in texts)]
        return missing_files(list(self.stored), self._path, None if self.settings.skip_validation else self._is_fresh)

    def share(self, missing: Sequence[str], rank: int, processes: int) -> list[str]:
        """What one process makes of files that all have found missing; all of a cache in memory, which is its own.

        Images with one caption are one process's, so that it is encoded once.
        """
        if not self.settings.on_disk:
            return list(missing)
        owners: dict[str, int] = {}
        for path in missing:
            owners.setdefault(self.stored[path][0], len(owners) % processes)
        return [path for path in missing if owners[self.stored[path][0]] == rank]

    def missing_extra_prompts(self) -> list[str]:
        """The extra prompts that are not there, or are stale. Those that are in files are read into memory."""
        for text in self.extra_prompts:
            path = self._extra_path(text)
            if text not in self.memory and path is not None and read_cache_key(path) == self._extra_cache_key(text):
                self.memory[text] = read_cache(path)
        return [text for text in self.extra_prompts if text not in self.memory]

    def check(self, missing: Sequence[str]) -> list[str]:
        """Problems that would stop `fill`: folders that cannot be written, disks with too little room."""
        needed = self.bytes_needed(missing)
        return check_writable(set(needed)) or space_problems(needed)

    def bytes_needed(self, missing: Sequence[str]) -> dict[Path, int]:
        """What the files to be made take in each folder."""
        needed: dict[str, int] = {}
        for path in missing if self.settings.on_disk else ():
            folder = cache_folder(path, self.settings.cache_dir)
            needed[folder] = needed.get(folder, 0) + self.settings.bytes_each * len(self.stored[path])
        return {Path(folder): size for folder, size in needed.items()}

    def pending_texts(self, missing: Sequence[str]) -> list[str]:
        """The distinct texts that `fill` encodes, in its order."""
        images = sorted(missing, key=lambda path: self.stored[path]) if self.on_disk else missing
        texts = [*self.missing_extra_prompts(), *(text for image in images for text in self.stored[image])]
        return [text for text in dict.fromkeys(texts) if self.on_disk or text not in self.memory]

    def fill(self, missing: Sequence[str], encode: EncodeCaptions, chunk: int = 1024) -> None:
        """Encode each distinct text of the missing images once, `chunk` texts a call, and the extra prompts that are missing."""
        encode = _finite(encode)
        extra = self.missing_extra_prompts()
        for text, outputs in zip(extra, encode(extra) if extra else []):
            self.memory[text] = outputs
            path = self._extra_path(text)
            if path is not None:
                write_cache(path, outputs, self._extra_cache_key(text))
        if not self.settings.on_disk:
            todo = list(dict.fromkeys(text for image in missing for text in self.stored[image]))
            todo = [text for text in todo if text not in self.memory]
            for start in range(0, len(todo), chunk):
                part = todo[start : start + chunk]
                self.memory.update(zip(part, encode(part)))
            return
        for group in self._grouped(missing, chunk):
            distinct = list(dict.fromkeys(text for image in group for text in self.stored[image]))
            encoded = dict(zip(distinct, encode(distinct)))
            with ThreadPoolExecutor(WRITERS) as pool:  # waiting for the disk takes longer than writing
                list(pool.map(self._write, group, [encoded] * len(group)))

    def _grouped(self, missing: Sequence[str], chunk: int) -> list[list[str]]:
        """Images in groups of about `chunk` texts; images that share their texts are in one group."""
        groups: list[list[str]] = []
        seen: set[str] = set()
        for image in sorted(missing, key=lambda path: self.stored[path]):
            new = set(self.stored[image]) - seen
            if not groups or len(seen) + len(new) > chunk:
                groups.append([])
                seen = set()
            groups[-1].append(image)
            seen |= set(self.stored[image])
        return groups

    def _write(self, image: str, encoded: dict[str, dict[str, Tensor]]) -> None:
        tensors = {}
        for variant, text in enumerate(self.stored[image]):
            mark = f"{SEPARATOR}{variant}" if variant else ""
            tensors.update({f"{name}{mark}": tensor for name, tensor in encoded[text].items()})
        write_cache(self._path(image), tensors, self._cache_key(image))

    def _texts_of(self, dataset: IndexedDataset, number: int) -> list[str]:
        record = dataset.records[number]
        subset = dataset.subset_of(record)
        if self.settings.variants is None:
            return [CaptionPipeline(subset.captions, 1).deterministic(record.caption)]
        pipeline = CaptionPipeline(subset.captions, 1)
        return pipeline.variants(record.caption, self.settings.variants, self.settings.seed)

    def _path(self, image: str) -> Path:
        return cache_path(image, "text", self.settings.cache_dir)

    def _extra_path(self, text: str) -> Path | None:
        """Where a text that belongs to no image is kept: in cache_dir, or beside the first image."""
        first = next(iter(self.paths.values()), None)
        if not self.settings.on_disk or first is None:
            return None
        return (self.settings.cache_dir or Path(first).parent) / f"further-{_digest(text)}.text.safetensors"

    def _cache_key(self, image: str) -> dict[str, object]:
        return {"captions": [_digest(text) for text in self.stored[image]], "encoders": self.settings.fingerprint}

    def _extra_cache_key(self, text: str) -> dict[str, object]:
        return {"format": FORMAT, "captions": [_digest(text)], "encoders": self.settings.fingerprint}

    def _is_fresh(self, image: str) -> bool:
        return read_cache_key(self._path(image)) == {"format": FORMAT, **self._cache_key(image)}


def _finite(encode: EncodeCaptions) -> EncodeCaptions:
    """`encode`, with a UserError for every caption of which an encoder's output is not finite."""

    def checked(captions: Sequence[str]) -> list[dict[str, Tensor]]:
        rows = encode(captions)
        problems = []
        for caption, outputs in zip(captions, rows):
            bad = [name for name, tensor in outputs.items() if not bool(tensor.isfinite().all())]
            if bad:
                problems.append(
                    f'The caption "{caption}": the output of the text encoder ({", ".join(bad)}) is not finite. Shorten or change the '
                    "caption, use --mixed_precision bf16, or --t5xxl_dtype fp32 for T5; if all captions are named, the file of the encoder is damaged."
                )
        if problems:
            raise UserError(problems)
        return rows

    return checked


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def check_cacheable(datasets: Sequence[IndexedDataset], variants: int | None) -> None:
    """Raise UserError where caching would lose what a subset has random. Dropout of whole captions works with caches."""
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
