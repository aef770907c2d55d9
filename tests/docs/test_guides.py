"""The guides' commands run as they stand, with the paths of a small workshop; their dataset files are in order; languages agree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.options.resolve import resolve_options
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop, workshop  # noqa: F401 (a fixture)
from tools.make_option_docs import GUIDES, MARKED

PAGES = (*GUIDES, "getting_started.md", "reliability.md")
NAMES = (r"--([a-z]\w+)", r"(?m)^\| `([a-z]\w+)")  # options in the text, and what the guides' own tables explain


def blocks(guide: str, language: str, folder: str = "docs") -> list[str]:
    """The guide's blocks of code in one language."""
    text = (ROOT / folder / guide).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(guide: str, folder: str = "docs") -> list[str]:
    return [block for block in blocks(guide, "bash", folder) if "sd3_train_network.py" in block]


COMMANDS = [(guide, number) for guide in PAGES for number in range(len(commands(guide)))]


def test_the_launcher_adds_no_traceback_of_its_own():
    """`--quiet` is what keeps accelerate from printing one below the message of a program that ends with a code."""
    pages = [ROOT / folder / page for folder in ("docs", "docs/ja") for page in PAGES]
    for page in (ROOT / "README.md", ROOT / "docs" / "ja" / "README.md", *pages):
        text = page.read_text(encoding="utf-8")
        launches = re.findall(r"^accelerate launch (.*)$", text, re.MULTILINE)
        assert [words for words in launches if not words.startswith("--quiet ")] == [], page


def words_of(command: str) -> list[str]:
    """What stands behind the script's name, with values as words of their own."""
    words = shlex.split(command.replace("\\\n", " "))
    words = words[words.index("sd3_train_network.py") + 1 :]
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def with_paths(words: list[str], paths: dict[str, str]) -> list[str]:
    return [paths.get(words[place - 1], word) if place else word for place, word in enumerate(words)]


@pytest.mark.parametrize(("guide", "number"), COMMANDS)
def test_a_command_of_the_guides_runs(workshop: Workshop, tmp_path: Path, guide: str, number: int):  # noqa: F811
    words = words_of(commands(guide)[number])
    assert resolve_options(words).problems == []
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32 --s 1\n", encoding="utf-8")
    paths = {
        "--pretrained_model_name_or_path": str(workshop.model),
        "--dataset_config": str(workshop.dataset),
        "--output_dir": str(tmp_path / "output"),
        "--sample_prompts": str(tmp_path / "prompts.txt"),
        "--logging_dir": str(tmp_path / "logs"),
        **dict.fromkeys(("--clip_l", "--clip_g", "--t5xxl"), ""),  # the workshop's model holds them
        "--max_train_epochs": "",
    }
    words = with_paths(words, paths)
    while "" in words:
        place = words.index("")
        del words[place - 1 : place + 1]
    more = ["--max_train_steps", "1", "--max_data_loader_n_workers", "0", "--cache_dir", str(tmp_path / "cache")]
    assert main([*words, *more]) == 0
    if "--dry_run" in words:
        assert not list((tmp_path / "output").glob("*.safetensors"))
        return
    name = words[words.index("--output_name") + 1]
    assert (tmp_path / "output" / f"{name}.safetensors").exists()


@pytest.mark.parametrize("guide", PAGES)
def test_dataset_files_of_the_guides_are_in_order(tmp_path: Path, guide: str):
    for block in blocks(guide, "toml"):
        path = tmp_path / "dataset.toml"
        path.write_text(block, encoding="utf-8")
        assert read_datasets(str(path), CommandLineData())


@pytest.mark.parametrize("guide", PAGES)
def test_both_languages_have_the_same_commands_files_sections_and_options(guide: str):
    for language in ("bash", "toml"):
        assert blocks(guide, language) == blocks(guide, language, "docs/ja")
    english, japanese = ((ROOT / folder / guide).read_text(encoding="utf-8") for folder in ("docs", "docs/ja"))
    assert re.findall(r"^#+", english, re.MULTILINE) == re.findall(r"^#+", japanese, re.MULTILINE)
    options, cells = (
        [set(re.findall(pattern, MARKED.sub("", text))) for text in (english, japanese)] for pattern in NAMES
    )
    assert options[0] == options[1] and cells[0] == cells[1]


@pytest.mark.parametrize("path", [f"{folder}/{guide}" for folder in ("docs", "docs/ja") for guide in PAGES])
def test_links_of_the_guides_lead_somewhere(path: str):
    text = (ROOT / path).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        page = (ROOT / path).parent / target if target else ROOT / path
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
