"""Processes that start in a moment: forked from one that has imported torch, transformers and this program.

The real command takes seconds of processor time to import what it needs. A test that needs a process of its own, to kill
it or to have two of them, gets one here that has it all imported. What a command is from its first line on is for the tests that
start it with `subprocess`. Windows knows no fork: there everything is started as usual.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Union

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = sys.platform != "win32"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
LAUNCHERS = ("accelerate.commands.launch", "torch.distributed.run")


def run_ranks(work: Callable[..., None], *arguments: object, processes: int = 2) -> None:
    """Call `work(rank, *arguments)` in several processes, as torch.multiprocessing.spawn does, and wait for them."""
    from torch.multiprocessing import start_processes

    method = "forkserver" if CAN_FORK else "spawn"
    _start_server()
    start_processes(work, arguments, processes, start_method=method)


def start_python(words: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
    """Start `python WORDS`, a script or `-m MODULE` with arguments. environment: on top of this process's and of QUIET."""
    whole = {**os.environ, **QUIET, **(environment or {})}
    if CAN_FORK:
        return WarmProcess(words, whole, cwd)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=whole, stdout=pipe, stderr=pipe, text=True)


def run_python(
    words: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """`start_python`, waited for. subprocess.TimeoutExpired where it takes longer; then it is killed."""
    process = start_python(words, environment, cwd)
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(words), process.returncode or 0, out, error)


class WarmProcess:
    """What of subprocess.Popen the tests use."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], cwd: Path):
        _start_server()
        self.words = list(words)
        self._folder = tempfile.TemporaryDirectory(prefix="warm_process")
        outputs = [os.path.join(self._folder.name, name) for name in ("out", "error")]  # noqa: PTH118
        for path in outputs:
            Path(path).touch()
        context = multiprocessing.get_context("forkserver")
        self._outputs = [Path(path) for path in outputs]
        self._process = context.Process(target=_become, args=(self.words, dict(environment), str(cwd), outputs))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr) of a process that ends by itself."""
        self.wait(timeout)
        out, error = (path.read_text(encoding="utf-8", errors="replace") for path in self._outputs)
        return out, error

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


Process = Union[WarmProcess, "subprocess.Popen[str]"]


@contextlib.contextmanager
def _surroundings(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start_server() -> None:
    """The process that the others are forked from, once for each process of pytest; torch reads some settings when it is imported."""
    if CAN_FORK:
        multiprocessing.set_forkserver_preload(["tests.warm_imports"])
        with _surroundings({**QUIET, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}):
            forkserver.ensure_running()


def _become(words: list[str], environment: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """Be `python WORDS` from here on."""
    for number, path in enumerate(outputs, start=1):
        with open(path, "ab") as file:  # noqa: PTH123
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    more = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each and each not in sys.path]
    sys.path[:0] = more
    run_words(words)


def run_words(words: list[str]) -> None:
    """Run what `python WORDS` would."""
    if words[0] != "-m":
        _run_script(*words)
    elif words[1] in LAUNCHERS:
        _fork_what_is_launched()
        sys.argv = words[1:]
        importlib.import_module(words[1]).main()
    else:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _run_script(*words: str) -> None:
    sys.argv = list(words)
    sys.path.insert(0, os.path.dirname(words[0]))  # noqa: PTH120
    runpy.run_path(words[0], run_name="__main__")


def _run_launched(*words: str) -> None:
    """A launched script; torch's launcher waits for a function's result, so that a good end must not be an exit."""
    try:
        _run_script(*words)
    except SystemExit as end:
        if end.code:
            raise


def _fork_what_is_launched() -> None:
    """Let torch's launcher, which accelerate's is one of, fork its processes too, where it would start `python SCRIPT`."""
    from torch.distributed import run

    plain = run.config_from_args

    def config_from_args(args: Any) -> Any:
        config, _, words = plain(args)
        config.start_method = "fork"
        script = words.index("-u") + 1 if "-u" in words else 0
        return config, _run_launched, words[script:]

    run.config_from_args = config_from_args
