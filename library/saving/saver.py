"""Saving while training goes on: the caller hands over host copies, a thread writes them.

Files appear whole or not at all, in the order in which they were handed over; old ones are removed only after the new one is
on the disk. An error of the thread is raised at the next call on the caller's thread.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.files import atomic_write, save_safetensors

logger = logging.getLogger(__name__)
Job = Callable[[], None]
MAX_PENDING_JOBS = 2  # jobs; each holds a host copy of what it saves


class BackgroundSaver:
    """Runs jobs one after another in a thread. Use it as a context: leaving it waits for all jobs."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(MAX_PENDING_JOBS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def submit(self, job: Job) -> None:
        """Have a job done. Waits only when two are waiting already."""
        self._raise()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until everything handed over is on the disk."""
        self._jobs.join()
        self._raise()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                if self._error is None:
                    job()
            except BaseException as error:
                self._error = error
            finally:
                self._jobs.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file: safetensors with metadata, or torch's format for .pt and .ckpt. UserError where the disk is full."""
    with translate_write_errors(path):
        if path.suffix == ".safetensors":
            save_safetensors(path, tensors, metadata)
        else:
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                torch.save(dict(tensors), file)  # given a path, torch reports a full disk by an error of its own
    logger.info("Saved %s", path)


def write_weights_somewhere(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], fallbacks: Sequence[Path]
) -> tuple[Path, list[str]]:
    """Write a LoRA file, on a full disk into the first of the other folders that takes it; return where it is, and what went wrong."""
    try:
        write_weights(path, tensors, metadata)
        return path, []
    except UserError as error:
        for folder in fallbacks:
            other = _unused(folder / path.name)
            with suppress(UserError):
                write_weights(other, tensors, metadata)
                return other, [f"{error} The LoRA is in {other}: nothing of the training is lost."]
        raise


def fallback_folders(cache_dir: Path | None) -> list[Path]:
    """Where a LoRA goes that its own folder does not take: --cache_dir, the home folder, the system's folder for temporary files."""
    folders = [] if cache_dir is None else [cache_dir]
    with suppress(RuntimeError):  # a user without a home
        folders.append(Path.home())
    with suppress(OSError):
        folders.append(Path(gettempdir()))
    return folders


def _unused(path: Path) -> Path:
    """The path, with a number where there is such a file already."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(each for each in chain([path], numbered) if not each.exists())


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` inside the block into a UserError: a full disk, a folder that has gone."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: it cannot be written ({error.strerror or error}). What was saved before is whole: make room, and go on with "
            "--resume auto if there is a state."
        ) from error


def remove(paths: Sequence[Path]) -> None:
    """Remove old files and state folders. One that cannot be removed is left, with a warning."""
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            logger.info("Removed %s", path)
        except OSError as error:
            logger.warning("%s is old but cannot be removed: %s", path, error)
