"""A resumed run ends with the very weights of the unbroken one, however it was ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.common.safetensors_header import read_header
from library.monitoring.metrics import RunMetrics
from library.monitoring.previews import Previewer
from library.monitoring.validation import Validation
from library.saving.state import newest_state
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop
from tests.warm_processes import Process, start_python

UNET = "--network_train_unet_only"
# Everything that draws random numbers, and a last batch and a last group that are short.
EVERYTHING = (
    *("--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1"),
    *("--t5_dropout_rate", "0.2", "--clip_l_dropout_rate", "0.2", "--shuffle_caption", "--caption_dropout_rate", "0.2"),
    *(
        "--flip_aug",
        "--color_aug",
        "--gradient_accumulation_steps",
        "2",
        "--ema_decay",
        "0.9",
        "--lr_scheduler",
        "cosine",
    ),
    *("--weighting_scheme", "logit_normal", "--network_train_unet_only"),
)


def weights(folder: Path, name: str = "lora.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("step", [3, 4, 9])
def test_resuming_at_any_step_gives_the_unbroken_runs_weights(workshop: Workshop, tmp_path: Path, step: int):
    """Step 3 ends an epoch, 4 and 9 lie within one."""
    words = lambda folder: workshop.arguments(tmp_path / folder, *EVERYTHING, max_train_steps=11)  # noqa: E731
    assert main(words("whole")) == 0
    assert main([*words("broken"), "--save_every_n_steps", str(step), "--save_state"]) == 0
    state = tmp_path / "broken" / f"lora-step{step:08d}-state"
    assert main([*words("resumed"), "--resume", str(state), "--max_data_loader_n_workers", "2"]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    assert same(
        weights(tmp_path / "whole", "lora-ema.safetensors"), weights(tmp_path / "resumed", "lora-ema.safetensors")
    )
    lines = {name: _losses(tmp_path / name) for name in ("whole", "resumed")}
    assert lines["resumed"] == {s: v for s, v in lines["whole"].items() if s > step}  # loss, average and rate


def _losses(folder: Path) -> dict[int, tuple[float, ...]]:
    found = {}
    for line in (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "loss/current" in values:
            found[values["step"]] = (values["loss/current"], values["loss/average"], values["lr/unet"])
    return found


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Lion", "Prodigy", "AdamWScheduleFree", "Adafactor", "DAdaptAdam"])
def test_every_family_of_optimizers_resumes_exactly(workshop: Workshop, tmp_path: Path, optimizer: str):
    rate = "1.0" if optimizer in ("Prodigy", "DAdaptAdam") else "1e-3"
    more = ["--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs"]
    words = lambda folder: workshop.arguments(  # noqa: E731
        tmp_path / folder, *more, max_train_steps=5, optimizer_type=optimizer, learning_rate=rate
    )
    assert main([*words("whole"), "--save_every_n_steps", "2", "--save_state"]) == 0
    state = tmp_path / "whole" / "lora-step00000002-state"
    assert main([*words("resumed"), "--resume", str(state)]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def start(words: list[str]) -> Process:
    return start_python([str(ROOT / "sd3_train_network.py"), *words])


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_run_killed_at_a_random_moment_goes_on_with_resume_auto(workshop: Workshop, tmp_path: Path):
    """SIGKILL while states are written after every step: the newest whole one is found, and the end is the same."""
    more = ["--network_train_unet_only", "--save_every_n_steps", "1", "--save_state", "--resume", "auto"]
    words = workshop.arguments(tmp_path / "killed", *more, max_train_steps=40)
    process = start(words)
    wait_for(lambda: len(list((tmp_path / "killed").glob("*-state"))) >= 2 or process.poll() is not None)
    time.sleep(random.random() * 0.5)
    process.kill()
    process.wait()
    state = newest_state(tmp_path / "killed", "lora")
    assert state is not None and state.position.step >= 2
    for path in (tmp_path / "killed").glob("lora*.safetensors"):
        load_file(path)  # every file is whole
    assert main([*words]) == 0
    whole = workshop.arguments(tmp_path / "whole", "--network_train_unet_only", max_train_steps=40)
    assert main(whole) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR2"])
def test_a_signal_saves_lora_and_state_and_says_how_to_go_on(workshop: Workshop, tmp_path: Path, name: str):
    number = getattr(signal, name)
    words = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=5000)
    process = start(words)
    wait_for(
        lambda: (tmp_path / "lora.metrics.jsonl").exists() and (tmp_path / "lora.metrics.jsonl").stat().st_size > 0
    )
    process.send_signal(number)
    told = "".join(process.communicate(timeout=60))
    assert process.returncode == 128 + number, told
    assert "--resume auto" in told and "Traceback" not in told
    state = newest_state(tmp_path, "lora")
    assert state is not None and state.position.step > 0
    assert (tmp_path / f"lora-step{state.position.step:08d}.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_sigusr1_saves_lora_and_state_and_the_run_goes_on(workshop: Workshop, tmp_path: Path, monkeypatch):
    plain = RunMetrics.on_step_end

    def step(self, report):
        plain(self, report)
        if report.progress.step == 3:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(RunMetrics, "on_step_end", step)
    assert main(workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=6)) == 0
    assert {path.name for path in tmp_path.glob("lora*") if "metrics" not in path.name} == {
        "lora-step00000003.safetensors",
        "lora-step00000003-state",
        "lora.safetensors",
    }


def test_resuming_with_options_that_change_the_run_names_them(workshop: Workshop, tmp_path: Path, capsys):
    words = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=2)
    assert main([*words, "--save_state"]) == 0
    more = ["--resume", str(tmp_path / "lora-state"), "--max_train_steps", "4", "--learning_rate", "5e-4"]
    assert main([*words, *more]) == 2
    told = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.0005" in told


def test_resume_auto_without_a_state_starts_anew(workshop: Workshop, tmp_path: Path):
    assert main(workshop.arguments(tmp_path, "--resume", "auto", "--network_train_unet_only", max_train_steps=1)) == 0
    assert (tmp_path / "lora.safetensors").exists()


def run_to_the_end(workshop: Workshop, folder: Path, *more: str) -> list[str]:
    """The options of a run that was killed, or had finished, with --resume auto at their end."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    drawing = (
        "--sample_prompts",
        str(prompts),
        "--sample_every_n_epochs",
        "1",
        "--ema_decay",
        "0.9",
        "--cache_latents",
    )
    words = workshop.arguments(folder, UNET, *drawing, *more, max_train_steps=6, save_every_n_steps=3)
    assert main([*words, "--save_state"]) == 0
    return [*words, "--save_state", "--resume", "auto"]


