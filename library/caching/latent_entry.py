"""What the latents of one image depend on: the name of its cache file, the key in it, and the noise of its posterior."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.caching.files import content_hash
from library.data.buckets import cover
from library.data.dataset import ImageRecord
from library.data.images import LATENT_CHANNELS, VAE_SCALE_FACTOR
from library.data.settings import SubsetSettings

NO_TIMES = {"mtime_ns": None, "mask_mtime_ns": None}
Key = tuple[int, int]
"""Number of the dataset, number of the record in it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a dataset, for the cache."""

    key: Key
    record: ImageRecord
    subset: SubsetSettings
    kind: str  # of the cache file: what sets apart the caches of one image
    flipped: bool  # whether it has mirrored latents too


def cache_key(entry: Entry, content: str, mask_content: str, fingerprint: str) -> dict[str, object]:
    """What a file records. content, mask_content: hashes of the files. fingerprint: of the VAE."""
    record, subset = entry.record, entry.subset
    mask_size, mask_time = _mask_stamp(record.mask_path)
    return {
        "content": content,
        "file_size": record.file_size,
        "mtime_ns": record.mtime_ns,
        "size": list(record.size),
        "bucket": list(record.bucket),
        "resized": list(record.resized),
        "interpolation": subset.resize_interpolation,
        "face_crop": list(subset.face_crop_aug_range or []),
        "flipped": entry.flipped,
        "mask": [Path(record.mask_path).name, mask_size] if record.mask_path else subset.alpha_mask,
        "mask_content": mask_content,
        "mask_mtime_ns": mask_time,
        "vae": fingerprint,
    }


def posterior_noise(record: ImageRecord, kind: str = "") -> Tensor:
    """[16, h, w] float32 ~ N(0, 1): of the image alone, so that its latents depend on neither batch nor order nor place."""
    facts = f"{Path(record.path).name} {record.file_size} {record.bucket} {kind}"
    seed = int.from_bytes(hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1
    width, height = record.bucket
    shape = (LATENT_CHANNELS, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cache_kind(record: ImageRecord, subset: SubsetSettings) -> str:
    """The bucket, and a mark of what else decides the latents where that is not the default."""
    width, height = record.bucket
    mask = Path(record.mask_path).parent.name if record.mask_path else subset.alpha_mask
    scaled = None if record.resized == cover(record.size, record.bucket) else record.resized
    facts = (subset.resize_interpolation, subset.face_crop_aug_range, mask, scaled)
    if not any(facts):
        return f"{width}x{height}.latents"
    mark = hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=3).hexdigest()
    return f"{width}x{height}-{mark}.latents"


def content_hashes(record: ImageRecord) -> tuple[str, str]:
    """Hashes of the image and of its mask file, "" without one."""
    return content_hash(record.path), content_hash(record.mask_path) if record.mask_path else ""


def _mask_stamp(path: str | None) -> tuple[int, int]:
    """Size in bytes and time in ns of a mask file; zeros without one."""
    if path is None:
        return 0, 0
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns
