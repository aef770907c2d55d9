"""tools/demo/recipe.py: the command that quickstart.py prints and runs is one that the trainer accepts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.options.resolve import resolve_options
from tests.warm_processes import run_python
from tools.demo.recipe import NAME, command
from tools.make_demo import make_demo

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe") / "demo"
    make_demo(folder)
    return folder


def test_the_trainer_accepts_the_command_without_a_word(demo: Path, tmp_path: Path) -> None:
    words = command(tmp_path, demo)
    script = words.index("sd3_train_network.py")
    assert words[:2] == ["accelerate", "launch"]
    options = resolve_options(words[script + 1 :])
    assert options.problems == []
    assert options.warnings == []
    assert Path(options.args.pretrained_model_name_or_path).is_file()
    assert Path(options.args.dataset_config).is_file()
    assert Path(options.args.sample_prompts).is_file()
    assert options.args.output_name == NAME


def test_its_plan_has_no_problems_either(demo: Path, tmp_path: Path) -> None:
    """A dry run reads every header of model and dataset: 36 pictures shown twice, as many to regularise."""
    words = command(tmp_path, demo)
    words = words[words.index("sd3_train_network.py") :]
    done = run_python([*words, "--dry_run"])
    assert done.returncode == 0, done.stderr
    assert "64x64" in done.stdout
    assert "144" in done.stdout  # images of an epoch


def test_it_prints_one_word_a_line(demo: Path, tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "tools.demo.recipe", "--demo", str(demo), "--output_dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.splitlines() == command(tmp_path, demo)
