"""Two processes that share the model or the optimizer train the weights that two whole ones train, previews and all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd3_train_network import main
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.launching import CONFIGS, finished, free_port, launch, stand_in_for_deepspeed
from tests.end_to_end.test_resume import same, weights

EVERYTHING = (
    *("--network_train_unet_only", "--gradient_checkpointing", "--validation_split", "0.3", "--flip_aug"),
    *("--sample_every_n_steps", "2", "--save_every_n_steps", "2", "--save_state", "--gradient_accumulation_steps", "2"),
    *("--network_args", "module_dropout=0.3"),
)
# three previews for two processes, of different lengths
PROMPTS = """a cat --w 64 --h 64 --s 2 --d 1
a dog --w 64 --h 64 --s 3 --d 2 --l 1.0
a hill --w 64 --h 64 --s 2 --d 3 --ss heun
"""


# beside the workshop's: processes meet batches that ask the base model too, and batches that don't, at the same time
PRESERVED = """
[[datasets]]
batch_size = 1
  [[datasets.subsets]]
  image_dir = {images!r}
  custom_attributes = {{ diff_output_preservation = true }}
"""


class Runs:
    """Runs of one and the same training."""

    def __init__(self, workshop: Workshop, folder: Path):
        self.workshop, self.folder = workshop, folder
        self.told: dict[str, str] = {}
        (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
        self.dataset = folder / "dataset.toml"
        preserved = PRESERVED.format(images=str(workshop.folder / "images"))
        self.dataset.write_text(workshop.dataset.read_text(encoding="utf-8") + preserved, encoding="utf-8")
        self.environment = stand_in_for_deepspeed(folder / "packages")

    def run(self, name: str, config: Path, *more: str) -> str:
        """Train; returns what the processes told."""
        words = ("--sample_prompts", str(self.folder / "prompts.txt"), *EVERYTHING, *more)
        arguments = self.workshop.arguments(self.folder / name, *words, dataset_config=self.dataset, max_train_steps=4)
        launcher = ["--config_file", str(config), "--main_process_port", str(free_port())]
        self.told[name] = finished(launch(launcher, arguments, self.environment))
        return self.told[name]

    def weights(self, name: str) -> dict[str, Tensor]:
        return weights(self.folder / name)

    def validation(self, name: str) -> list[float]:
        lines = (self.folder / name / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = (json.loads(line).get("loss/validation/epoch_average") for line in lines)
        return [loss for loss in found if loss is not None]

    def previews(self, name: str) -> dict[tuple[str, str], Any]:
        """(step, number) -> pixels"""
        found = {}
        for path in (self.folder / name / "sample").glob("*.png"):
            _, step, number, *_ = path.name.split("_")
            found[step, number] = np.asarray(Image.open(path))
        return found

    def optimizer(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name / "lora-state" / "optimizer.pt")


@pytest.fixture(scope="module")
def runs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of two processes that share nothing, and one with FSDP2."""
    made = Runs(workshop, tmp_path_factory.mktemp("sharing"))
    made.run("whole", CONFIGS / "ddp.yaml")
    made.run("fsdp2", CONFIGS / "fsdp2.yaml")
    return made


def test_fsdp2_trains_the_same_weights_with_the_same_previews_and_validation(runs: Runs):
    assert same(runs.weights("whole"), runs.weights("fsdp2"))
    assert runs.validation("whole") and runs.validation("whole") == runs.validation("fsdp2")
    whole, shared = runs.previews("whole"), runs.previews("fsdp2")
    assert len(whole) == 6 and whole.keys() == shared.keys()
    assert all(np.array_equal(whole[each], shared[each]) for each in whole)


def test_fsdp2_leaves_half_of_the_model_on_each_process(runs: Runs):
    shares = re.findall(r"over 2 processes: ([\d.]+) MiB of ([\d.]+) MiB on each", runs.told["fsdp2"])
    ((part, whole),) = shares  # the first process alone tells it
    assert float(whole) > 3 and float(part) <= 0.51 * float(whole)


def test_zero_3_trains_the_same_weights_and_saves_a_whole_state(runs: Runs):
    assert "shared out over 2 processes" in runs.run("zero3", CONFIGS / "zero3.yaml")
    assert same(runs.weights("whole"), runs.weights("zero3"))
    saved, plain = runs.optimizer("zero3"), runs.optimizer("whole")
    assert saved["state"].keys() == plain["state"].keys() and saved["param_groups"] == plain["param_groups"]
    for number, state in plain["state"].items():
        assert all(torch.equal(state[key], saved["state"][number][key]) for key in state)


def test_zero_2_goes_on_from_a_state_of_fsdp2_to_the_same_weights(runs: Runs):
    state = runs.folder / "fsdp2" / "lora-step00000002-state"
    told = runs.run("zero2", CONFIGS / "zero2.yaml", "--resume", str(state))
    assert "Resumed at step 2" in told and "shared out" not in told
    assert same(runs.weights("whole"), runs.weights("zero2"))


def test_deepspeed_options_do_the_same_in_host_memory_without_the_package(runs: Runs):
    state = runs.folder / "whole" / "lora-step00000002-state"
    words = ("--deepspeed", "--zero_stage", "3", "--offload_param_device", "cpu")
    told = runs.run("options", CONFIGS / "ddp.yaml", *words, "--resume", str(state))
    assert "shared out over 2 processes" in told
    assert same(runs.weights("whole"), runs.weights("options"))


def test_what_cannot_be_combined_is_told_before_anything_is_read(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    words = ("--blocks_to_swap", "1", "--torch_compile", "--optimizer_type", "none_such")
    assert main(workshop.arguments(tmp_path, *words)) == 2
    told = capsys.readouterr().err
    for option in ("--blocks_to_swap", "--torch_compile"):
        assert f"{option} can't be combined with accelerate's FSDP configuration" in told
    assert "none_such" in told  # with all other mistakes
