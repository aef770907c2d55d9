"""The three tokenizers: from a folder of the user's, from beside the checkpoint, or from the Hugging Face Hub.

Searched in this order, each tokenizer in a folder of its own, named as on the Hub with "/" written "_":
1. `--tokenizer_cache_dir`
2. `<checkpoint's name without .safetensors>_tokenizers` beside the checkpoint
3. `tokenizers` beside the checkpoint
4. `tokenizer` and `tokenizer_3` beside the checkpoint, as in a copy of the model's repository
5. the Hub; the download is kept in `--tokenizer_cache_dir` where one is given.
CLIP-G has CLIP-L's vocabulary, so CLIP-L's folder serves for it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.files import temporary_name
from library.common.processes import remove_stale_temporaries

HUB_NAMES = {
    "clip_l": "openai/clip-vit-large-patch14",
    "clip_g": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google/t5-v1_1-xxl",
}
MAX_T5_TOKENS = 512
_CLIP_G_PAD_ID = 0  # CLIP-L and T5 have a padding token of their own
_VOCABULARY_FILES = {
    "clip_l": "vocab.json and merges.txt",
    "clip_g": "vocab.json and merges.txt",
    "t5xxl": "spiece.model",
}
_REPOSITORY_FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer", "t5xxl": "tokenizer_3"}


@dataclass(frozen=True)
class Tokenizer:
    inner: Any  # a transformers tokenizer
    pad_id: int

    def __call__(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """captions -> ids [B, length] and mask [B, length] (1 text, with its begin and end; 0 padding), both int64.

        Longer captions are cut, the end token kept. Padding is done here, so that it never changes how "!" (CLIP-G's
        padding token) is read in a caption.
        """
        rows = self.inner(list(captions), truncation=True, max_length=length, padding=False)["input_ids"]
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        return ids, mask

    def count(self, caption: str) -> int:
        """Tokens of a caption before it is cut, begin and end included."""
        return len(self.inner(caption, truncation=False)["input_ids"])

    @property
    def vocabulary(self) -> int:
        return len(self.inner)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell one way from captions to ids from another, wherever and in which files it lies."""
        rules = json.loads(self.inner.backend_tokenizer.to_str())
        kept = {
            key: rules.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor")
        }
        return hashlib.sha256(json.dumps([kept, self.pad_id], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tokenizers:
    """None for one whose encoder is not used."""

    clip_l: Tokenizer | None
    clip_g: Tokenizer | None
    t5: Tokenizer | None

    def of(self, encoder: str) -> Tokenizer | None:
        """The tokenizer of "clip_l", "clip_g" or "t5xxl"."""
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5xxl": self.t5}[encoder]


def download(name: str) -> Path:
    """The folder with an encoder's tokenizer from the Hub, or from the Hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
    ]
    try:
        folder = Path(snapshot_download(HUB_NAMES[name], allow_patterns=files, local_files_only=True))
    except FileNotFoundError:
        folder = Path(snapshot_download(HUB_NAMES[name], allow_patterns=files))
    # A cache may hold the repository's other files alone.
    return folder if _has_vocabulary(folder) else Path(snapshot_download(HUB_NAMES[name], allow_patterns=files))


def load_tokenizers(
    cache_dir: str | Path | None,
    beside: str | Path | None,
    names: Sequence[str] = ("clip_l", "clip_g", "t5xxl"),
    from_hub: Callable[[str], Path] = download,
) -> Tokenizers:
    """The tokenizers of the `names` encoders; `beside` is the checkpoint's path.

    UserError tells where they were looked for and how to get them.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else None
    checkpoint = Path(beside) if beside else None
    loaded: dict[str, Tokenizer] = {}
    problems = []
    for name in names:
        try:
            inner = _find(name, cache, checkpoint, from_hub)
        except UserError as error:
            problems += error.problems
            continue
        loaded[name] = Tokenizer(inner, _CLIP_G_PAD_ID if name == "clip_g" else inner.pad_token_id)
    if problems:
        raise UserError(problems)
    return Tokenizers(loaded.get("clip_l"), loaded.get("clip_g"), loaded.get("t5xxl"))


def vocabulary_problems(tokenizers: Tokenizers, vocabularies: Mapping[str, int]) -> list[str]:
    """Where a tokenizer belongs to another model than its encoder; vocabularies: rows of the encoders' embeddings by name."""
    problems = []
    for name, tokenizer in (("clip_l", tokenizers.clip_l), ("clip_g", tokenizers.clip_g), ("t5xxl", tokenizers.t5)):
        rows = vocabularies.get(name)
        # T5 has some rows more than tokens: its table is rounded up.
        if tokenizer is not None and rows is not None and not 0 <= rows - tokenizer.vocabulary <= rows // 10:
            problems.append(
                f"The tokenizer of {name} has {tokenizer.vocabulary} tokens, its text encoder {rows}: they belong to different"
                " models. Give the right ones with --tokenizer_cache_dir."
            )
    return problems


def folder_name(name: str) -> str:
    """The folder of an encoder's tokenizer inside a folder of tokenizers."""
    return HUB_NAMES[name].replace("/", "_")


def tokenizer_problems(
    cache_dir: str | Path | None,
    beside: str | Path | None,
    names: Sequence[str],
    from_hub: Callable[[str], Path] = download,
) -> list[str]:
    """What `load_tokenizers` would not find, without reading any: those of the Hub are downloaded."""
    cache = Path(cache_dir).expanduser() if cache_dir else None
    problems = []
    for name in names:
        try:
            _locate(name, cache, Path(beside) if beside else None, from_hub)
        except UserError as error:
            problems += error.problems
    return problems


def _find(name: str, cache: Path | None, checkpoint: Path | None, from_hub: Callable[[str], Path]) -> Any:
    folder, is_download = _locate(name, cache, checkpoint, from_hub)
    tokenizer = _from_folder(name, folder)
    if is_download and cache is not None:
        _keep(tokenizer, cache / folder_name(name))
    return tokenizer


def _locate(
    name: str, cache: Path | None, checkpoint: Path | None, from_hub: Callable[[str], Path]
) -> tuple[Path, bool]:
    """The tokenizer's folder, and whether it is the Hub's."""
    local = next((folder for folder in _folders(name, cache, checkpoint) if folder.is_dir()), None)
    try:
        folder = from_hub(name) if local is None else local
    except OSError as error:  # no network, a server's refusal: huggingface_hub's errors are OSErrors
        raise UserError(
            f"There is no tokenizer for {name}, and it cannot be downloaded ({_first_line(error)}). Put the files of"
            f" https://huggingface.co/{HUB_NAMES[name]} ({_VOCABULARY_FILES[name]}, or a tokenizer.json)"
            f" into {_suggested_folder(name, cache, checkpoint)}."
        ) from error
    if not _has_vocabulary(folder):
        raise UserError(
            f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor spiece.model."
        )
    return folder, local is None


def _from_folder(name: str, folder: Path) -> Any:
    """The tokenizer in a folder that has the files: without them transformers makes an empty one without a word."""
    from transformers import CLIPTokenizer, T5Tokenizer

    kind: Any = T5Tokenizer if name == "t5xxl" else CLIPTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # a damaged tokenizer raises anything, from JSON errors to those of the Rust library
        raise UserError(f"The tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    if not letter or tokenizer.unk_token_id in letter:
        raise UserError(f"The tokenizer in {folder} does not know the letter a: its vocabulary is missing or damaged.")
    return tokenizer


def _has_vocabulary(folder: Path) -> bool:
    sets = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    return any(all((folder / file).is_file() for file in files) for files in sets)


def _folders(name: str, cache: Path | None, checkpoint: Path | None) -> list[Path]:
    names = [folder_name(name)] + ([folder_name("clip_l")] if name == "clip_g" else [])
    roots = [cache] if cache is not None else []
    if checkpoint is not None:
        roots += [checkpoint.with_name(f"{checkpoint.stem}_tokenizers"), checkpoint.with_name("tokenizers")]
    folders = [root / folder for root in roots for folder in names]
    return folders + ([checkpoint.with_name(_REPOSITORY_FOLDERS[name])] if checkpoint is not None else [])


def _suggested_folder(name: str, cache: Path | None, checkpoint: Path | None) -> str:
    if cache is not None:
        return str(cache / folder_name(name))
    beside = f"{checkpoint.with_name('tokenizers') / folder_name(name)}, or into " if checkpoint is not None else ""
    return f"{beside}a folder {folder_name(name)} in the folder that --tokenizer_cache_dir names"


def _keep(tokenizer: Any, folder: Path) -> None:
    """Save a downloaded tokenizer, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries([folder.parent])
    temporary = temporary_name(folder)
    try:
        tokenizer.save_pretrained(str(temporary))
        if not folder.exists():  # another process may have been faster
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
