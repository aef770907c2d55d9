"""show_metadata.py: what it prints, and that editing touches the metadata and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tools.loras import lora_tensors, run_script, write_lora
from tools.show_metadata import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tags = {"10_cat": {"a cat": 4, "outdoors": 1}, "5_dog": {"outdoors": 2}}
    facts = {"modelspec.title": "old", "modelspec.license": "MIT", "ss_training_comment": "None", "ss_steps": "120"}
    facts |= {"ss_network_dim": "4", "sshs_model_hash": "0x12", "ss_tag_frequency": json.dumps(tags)}
    facts |= {"ss_training_started_at": "1700000000.5", "ss_training_finished_at": "1700003600.5"}
    return write_lora(tmp_path / "lora.safetensors", lora_tensors(dtype=torch.bfloat16), **facts)


def body(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_the_real_command_shows_a_table_and_edits_in_place(file: Path):
    before, tensors = body(file), load_file(file)
    ran = run_script(
        "show_metadata", file, "--title", "Zorp 王", "--author", "me", "--trigger", "a zorp", "--license", ""
    )
    assert ran.returncode == 0, ran.stderr
    metadata = safe_open(file, "pt").metadata()
    assert metadata["modelspec.title"] == "Zorp 王" and metadata["modelspec.trigger_phrase"] == "a zorp"
    assert metadata["ss_steps"] == "120" and "modelspec.license" not in metadata
    assert body(file) == before and all(torch.equal(load_file(file)[key], tensors[key]) for key in tensors)
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]


def test_the_table_has_the_facts_and_leaves_out_what_is_none(file: Path, capsys: pytest.CaptureFixture[str]):
    before = file.read_bytes()
    assert main([str(file)]) == 0
    text = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.splitlines()}
    assert rows["Title"] == "old" and rows["Steps"] == "120" and rows["Rank"] == "4"
    assert rows["Captions"] == "a cat (4), outdoors (3)" and rows["Trained"].endswith("60 minutes")
    assert "Comment" not in rows and "BF16" in rows["File"]
    assert file.read_bytes() == before


def test_json_is_all_of_it(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == safe_open(file, "pt").metadata()
    assert main([str(file), "--all"]) == 0
    assert "ss_steps = 120" in capsys.readouterr().out.splitlines()


def test_any_key_can_be_set_and_removed_into_another_file(file: Path, tmp_path: Path):
    before, out = file.read_bytes(), tmp_path / "out.safetensors"
    assert main([str(file), "--set", "note=a=b", "--remove", "modelspec.license", "--save_to", str(out)]) == 0
    metadata = safe_open(out, "pt").metadata()
    assert metadata["note"] == "a=b" and "modelspec.license" not in metadata
    assert file.read_bytes() == before and body(out) == body(file)


def test_a_file_without_metadata_can_be_given_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_lora(tmp_path / "bare.safetensors", lora_tensors())
    assert main([str(file)]) == 0 and "Metadata  none" in capsys.readouterr().out
    assert main([str(file), "--title", "new"]) == 0
    assert safe_open(file, "pt").metadata() == {"modelspec.title": "new"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "ss_steps=1"], "tell how the file was made and stay as they are"),
        (["--remove", "sshs_model_hash"], "tell how the file was made"),
        (["--remove", "nothing"], "the file has no such key"),
        (["--set", "nonsense"], "write KEY=TEXT"),
        (["--save_to", "x.safetensors"], "nothing was edited"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]):
    before = file.read_bytes()
    assert main([str(file), *words]) == 2
    assert message in capsys.readouterr().err
    assert file.read_bytes() == before
    broken = file.with_name("broken.safetensors")
    broken.write_bytes(b"not one")
    assert main([str(broken)]) == 2