def no_model(*args: object, **kwargs: object) -> None:
    raise AssertionError("a model is loaded")


def test_resume_of_a_finished_run_says_so_and_loads_no_model(workshop: Workshop, tmp_path: Path, monkeypatch, capfd):
    words = run_to_the_end(workshop, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr("sd3_train_network.load_mmdit", no_model)
    for resume in ("auto", tmp_path / "out" / "lora-state", tmp_path / "out" / "lora-step00000006-state"):
        assert main([*words, "--resume", str(resume)]) == 0
        assert "Already finished at step 6" in "".join(capfd.readouterr())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main([*words, "--learning_rate", "5e-4"]) == 2  # not the run that had finished
    assert main([*words, "--max_train_steps", "5"]) == 2
    assert "the state is at step 6, and the run is to end at 5" in capfd.readouterr().err


@pytest.mark.parametrize("lost", [("lora*.safetensors", "lora-state", "sample/*"), ("lora-state",), ("sample/*",)])
def test_a_run_killed_after_its_last_step_is_finished_by_resume_auto(workshop: Workshop, tmp_path: Path, lost):
    folder = tmp_path / "out"
    words = run_to_the_end(workshop, folder)
    names = ("lora.safetensors", "lora-ema.safetensors")
    whole, metadata = [weights(folder, name) for name in names], facts(folder / names[0])
    count = len(list(folder.glob("sample/*")))
    lines = (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if lost[-1] == "sample/*":  # the record comes after the pictures
        lines = [line for line in lines if '"path"' not in line]
        (folder / "lora.metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for pattern in lost:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(words) == 0
    assert all(same(before, weights(folder, name)) for before, name in zip(whole, names))
    assert facts(folder / names[0]) == metadata
    state = newest_state(folder, "lora")
    assert state is not None and state.folder.name == "lora-state" and state.position.step == 6
    assert len(list(folder.glob("sample/*"))) == count == 1


def facts(path: Path) -> dict[str, str]:
    metadata = read_header(path).metadata
    return {key: metadata[key] for key in ("ss_steps", "ss_epoch", "ss_num_epochs", "sshs_model_hash")}


def test_a_final_file_of_an_earlier_run_does_not_pass_for_the_end_of_this_one(workshop: Workshop, tmp_path: Path):
    """Extended, and killed between its last state and the final LoRA: the file of the shorter run is still there."""
    words = workshop.arguments(tmp_path / "out", UNET, "--save_state", "--resume", "auto", save_every_n_steps=2)
    assert main([*words, "--max_train_steps", "2"]) == 0
    shorter = tmp_path / "shorter.safetensors"
    shutil.copy2(tmp_path / "out" / "lora.safetensors", shorter)
    assert main([*words, "--max_train_steps", "4"]) == 0
    longer = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "lora-state")
    os.replace(shorter, tmp_path / "out" / "lora.safetensors")
    assert main([*words, "--max_train_steps", "4"]) == 0
    assert same(weights(tmp_path / "out"), longer)


def test_the_final_lora_is_there_before_the_last_previews_and_validation(
    workshop: Workshop, tmp_path: Path, monkeypatch
):
    """Who kills a run that has trained all of its steps loses nothing of it."""
    dataset = workshop.dataset.read_text(encoding="utf-8").replace(
        "resolution = 64", "resolution = 64\nvalidation_split = 0.2", 1
    )
    (tmp_path / "d.toml").write_text(dataset, encoding="utf-8")
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    seen = []

    def note(what: str, plain):
        def wrapped(*args, **kwargs):
            final, state = (tmp_path / "out" / name for name in ("lora.safetensors", "lora-state"))
            seen.append((what, final.exists(), state.exists()))
            return plain(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Previewer, "make", note("previews", Previewer.make))
    monkeypatch.setattr(Validation, "run", note("validation", Validation.run))
    more = ("--sample_prompts", str(tmp_path / "p.txt"), "--sample_every_n_steps", "2", "--validate_every_n_steps", "2")
    words = workshop.arguments(tmp_path / "out", UNET, "--save_state", *more, dataset_config=tmp_path / "d.toml")
    assert main([*words, "--max_train_steps", "4"]) == 0
    assert seen == [
        ("validation", False, False),
        ("previews", False, False),
        ("validation", True, False),
        ("previews", True, True),
    ]
