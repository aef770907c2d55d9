"""The guide to several devices: its commands run, on two processes of this machine, as they stand; both languages agree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.options.resolve import resolve_options
from sd3_train_network import main
from tests.docs.test_guides import blocks, with_paths, words_of
from tests.end_to_end.conftest import ROOT, Workshop, workshop  # noqa: F401 (a fixture)
from tests.end_to_end.launching import finished, free_port, launch
from tests.end_to_end.test_resume import weights
from tests.warm_processes import Process

GUIDE = "distributed.md"
COMMANDS = blocks(GUIDE, "bash")
FSDP2, MACHINES = (next(c for c in COMMANDS if mark in c) for mark in ("fsdp2.yaml", "--machine_rank"))


def launcher_of(command: str) -> list[str]:
    """What stands between `accelerate launch` and the script."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["accelerate", "launch"]
    return words[2 : words.index("sd3_train_network.py")]


def script_words(command: str, model: Workshop, output: Path, *more: str) -> list[str]:
    """The command's own words for the script, on a small model and two steps."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 32 --s 1\na dog --w 32 --h 32 --s 1\n", encoding="utf-8")
    paths = {
        "--pretrained_model_name_or_path": str(model.model),
        "--dataset_config": str(model.dataset),
        "--output_dir": str(output),
        "--sample_prompts": str(prompts),
        "--cache_dir": str(output / "cache"),
        "--max_train_steps": "2",
        "--sample_every_n_steps": "2",
        "--save_every_n_steps": "1",
    }
    words = with_paths(words_of(command), paths)
    for encoder in ("--clip_l", "--clip_g", "--t5xxl"):  # the small model holds them
        if encoder in words:
            place = words.index(encoder)
            del words[place : place + 2]
    return [*words, "--cache_dir", paths["--cache_dir"], "--max_data_loader_n_workers", "0", *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_in_order(command: str):
    assert resolve_options(words_of(command)).problems == []
    config = launcher_of(command)[1]
    assert (ROOT / config).exists()


def test_the_command_for_large_models_shares_the_model(workshop: Workshop, tmp_path: Path):  # noqa: F811
    launcher = [*launcher_of(FSDP2), "--main_process_port", str(free_port())]
    told = finished(launch(launcher, script_words(FSDP2, workshop, tmp_path / "output")))
    assert "shared out over 2 processes" in told
    assert (tmp_path / "output" / "my_lora.safetensors").exists()


class Machines:
    """Two machines without a common disk, played by two launchers on this one."""

    def __init__(self, model: Workshop, folder: Path):
        self.model, self.folder = model, folder

    def start(self, *more: str) -> list[Process]:
        port, started = str(free_port()), []
        for rank in ("0", "1"):
            given = {"--machine_rank": rank, "--main_process_ip": "127.0.0.1", "--main_process_port": port}
            launcher = with_paths(launcher_of(MACHINES), given)
            started.append(launch(launcher, script_words(MACHINES, self.model, self.folder / rank / "output", *more)))
        return started


@pytest.fixture(scope="module")
def machines(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Machines:  # noqa: F811
    made = Machines(workshop, tmp_path_factory.mktemp("machines"))
    for rank in ("0", "1"):
        (made.folder / rank).mkdir()
    for process in made.start():
        finished(process)
    return made


def test_two_machines_train_what_one_process_does_with_twice_the_accumulation(machines: Machines, tmp_path: Path):
    """The command gives no seed: both processes must have drawn the same one."""
    first = machines.folder / "0" / "output"
    with safe_open(first / "my_lora.safetensors", framework="pt") as file:
        seed = file.metadata()["ss_seed"]
    alone = script_words(MACHINES, machines.model, tmp_path / "output")
    assert main([*alone, "--gradient_accumulation_steps", "2", "--seed", seed]) == 0
    a, b = weights(first, "my_lora.safetensors"), weights(tmp_path / "output", "my_lora.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_each_machine_has_its_previews_and_caches_and_the_first_all_else(machines: Machines):
    first, second = (machines.folder / rank / "output" for rank in ("0", "1"))
    assert [len(list((folder / "sample").glob("*.png"))) for folder in (first, second)] == [1, 1]
    caches = [{path.name for path in (folder / "cache").rglob("*.safetensors")} for folder in (first, second)]
    assert caches[0] == caches[1] and len(caches[0]) >= 6
    assert {"my_lora.safetensors", "my_lora-state", "report.html"} <= {path.name for path in first.iterdir()}
    assert {path.name for path in second.iterdir()} == {"sample", "cache"}


def test_a_machine_without_the_state_is_told_before_training(machines: Machines):
    told = [(process.communicate(timeout=120)[1], process.returncode) for process in machines.start("--resume", "auto")]
    assert all(code != 0 for _, code in told)
    assert any("no state, one at step" in text and "Copy the first machine's state" in text for text, _ in told)


def test_both_languages_have_the_same_commands_sections_options_and_links():
    english, japanese = ((ROOT / folder / GUIDE).read_text(encoding="utf-8") for folder in ("docs", "docs/ja"))
    assert blocks(GUIDE, "bash", "docs/ja") == COMMANDS
    for pattern in (r"(?m)^#+", r"--[a-z]\w+", r"[\w.]+\.yaml", r"(?m)^\|.*\|$"):
        found = [re.findall(pattern, text) for text in (english, japanese)]
        assert len(found[0]) == len(found[1]) if "|" in pattern else set(found[0]) == set(found[1])
    for folder, text in (("docs", english), ("docs/ja", japanese)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / folder / target).exists(), target
