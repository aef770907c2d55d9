"""Inside the processes of a trial: counts their file operations and kills at the one that was chosen.

An operation is a file opened for writing, a rename, a removal, a folder made or removed, or a flush to the disk (fsync), within
the trial's folder. Python's audit hooks report all but the last, whatever library does them; `os.fsync` is wrapped. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TRIAL_KILL_POINT"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class KillPoint:
    """When a run is killed, and how. Travels to its processes in an environment variable."""

    folder: str  # operations in it count
    notes: str  # a folder outside of it: processes leave their pids here, and a list of their operations
    operation: int = 0  # the n-th of one process, counted from 1; 0: never
    rank: str = "0"  # the process that counts
    kind: str = "all"
    """all: SIGKILL to every process. torn: the same, and a file being flushed loses its end, as in a power cut.
    one: SIGKILL to the counting process alone. stop: SIGTERM or SIGHUP to every process, SIGKILL 7 operations later."""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def install() -> None:
    """Count and kill in this process and in those forked from it, where the environment says so."""
    if VARIABLE in os.environ:
        counter = OperationCounter(KillPoint(**json.loads(os.environ[VARIABLE])))
        counter.register()
        os.register_at_fork(after_in_child=counter.register)
        sys.addaudithook(counter.audit)
        counter.wrap_fsync()


class OperationCounter:
    """Counts the operations of this process; a fork starts at zero."""

    def __init__(self, point: KillPoint):
        self.point = point
        self.lock = threading.RLock()
        self.count = 0
        self.log = -1

    def register(self) -> None:
        """Leave this process's pid where the others and the harness find it."""
        self.lock, self.count = threading.RLock(), 0
        notes = Path(self.point.notes)
        (notes / f"{os.getpid()}.pid").touch()
        self.log = os.open(notes / "operations.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING:
                self.operation(event, path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            relative_to = arguments[2] if event in ("os.rename", "os.mkdir") else arguments[1]
            self.operation(event, arguments[0], relative_to)

    def wrap_fsync(self) -> None:
        fsync = os.fsync

        def counted(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.operation("fsync", _path_of(number), number)
            fsync(descriptor)

        os.fsync = counted

    def operation(self, event: str, path: object, descriptor: int = -1) -> None:
        """Called before it happens. descriptor: of the folder that path is relative to, or of the file that is flushed."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(path)
        if not os.path.isabs(name) and isinstance(descriptor, int) and descriptor >= 0:  # noqa: PTH117
            name = os.path.join(_path_of(descriptor), name)  # noqa: PTH118
        if not os.path.abspath(name).startswith(self.point.folder):  # noqa: PTH100
            return
        rank = os.environ.get("RANK", "0")
        with self.lock:
            self.count += 1
            relative = name.removeprefix(self.point.folder)
            os.write(self.log, f"{rank} {self.count} {event} {relative}\n".encode())
            if rank == self.point.rank and self.point.operation:
                self._strike(event, descriptor)

    def _strike(self, event: str, descriptor: int) -> None:
        kind, count, at = self.point.kind, self.count, self.point.operation
        if kind == "stop":
            if count == at:
                _signal(self._pids(), random.choice([signal.SIGTERM, signal.SIGHUP]))
            elif count == at + 7:
                self._kill_all()
        elif count == at:
            if kind == "torn" and event == "fsync" and Path(_path_of(descriptor)).is_file():
                os.ftruncate(descriptor, random.randrange(1 + os.fstat(descriptor).st_size))
            if kind != "one":
                self._kill_all()
            os.kill(os.getpid(), signal.SIGKILL)

    def _pids(self) -> list[int]:
        return [int(path.stem) for path in Path(self.point.notes).glob("*.pid")]

    def _kill_all(self) -> None:
        _signal([pid for pid in self._pids() if pid != os.getpid()], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
