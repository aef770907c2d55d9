"""A trial: a training that is killed, started again until it ends, and compared with the one that nobody killed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import Workshop
from tests.faults.jobs import Job
from tests.faults.kill_point import KillPoint
from tests.warm_processes import QUIET, ROOT, Process, start_python

LIMIT = 240.0
"""Seconds after which a run is stuck. One takes two to twenty; the machine may be busy."""
STOPPED = re.compile(r"lora-step\d{8}(-ema)?\.safetensors|lora-step\d{8}-state(/.*)?")
"""What a run that a signal has stopped saves under the step's name; the unbroken one may have no such file."""
STARTUP = Path(__file__).parent / "startup"


@dataclass(frozen=True)
class Strike:
    """How one run of a trial is ended: at a file operation, or by the clock after `seconds`."""

    kind: str  # KillPoint.kind
    operation: int = 0
    rank: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        when = f"after {self.seconds:.2f} s" if self.seconds else f"at operation {self.operation} of rank {self.rank}"
        return f"{self.kind} {when}"


@dataclass
class Ended:
    """How a run ended. code: None where it was stuck and had to be killed."""

    code: int | None
    output: str
    operations: list[int]  # of each rank
    last_operation: str


@dataclass
class Outcome:
    job: Job
    strikes: list[str] = field(default_factory=list)
    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        named = (("wrong", self.wrong), ("stuck", self.stuck), ("left over", self.left_over))
        return [f"{name}: {text}" for name, texts in named for text in texts]

    def __str__(self) -> str:
        return f"{self.job.name} [{'; '.join(self.strikes)}] " + "\n    ".join(self.faults or ["no fault"])


class Harness:
    """Runs trials, each in a folder of its own."""

    def __init__(self, workshop: Workshop, folder: Path):
        self.workshop, self.folder = workshop, folder
        self.count = 0
        self.unbroken: dict[str, tuple[Path, Ended]] = {}

    def reference(self, job: Job) -> tuple[Path, Ended]:
        """(folder, end) of the run that nobody kills; it runs once."""
        if job.name not in self.unbroken:
            folder = self.folder / f"unbroken {job.name}"
            end = self.run(job, folder)
            assert end.code == 0, f"{job.name}: {end.output[-4000:]}"
            self.unbroken[job.name] = folder, end
        return self.unbroken[job.name]

    def run(self, job: Job, folder: Path, strike: Strike | None = None, real: bool = False) -> Ended:
        """Start the training, strike, and wait for its end. real: by `accelerate launch`, with a new Python."""
        self.count += 1
        notes = self.folder / "notes" / str(self.count)
        notes.mkdir(parents=True)
        folder.mkdir(exist_ok=True)
        at = strike or Strike("none")
        point = KillPoint(str(folder.resolve()), str(notes), at.operation, str(at.rank), at.kind)
        words = job.words(self.workshop, folder, launched=real)
        process = _start_real(words, point, notes) if real else _start_forked(words, point)
        if strike and strike.seconds:
            deadline = time.monotonic() + strike.seconds
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            kill_all(notes, strike.rank if strike.kind == "one" else None)
        try:
            code: int | None = process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        self._wait_for_all(notes, patient=code is not None and (strike is None or strike.kind != "all"))
        operations, last = _operations(notes)
        output = _output(process, notes, real) if code is not None else ""
        return Ended(code, output, operations, last)

    def _wait_for_all(self, notes: Path, patient: bool) -> None:
        """Ranks end a moment after their launcher. What has not ended after 20 s is killed."""
        end = time.monotonic() + (20 if patient else 0)
        while _living(notes) and time.monotonic() < end:
            time.sleep(0.02)
        kill_all(notes)
        while _living(notes):
            time.sleep(0.02)

    def trial(self, job: Job, strikes: list[Strike], real: bool = False, again: bool = False) -> Outcome:
        """Kill one run for each strike, let the next one end, judge. again: then start the finished training once more."""
        reference, _ = self.reference(job)
        outcome = Outcome(job)
        folder, finished = self.folder / f"trial {self.count}", False
        for strike in [*strikes, None, *([None] if again else [])]:
            if strike is not None and finished:
                continue
            end = self.run(job, folder, strike, real)
            finished = end.code == 0
            if strike is not None:
                outcome.strikes.append(f"{strike} ({end.last_operation})")
                outcome.kills += end.code != 0
            if end.code is None:
                outcome.stuck.append(f"no end within {LIMIT:.0f} s")
                break
            if end.code != 0 and (strike is None or end.code == 2):
                outcome.stuck.append(f"exit code {end.code}: {_without_launcher(end.output)[-1500:]}")
                break
        else:
            stopped = any(strike.kind in ("stop", "one") for strike in strikes)
            judge(outcome, folder, reference, stopped)
        if not outcome.faults:
            shutil.rmtree(folder)
        return outcome


