"""One run at a time under one name in one output folder: a lock file that tells who writes there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from library.common.files import temporary_name
from library.common.processes import ProcessId, remove_stale_temporaries, start_time, this_process
from library.saving.state import own_state_name

logger = logging.getLogger(__name__)
BEAT = 30.0  # seconds between two signs of life
SILENCE = 150.0  # seconds without one, after which a run on another machine counts as dead


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. process_start tells the process from a later one with its number."""

    machine: str
    pid: int
    process_start: float
    host: str
    since: str

    @classmethod
    def this(cls) -> Holder:
        own = this_process()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(own.machine, own.pid, start_time(own.pid) or 0.0, socket.gethostname(), since)

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.machine, self.pid)

    def may_live(self, silence: float) -> bool:
        """silence: seconds since the last sign of life, by which runs on other machines are judged."""
        if self.machine != this_process().machine:
            return silence < SILENCE
        started = start_time(self.pid)
        return started is not None and abs(started - self.process_start) < 5


class RunLock:
    """A context that holds the lock from `acquire` to its end. A killed run's lock stays, and the next run takes it over."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.holder = Holder.this()
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        if self.path is not None and _read(self.path) == self.holder:
            self.path.unlink(missing_ok=True)

    def acquire(self, folder: Path, name: str) -> list[str]:
        """Take the lock of output name `name` and remove what killed runs have left; the problem where another run holds it.

        A folder that cannot be written, which is another's problem to report, is not locked.
        """
        path = folder / f".{name}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = self._take(path)
        except OSError:
            return []
        if before is not None and self.path is None:
            return [
                f'--output_dir {folder}: another run writes "{name}" there: process {before.pid} on {before.host}, since {before.since}. '
                f"Wait for it or stop it, or give another --output_name. If it lives no longer, remove {path}."
            ]
        threading.Thread(target=self._beat, args=(path,), name="lock", daemon=True).start()
        if before is not None:
            logger.info(
                "The run of process %d on %s lives no longer: this one takes its place.", before.pid, before.host
            )
        recover_states(folder, name)
        dead = [] if before is None else [before.process]
        for leftover in remove_stale_temporaries((folder, folder / "sample"), dead):
            logger.info("Removed %s, which a killed run has left", leftover)
        return []

    def _take(self, path: Path) -> Holder | None:
        """Set `self.path` where the lock is taken. Returns who held it before, or holds it."""
        text = json.dumps(asdict(self.holder))
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            self.path = path
            return None
        except FileExistsError:
            pass
        candidate = temporary_name(path)  # a kill here leaves a file that the next start removes
        try:
            candidate.write_text(text, encoding="utf-8")
            holder = _read(path)
            silence = candidate.stat().st_mtime - path.stat().st_mtime  # both by the disk's clock
            if holder is None and silence < SILENCE:  # it is being written
                time.sleep(1)
                holder = _read(path)
            if holder is not None and holder.may_live(silence):
                return holder
            os.replace(candidate, path)
        finally:
            candidate.unlink(missing_ok=True)
        time.sleep(0.2)  # of two runs that take over at once, the later one has it
        now = _read(path)
        if now == self.holder:
            self.path = path
            return holder
        return now

    def _beat(self, path: Path) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(path)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def recover_states(folder: Path, name: str) -> None:
    """Put back a state that a killed run was replacing; remove those that it was writing. Call it with the lock held."""
    for path in folder.glob(".*-state.*"):
        state, _, kind = path.name[1:].rpartition(".")
        if not own_state_name(name).fullmatch(state) or kind not in ("old", "tmp"):
            continue
        with suppress(OSError):
            if kind == "old" and not (folder / state).exists():
                os.replace(path, folder / state)
            else:
                shutil.rmtree(path)
                logger.info("Removed %s, which a killed run has left", path)
