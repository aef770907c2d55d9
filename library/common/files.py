"""Whole files or none: everything that lasts is written beside its target and renamed when complete."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from library.common.processes import temporary_mark

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 255  # bytes, on most file systems


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; rename it to `path` when the block ends without an error.

    The content is flushed to disk before the rename, so that a crash leaves the old file or the new one, never a part. Who may
    read it follows from the old file, or from the user's umask, whatever the library does that writes the content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        temporary.touch()
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        flush_to_disk(temporary)
        os.replace(temporary, target)
        flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(target: Path) -> Path:
    """A new name beside the target that tells which process writes it: `remove_stale_temporaries` reads it."""
    mark = temporary_mark(uuid.uuid4().hex[:8])
    name = os.fsencode(target.name)[: LONGEST_NAME - len(mark) - 2].decode("utf-8", "ignore")
    return target.with_name(f".{name}.{mark}")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device, made contiguous on the CPU) and string metadata atomically. OSError where it cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(ready, str(temporary), metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise (_system_error(error) or error) from error
        _sort_metadata(temporary)


def _system_error(error: Exception) -> OSError | None:
    """The operating system's error inside one of safetensors' ("... (os error 28)"); None where there is none."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match is None:
        return None
    number = int(match.group(1))
    return OSError(number, os.strerror(number)) if os.name == "posix" else OSError(0, str(error), None, number)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library writes them in one that differs from run to run."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # always, unless the two libraries escape a character differently
            file.seek(8)
            file.write(text.ljust(size))


def check_writing(folder: Path, leaves_no_trace: bool = False) -> None:
    """Make the folder and a file in it; OSError where that cannot be done. leaves_no_trace: judge it by rights alone, and make nothing."""
    if not leaves_no_trace:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(folder / "write-test")
        try:
            temporary.touch(exist_ok=False)
        finally:
            temporary.unlink(missing_ok=True)
        return
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
    if hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(existing))


def flush_to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk, so that a rename outlasts a power cut. Windows does that by itself."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(descriptor)
