"""Batches that cannot be read in the middle of training: caches are made again, a batch without weight stands in, or the run ends.

Workers only report what they could not read. The main process, which has the models, deals with it.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from library.common.errors import ReadError, UserError
from library.common.seeds import preserve_rng_state
from library.data.batch import Batch, CacheReadError

if TYPE_CHECKING:
    from library.data.batch import LatentSource, TextSource
    from library.data.loader import BatchKey, LoaderSettings, ReadFailure

logger = logging.getLogger(__name__)
KILLED = "A data worker was killed, most likely because the host memory was full. Lower --max_data_loader_n_workers."


class Reader(Protocol):
    """`library.data.loader.BatchReader`, in the main process."""

    settings: LoaderSettings
    latents: LatentSource | None
    texts: TextSource | None

    def read(self, key: BatchKey) -> Batch: ...


class Recovery:
    """Turns what the workers send into batches."""

    def __init__(self, reader: Reader, goes_on_after_failure: bool):
        """goes_on_after_failure: other processes wait in every step, so this one takes part until all have agreed to stop."""
        self.reader, self.goes_on_after_failure = reader, goes_on_after_failure
        self.failure: UserError | None = None
        self._last: Batch | None = None

    def batches(self, results: Iterator[Batch | ReadFailure]) -> Iterator[Batch]:
        """The batches, each as it was planned or with another one without weight in its place. ReadError where there is none."""
        while True:
            try:
                batch = next(results, None)
            except (RuntimeError, OSError, EOFError) as error:  # torch has no class of its own for it
                if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                    raise
                killed = ReadError(KILLED)
                yield from self._without_workers(killed)
                raise killed from error
            if batch is None:
                return
            if not isinstance(batch, Batch):
                batch = self._recovered(batch)
            self._last = batch
            yield batch

    def _without_workers(self, error: ReadError) -> Iterator[Batch]:
        """Batches without weight until all processes have agreed to stop; none where there are no other processes."""
        while self.goes_on_after_failure and self._last is not None:
            self.failure = self.failure or error
            yield self._last.without_weight()

    def _recovered(self, failed: ReadFailure) -> Batch:
        error: UserError = failed.error
        tried: set[tuple[str, int, int]] = set()
        while isinstance(error, CacheReadError) and (entry := (error.kind, error.dataset, error.number)) not in tried:
            tried.add(entry)
            try:
                self._remake(error)
                batch = self.reader.read(failed.key)
                return batch.pin_memory() if self.reader.settings.pin_memory else batch
            except UserError as again:
                error = again
        skips = self.reader.settings.skip_bad_images
        if self._last is None or not (skips or self.goes_on_after_failure):
            raise error if isinstance(error, ReadError) else ReadError(error.problems)
        logger.warning("%s Its batch is left out.", error)
        if not skips:
            self.failure = self.failure or error
        return self._last.without_weight()

    def _remake(self, missing: CacheReadError) -> None:
        """Make a cache entry again. ReadError says why the entry is needed and why it cannot be made."""
        source = self.reader.latents if missing.kind == "latents" else self.reader.texts
        assert source is not None
        logger.warning("%s It is made again now.", missing)
        try:
            with preserve_rng_state([]):
                source.remake(missing.dataset, missing.number)
        except UserError as error:
            raise ReadError([*missing.problems, *error.problems]) from error
        except torch.OutOfMemoryError as error:
            raise ReadError(
                [*missing.problems, "The GPU's memory is too full to make it again in training."]
            ) from error


@contextmanager
def keep_child_handler() -> Iterator[None]:
    """Keep the handler of SIGCHLD while a DataLoader starts its workers.

    torch's handler raises for a killed worker anywhere in the main thread: in the middle of an optimizer step, say. Without
    it the DataLoader notices a dead worker when it waits for a batch.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
