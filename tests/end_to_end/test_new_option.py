"""A new option is one row and the code that uses it: all else follows from the row, as a changed copy of the program shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.end_to_end.conftest import ROOT, Workshop

ROWS = """
        Option(
            "--shift_factor",
            "A factor on --training_shift.",
            "`--training_shift`に掛ける係数です。",
            finite,
            1.0,
            above=0,
            in_metadata=True,
        ),
        Option("--shift_note", "A note on it.", "そのメモです。", resume_safe=True, useless_without=("shift_factor",)),
"""
BEFORE = '        Option(\n            "--resolution_shift"'
USE = ("training_shift=args.training_shift,", "training_shift=args.training_shift * args.shift_factor,")
# Run in the copy: train a step with the option in a config file, then look whether a resume takes another value.
SCRIPT = """
import json, sys
from sd3_train_network import main
arguments = sys.argv[1:]
trained = main([*arguments, "--config_file", "run.toml", "--save_state_on_train_end"])
resumed = main([*arguments, "--shift_factor", "3", "--shift_note", "two", "--resume", "auto", "--max_train_steps", "2", "--dry_run"])
print(json.dumps([trained, resumed]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with two more options, of which a resumed run may change the second."""
    folder = tmp_path_factory.mktemp("program")
    for name in ("library", "networks", "tools", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    shutil.copy(ROOT / "sd3_train_network.py", folder)
    for path, old, new in (
        ("library/options/groups/loss.py", BEFORE, ROWS.lstrip("\n") + BEFORE),
        ("library/preflight/settings/training.py", *USE),
    ):
        text = (folder / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, path
        (folder / path).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8", cwd=folder)


def test_it_is_in_the_help_and_the_checks(program: Path) -> None:
    text = re.sub(r"\s+", " ", run(program, "sd3_train_network.py", "--help").stdout)
    assert "--shift_factor X A factor on --training_shift. Default: 1.0." in text
    assert "Did you mean --shift_factor" in run(program, "sd3_train_network.py", "--shift_facto", "2").stderr


def test_it_is_in_the_documentation(program: Path) -> None:
    assert run(program, "tools/make_option_docs.py").returncode == 0
    for page in ("options.md", "ja/options.md", "sd3_train_network.md", "ja/sd3_train_network.md"):
        lines = (program / "docs" / page).read_text(encoding="utf-8").splitlines()
        assert sum(line.startswith("| `--shift_factor` | X | `1.0` |") for line in lines) == 1, page


def test_it_is_in_the_config_file_the_metadata_and_the_resume_check(
    program: Path, workshop: Workshop, tmp_path: Path
) -> None:
    (program / "run.toml").write_text('[new]\nshift_factor = 2\nshift_note = "one"\n', encoding="utf-8")
    arguments = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=1)
    done = run(program, "-c", SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2]
    with safe_open(str(tmp_path / "lora.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_shift_factor"] == "2.0" and "ss_shift_note" not in metadata
    assert "options that shape the run have changed: shift_factor: 2.0 -> 3.0. " in done.stderr
