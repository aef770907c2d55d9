"""Starting the real command in several processes, as users do: with accelerate's launcher and the files of docs/configs/."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from tests.warm_processes import ROOT, Process, start_python

CONFIGS = ROOT / "docs" / "configs"
ACCELERATE = ("-m", "accelerate.commands.launch")


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(launcher: list[str], arguments: list[str], more: dict[str, str] | None = None) -> Process:
    """Start `accelerate launch LAUNCHER sd3_train_network.py ARGUMENTS` on the CPU. more: environment variables."""
    words = [*ACCELERATE, *launcher, str(ROOT / "sd3_train_network.py"), *arguments]
    return start_python(words, {"ACCELERATE_USE_CPU": "true", **(more or {})})


def finished(process: Process) -> str:
    """What it told; fails where it did not end well. One that hangs is ended: the launcher takes its processes along."""
    try:
        out, error = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == 0, error[-4000:]
    return out + error


def stand_in_for_deepspeed(folder: Path) -> dict[str, str]:
    """accelerate's launcher looks for the package deepspeed and reads one name of it; nothing else of it is used."""
    package = folder / "deepspeed"
    (package / "launcher").mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "launcher" / "__init__.py").write_text("", encoding="utf-8")
    (package / "launcher" / "runner.py").write_text("DEEPSPEED_ENVIRONMENT_NAME = '.none'\n", encoding="utf-8")
    facts = folder / "deepspeed-0.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0\n", encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