def judge(outcome: Outcome, folder: Path, reference: Path, stopped: bool) -> None:
    """Compare what a training has left in `folder` with the unbroken one's. stopped: a signal may have ended a run of it.

    Previews may be missing: those of a step whose state was saved before they were drawn are not drawn later.
    """
    names, expected = _names(folder), _names(reference)
    missing = [name for name in sorted(expected - names) if not name.startswith("output/sample/")]
    outcome.wrong += [f"{name} is missing" for name in missing]
    extra = sorted(names - expected)
    if stopped:
        extra = [name for name in extra if not STOPPED.fullmatch(name.removeprefix("output/"))]
    outcome.left_over += extra
    for path in sorted(folder.rglob("*.safetensors")):
        twin = reference / path.relative_to(folder)
        message = _difference(path, twin if twin.exists() else None)
        outcome.wrong += [f"{path.relative_to(folder).as_posix()} {message}"] if message else []


def random_strike(generator: random.Random, job: Job, end: Ended, seconds: float) -> Strike:
    """end: of the unbroken run, which takes about so many seconds."""
    rank = generator.randrange(job.processes)
    if generator.random() < 0.25:
        return Strike(generator.choice(["all", "one"]), rank=rank, seconds=generator.uniform(0.05, seconds))
    if rank >= len(end.operations) or not end.operations[rank]:
        rank = 0
    kind = generator.choice(["all", "all", "torn", "one", "stop"])
    return Strike(kind, generator.randint(1, end.operations[rank]), rank)


def kill_all(notes: Path, only: int | None = None) -> None:
    """SIGKILL every process of a run. only: the number of the one process that dies, in the order of their start, from the last."""
    living = _living(notes)
    for process in living if only is None else living[::-1][only : only + 1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def _living(notes: Path) -> list[psutil.Process]:
    found = []
    for path in sorted(notes.glob("*.pid"), key=lambda path: int(path.stem)):
        try:
            process = psutil.Process(int(path.stem))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def _start_forked(words: list[str], point: KillPoint) -> Process:
    environment = {"ACCELERATE_USE_CPU": "true", **point.environment()}
    return start_python(["-m", "tests.faults.victim", *words], environment)


def _start_real(words: list[str], point: KillPoint, notes: Path) -> Process:
    paths = os.pathsep.join([str(STARTUP), str(ROOT)])
    environment = {**os.environ, **QUIET, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, **point.environment()}
    with (notes / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=output, stderr=output, text=True, start_new_session=True
        )


def _output(process: Process, notes: Path, real: bool) -> str:
    if real:
        return (notes / "output.txt").read_text(errors="replace")
    return "".join(process.communicate())


def _without_launcher(output: str) -> str:
    """What the training has printed, without the traceback of torch's launcher."""
    return output.split('Traceback (most recent call last):\n  File "<frozen runpy>')[0].strip() or output.strip()


def _operations(notes: Path) -> tuple[list[int], str]:
    """(how many each rank made, the last one)"""
    path = notes / "operations.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    counts = Counter(int(line.split()[0]) for line in lines)
    return [counts[rank] for rank in range(max(counts, default=0) + 1)], " ".join(
        lines[-1].split()[1:]
    ) if lines else "none"


def _names(folder: Path) -> set[str]:
    """Previews have the time in their names, and one may be drawn twice."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {re.sub(r"_\d{14}_", "_TIME_", path) for path in paths}


def _difference(path: Path, twin: Path | None) -> str:
    """How a safetensors file is damaged, or differs from its twin in any bit of any tensor; empty where it does not."""
    try:
        tensors = load_file(path)
    except Exception as error:
        return f"is damaged: {error}"
    if twin is None:
        return ""
    expected = load_file(twin)
    if tensors.keys() != expected.keys():
        return "has other keys"
    return "" if all(torch.equal(tensors[key], expected[key]) for key in tensors) else "differs"
