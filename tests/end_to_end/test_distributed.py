"""Several processes: what two of them train is what one trains with twice the accumulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd3_train_network import main
from tests.end_to_end.conftest import Workshop, run_command
from tests.end_to_end.test_resume import same, weights

TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617")
MORE = ("--network_train_unet_only", "--network_dropout", "0.1", "--t5_dropout_rate", "0.2", "--flip_aug")


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_two_processes_equal_one_with_twice_the_accumulation(workshop: Workshop, tmp_path: Path):
    """Six images twice in batches of two: the last round of an epoch is uneven. Previews, validation and states are shared out."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n", encoding="utf-8")
    previews = (
        "--sample_prompts",
        str(prompts),
        "--sample_every_n_steps",
        "4",
        "--save_state",
        "--validation_split",
        "0.3",
    )
    two = run_command(workshop.arguments(tmp_path / "two", *MORE, *previews, max_train_steps=4), TWO)
    assert two.returncode == 0, two.stderr
    one = workshop.arguments(tmp_path / "one", *MORE, "--gradient_accumulation_steps", "2", max_train_steps=4)
    assert main([*one, "--validation_split", "0.3"]) == 0
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)  # Adam magnifies rounding of tiny gradients
    assert len(list((tmp_path / "two" / "sample").glob("*.png"))) == 2
    assert (tmp_path / "two" / "lora_contact_sheet.png").exists()
    assert len(list((tmp_path / "two" / "lora-state").glob("random_states_*.pt"))) == 2
    losses = [_validation(tmp_path / folder) for folder in ("one", "two")]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_resume_exactly(workshop: Workshop, tmp_path: Path):
    words = workshop.arguments(
        tmp_path / "whole", *MORE, "--save_every_n_steps", "3", "--save_state", max_train_steps=5
    )
    assert run_command(words, TWO).returncode == 0
    state = tmp_path / "whole" / "lora-step00000003-state"
    resumed = workshop.arguments(tmp_path / "resumed", *MORE, "--resume", str(state), max_train_steps=5)
    done = run_command(resumed, TWO)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def _validation(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss/validation/epoch_average"] for line in lines if "loss/validation/epoch_average" in line]
