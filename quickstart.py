#!/usr/bin/env python3
"""Two commands for a fresh machine: `train` shows what this program does, `test` proves that it works here.

    python3 quickstart.py train    # .venv, requirements, a demo model, a LoRA, pictures before and after
    python3 quickstart.py test     # .venv, requirements, lint, types, tests

Only the standard library is used here. A second run reuses what the first one made.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 10)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the demo LoRA and show pictures before and after")
    train.add_argument("--output_dir", default=str(ROOT / "output"), help="where the LoRA and the pictures go")
    test = commands.add_parser("test", help="run lint, type check and tests")
    test.add_argument("pytest_arguments", nargs="*", help="passed on to pytest; give them behind --")
    chosen = parser.parse_args(arguments)
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed; this is {sys.version.split()[0]}.",
            file=sys.stderr,
        )
        return 2
    try:
        if chosen.command == "train":
            return run_train(Path(chosen.output_dir))
        return run_tests(chosen.pytest_arguments)
    except subprocess.CalledProcessError as error:
        print(f"\nThis step failed with code {error.returncode}: {shown(error.cmd)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on with what is there.", file=sys.stderr)
        return 130


def run_train(output_dir: Path) -> int:
    started = time.monotonic()
    python = environment("requirements.txt")
    demo = ROOT / "demo"
    step("Making the demo model and its pictures")
    call([python, ROOT / "tools" / "make_demo.py", "--output", demo])
    command = subprocess.run(
        [str(python), "-m", "tools.demo.recipe", "--demo", str(demo), "--output_dir", str(output_dir)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()
    step("Training a LoRA. The command, to be copied:")
    print(shown(command), flush=True)
    # accelerate's launcher would end at Ctrl-C, with a traceback, before the trainer has saved: the script is started without it
    script = command.index("sd3_train_network.py")
    threads = command[command.index("--num_cpu_threads_per_process") + 1]
    call([python, *command[script:]], env={**os.environ, "OMP_NUM_THREADS": threads})
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    step(f"Done in {minutes} min {seconds} s")
    print(f"LoRA:     {output_dir / 'zorp.safetensors'}")
    print(f"Previews: {output_dir / 'sample'}")
    print(f"Look at:  {output_dir / 'zorp_contact_sheet.png'}  (prompts down, training steps across)")
    return 0


def run_tests(pytest_arguments: list[str]) -> int:
    python = environment("requirements-dev.txt")
    scripts = python.parent
    cores = os.cpu_count() or 1
    print(f"\nThis takes about {minutes_of_tests(cores)} minutes on {cores} cores, installing not counted.", flush=True)
    step("Lint and format")
    call([scripts / "ruff", "check", "."])
    call([scripts / "ruff", "format", "--check", "."])
    step("Types")
    call([scripts / "mypy"])
    step("Tests")
    command = [str(python), "-m", "pytest", "-n", str(min(cores, 8)), "--dist", "worksteal", *pytest_arguments]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # a core for each of the processes
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}).returncode


def minutes_of_tests(cores: int) -> int:
    """Measured on two cores: a minute for lint and types, and not quite six minutes for the tests."""
    return 1 + round(12 / min(cores, 8))


def environment(requirements: str) -> Path:
    """Make .venv, install the requirements if they changed since the last time, and return its python."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        step("Making .venv")
        venv.create(VENV, with_pip=True)
    stamp = VENV / f".installed-{requirements}"
    wanted = fingerprint(requirements)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        step(f"Installing {requirements}")
        call([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", ROOT / requirements])
        stamp.write_text(wanted, encoding="utf-8")
    return python


def fingerprint(requirements: str) -> str:
    """A hash of everything that decides what gets installed."""
    files = sorted(ROOT.glob("requirements*.txt"))
    content = b"".join(file.read_bytes() for file in files) + requirements.encode() + sys.version.encode()
    return hashlib.sha256(content).hexdigest()


def call(command: list, env: dict[str, str] | None = None) -> None:
    """Run a command. At Ctrl-C it gets SIGTERM, which ends it without a traceback, and the trainer after it has saved."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=os.name != "nt")
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, words)


def shown(command: list) -> str:
    words = [str(word) for word in command]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
