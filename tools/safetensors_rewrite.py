"""A safetensors file again with other metadata or some other tensors: the rest is copied byte by byte, so memory holds one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.common.files import atomic_write
from library.common.safetensors_header import read_header
from library.common.tensor_io import DTYPE_NAMES

CHUNK = 16 << 20  # bytes


def rewrite(
    source: Path, target: Path, metadata: Mapping[str, str], changed: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Write `source` to `target`, whole or not at all, with `metadata` in place of its own.

    changed: names with new values of the same dtype and shape, one after another. Names, order and all else stay.
    """
    header = read_header(source)
    entries = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in header.tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.offsets}  # type: ignore[dict-item]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors start at a multiple of 8 bytes, as the format wants
    with atomic_write(target) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        start = new.tell()
        old.seek(header.data_start)
        shutil.copyfileobj(old, new, CHUNK)
        for name, tensor in changed:
            info = header.tensors[name]
            if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (info.dtype, info.shape):
                raise ValueError(f"{name} must stay {info.dtype} {info.shape}")
            new.seek(start + info.offsets[0])
            new.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
