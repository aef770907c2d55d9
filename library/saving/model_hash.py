"""Hashes by which programs recognise models: of base files, worked out beside training, and of LoRA files."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)
LEGACY_OFFSET = 0x100000
LEGACY_LENGTH = 0x10000
CHUNK = 1 << 20  # bytes


def legacy_hash(data: bytes) -> str:
    """The old short hash of a file's bytes: 8 hex digits of the SHA-256 of 64 KiB at 1 MiB (of nothing in smaller files)."""
    return hashlib.sha256(data[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_LENGTH]).hexdigest()[:8]


def legacy_file_hash(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def lora_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash, as sd-scripts and the WebUI have them.

    The first is the SHA-256 of a safetensors file's body, so that editing metadata does not change it. The second is the
    legacy hash of the file with its ss_ metadata alone.
    """
    from safetensors.torch import save

    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()}, training)
    body = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    return {"sshs_model_hash": hashlib.sha256(body).hexdigest(), "sshs_legacy_hash": legacy_hash(data)}


class FileHashes:
    """The SHA-256 of large files, read in a thread that neither training nor the program's end waits for."""

    def __init__(self, paths: Sequence[Path]):
        self._hashes: dict[Path, str] = {}
        self._thread = threading.Thread(
            target=self._work, args=(list(dict.fromkeys(paths)),), name="hashes", daemon=True
        )
        self._thread.start()

    def ready(self) -> dict[Path, str]:
        """The hashes that are known by now."""
        return dict(self._hashes)

    def all(self) -> dict[Path, str]:
        """All hashes; waits for those that are still being read. A file that cannot be read has none."""
        self._thread.join()
        return dict(self._hashes)

    def _work(self, paths: Sequence[Path]) -> None:
        for path in paths:
            try:
                self._hashes[path] = _sha256(path)
            except OSError as error:
                logger.warning("%s: its hash will be missing from the metadata (%s)", path, error)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
