"""The page about performance names programs and options that there are, and says the same in both languages."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.job import training_options

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "ja" / "performance.md")
TAKE_TRAINING_OPTIONS = ("step", "swap")


def commands(page: Path) -> list[str]:
    """What stands in blocks of code, a command each."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def check(words: list[str]) -> None:
    assert words[:2] == ["python", "-m"]
    package, name = words[2].split(".")
    assert package == "benchmarks"
    module = importlib.import_module(words[2])
    made = module.step.parser() if name == "swap" else module.parser()
    chosen, rest = made.parse_known_args(words[3:])
    if name in TAKE_TRAINING_OPTIONS:
        training_options(rest)
    else:
        assert rest == []
    against = getattr(chosen, "against", None)
    if against and "benchmarks." in against:
        check(shlex.split(against))


@pytest.mark.parametrize("command", [line for line in commands(PAGES[0]) if line.startswith("python -m")])
def test_a_command_of_the_page_is_understood(command: str):
    check(shlex.split(command))


def test_every_benchmark_is_on_the_page():
    shared = {"__init__", "measuring", "process_monitor", "devices", "job"}
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared
    text = PAGES[0].read_text(encoding="utf-8")
    assert all(f"benchmarks.{name}" in text for name in programs)


def test_both_languages_have_the_same_commands_sections_and_numbers():
    english, japanese = (page.read_text(encoding="utf-8") for page in PAGES)
    assert commands(PAGES[0]) == commands(PAGES[1])
    assert re.findall(r"^#+", english, re.MULTILINE) == re.findall(r"^#+", japanese, re.MULTILINE)
    cells = [re.findall(r"\|\s*(\d+(?:\.\d+)?)(?: %| MB)?\s*(?=\|)", text) for text in (english, japanese)]
    assert cells[0] == cells[1] and len(cells[0]) > 50
