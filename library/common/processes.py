"""Which process made a file, and whether it may still live: for temporary files and locks on a disk that hosts may share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CLOCK_SKEW = 120.0  # seconds between a disk's clock and this machine's
FOREIGN_AGE = 24 * 3600.0  # seconds after which a temporary file of another machine counts as left over
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class ProcessId:
    machine: str  # 8 hexadecimal digits: the host and the namespace in which `pid` counts (a container has its own)
    pid: int


def this_process() -> ProcessId:
    return ProcessId(_machine(), os.getpid())


@cache
def _machine() -> str:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=4).hexdigest()


def start_time(pid: int) -> float | None:
    """When the process began, in seconds since 1970; None where there is no such process, or it is dead and not yet reaped."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def temporary_mark(random: str) -> str:
    """The part of a temporary file's name that tells whose it is. random: 8 hexadecimal digits."""
    process = this_process()
    return f"{process.machine}-{process.pid}-{random}.tmp"


def remove_stale_temporaries(folders: Iterable[Path], dead: Collection[ProcessId] = ()) -> list[Path]:
    """Remove the temporary files that killed processes have left in the folders; return them.

    Files of other machines, whose processes cannot be seen from here, are left for a day. dead: processes that are known to live
    no longer.
    """
    removed = []
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".tmp")]
        except OSError:
            continue
        removed += [folder / name for name in names if _is_stale(folder / name, dead) and _remove(folder / name)]
    return removed


def _is_stale(path: Path, dead: Collection[ProcessId]) -> bool:
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    owner = ProcessId(match[1], int(match[2]))
    try:
        changed = path.stat().st_mtime
    except OSError:
        return False
    if owner in dead:
        return True
    if owner.machine != this_process().machine:
        return time.time() - changed > FOREIGN_AGE
    started = start_time(owner.pid)
    return started is None or started > changed + CLOCK_SKEW  # later: another process has the number now


def _remove(path: Path) -> bool:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # another start may have been faster
        return False
    return True
