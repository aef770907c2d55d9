"""Every command on the pages about the tools runs, in the order in which it stands there."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from tests.end_to_end.runs import dataset_file, image_folder
from tests.sd3.tiny import save_tokenizers, tiny_checkpoint
from tests.tools.loras import lora_for_checkpoint, write_lora

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"generate": ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]}


def commands(page: Path) -> list[list[str]]:
    lines = page.read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def test_every_command_of_the_tools_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_checkpoint(tmp_path / "sd3.5_medium.safetensors", "5-medium")
    save_tokenizers(tmp_path / "tokenizers")
    write_lora(tmp_path / "my_lora.safetensors", lora_for_checkpoint())
    write_lora(tmp_path / "style.safetensors", lora_for_checkpoint(seed=7))
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    image_folder(tmp_path / "images_of_a_cat")
    dataset_file(tmp_path / "my_cat.toml", ['image_dir = "images_of_a_cat"'])
    monkeypatch.chdir(tmp_path)
    used = set()
    for python, script, *words in commands(ROOT / "docs" / "tools.md"):
        name = Path(script).stem
        assert python == "python" and script == f"tools/{name}.py" and (ROOT / script).is_file()
        tool = importlib.import_module(f"tools.{name}")
        assert tool.main([*words, *QUICK.get(name, [])]) == 0, (name, words)
        used.add(name)
    assert used == {
        "generate", "check_lora", "show_metadata", "convert_lora", "merge_lora", "resize_lora", "extract_lora",
        "cache_latents", "cache_text_encoder_outputs",
    }  # fmt: skip
    made = {path.name for path in tmp_path.iterdir()}
    assert {"images", "both", "norms.png", "merged.safetensors", "both_16.safetensors", "extracted.safetensors"} <= made
    assert len(list((tmp_path / "images_of_a_cat").glob("0.png.*.safetensors"))) == 2  # latents, text


def test_both_pages_have_the_same_commands():
    assert commands(ROOT / "docs" / "tools.md") == commands(ROOT / "docs" / "ja" / "tools.md")
