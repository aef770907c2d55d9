"""Nothing is lost: bad steps, a full memory, a full disk and broken files end in a clear message, and what was saved is whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from library.common.errors import UserError
from library.common.files import temporary_name
from library.common.processes import this_process
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.monitoring.metrics import RunMetrics
from library.saving.state import newest_state
from library.training.step import TrainingStep
from sd3_train_network import main
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.test_resume import same, start, wait_for, weights

UNET = "--network_train_unet_only"


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch):
    """Let chosen calls of the training step give losses that are not finite."""
    chosen: set[int] = set()
    calls = iter(range(1, 1000))
    losses_of = TrainingStep.losses

    def losses(self, batch, generators, timestep=None):
        result = losses_of(self, batch, generators, timestep)
        if next(calls) in chosen:
            result = type(result)(result.losses * float("nan"), result.timesteps)
        return result

    monkeypatch.setattr(TrainingStep, "losses", losses)
    return chosen


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion"])
def test_a_bad_step_is_skipped_and_its_images_are_named(
    workshop: Workshop, tmp_path: Path, bad_steps, capfd, optimizer
):
    bad_steps.add(3)
    assert main(workshop.arguments(tmp_path, UNET, max_train_steps=5, optimizer_type=optimizer)) == 0
    told = capfd.readouterr().err
    assert "Step 3 had a gradient that is not finite and was skipped" in told and ".png (timestep" in told
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    assert any(t.abs().max() > 0 for key, t in weights(tmp_path).items() if "lora_up" in key)


def test_bad_steps_in_a_row_stop_the_run_with_its_last_good_state(
    workshop: Workshop, tmp_path: Path, bad_steps, capsys
):
    bad_steps.update(range(3, 100))
    assert main(workshop.arguments(tmp_path, UNET, "--max_nonfinite_steps", "4", max_train_steps=50)) == 2
    assert "4 steps in a row" in capsys.readouterr().err
    state = newest_state(tmp_path, "lora")
    assert state is not None
    assert all(tensor.isfinite().all() for tensor in state.weights().values())


def test_a_full_memory_says_what_was_done_and_what_would_help(workshop: Workshop, tmp_path: Path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("sd3_train_network.load_mmdit", full)
    assert main(workshop.arguments(tmp_path, UNET)) == 2
    told = capsys.readouterr().err
    assert "while the denoiser was loaded" in told and "--gradient_checkpointing" in told and "--blocks_to_swap" in told
    assert "Traceback" not in told


def test_a_full_disk_stops_with_a_message_and_leaves_whole_files(
    workshop: Workshop, tmp_path: Path, monkeypatch, capsys
):
    plain, calls = safetensors.torch.save_file, []

    def save(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) >= 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    assert main(workshop.arguments(tmp_path, UNET, "--save_every_n_steps", "2", max_train_steps=6)) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000002.safetensors"]
    load_file(tmp_path / "lora-step00000002.safetensors")
    assert not list(tmp_path.glob(".*tmp"))


def test_a_disk_that_fills_up_while_a_state_is_written_leaves_the_one_before(
    workshop: Workshop, tmp_path: Path, monkeypatch, capsys
):
    plain, calls = torch.save, []

    def save(state, file):
        calls.append(file)
        if len(calls) > 6:  # in the second state
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(state, file)

    monkeypatch.setattr(torch, "save", save)
    more = ("--save_every_n_steps", "2", "--save_state")
    assert main(workshop.arguments(tmp_path, UNET, *more, max_train_steps=50)) == 2
    told = capsys.readouterr().err
    assert "lora-step00000004-state: it cannot be written (No space left on device)" in told and "Traceback" not in told
    assert [path.name for path in tmp_path.glob("*-state")] == ["lora-step00000002-state"]
    assert not list(tmp_path.glob(".*tmp"))
    state = newest_state(tmp_path, "lora")
    assert state is not None and state.component("optimizer") is not None


@pytest.mark.parametrize(
    ("doing", "target"),
    [
        ("drawing previews", "library.sd3.codec.LatentCodec.decode"),
        ("validating", "library.monitoring.validation.validate"),
    ],
)
def test_a_memory_that_is_full_between_steps_is_told_with_what_was_done(
    workshop: Workshop, tmp_path: Path, monkeypatch, capsys, doing, target
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(target, full)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    more = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--validate_every_n_steps", "1")
    dataset = workshop.dataset.read_text(encoding="utf-8").replace(
        "resolution = 64", "resolution = 64\nvalidation_split = 0.2"
    )
    (tmp_path / "d.toml").write_text(dataset, encoding="utf-8")
    words = workshop.arguments(tmp_path, UNET, *more, dataset_config=tmp_path / "d.toml")
    assert main(words) == 2
    assert f"was full while {doing}" in capsys.readouterr().err


def test_who_stops_a_run_does_not_wait_for_previews(workshop: Workshop, tmp_path: Path, monkeypatch):
    """Spot machines give half a minute: after the step comes saving, not validation and pictures."""
    plain = RunMetrics.on_step_end

    def step(self, report):
        plain(self, report)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunMetrics, "on_step_end", step)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(workshop.arguments(tmp_path, UNET, sample_prompts=prompts, sample_every_n_steps=1))
    assert ended.value.code == 143 and newest_state(tmp_path, "lora") is not None
    assert not list(tmp_path.glob("sample/*"))


def test_ctrl_c_before_training_is_no_crash(workshop: Workshop, tmp_path: Path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sd3_train_network.load_mmdit", interrupted)
    assert main(workshop.arguments(tmp_path, UNET)) == 130
    assert "Stopped before training" in capsys.readouterr().err


def test_killed_again_and_again_while_it_saves_the_run_still_ends_the_same(workshop: Workshop, tmp_path: Path):
    """Kills at random moments of a run that saves after every step; each start goes on from the newest whole state."""
    more = (UNET, "--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "3", "--resume", "auto")
    words = workshop.arguments(tmp_path / "killed", *more, max_train_steps=60)
    rng = random.Random(3)
    for _ in range(3):
        state = newest_state(tmp_path / "killed", "lora")
        before = state.position.step if state else 0

        def has_come_on(before: int = before) -> bool:
            now = newest_state(tmp_path / "killed", "lora")
            return now is not None and now.position.step > before

        process = start(words)
        wait_for(lambda: process.poll() is not None or has_come_on())  # noqa: B023
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL) if hasattr(signal, "SIGKILL") else process.kill()
        process.wait()
        for path in (tmp_path / "killed").glob("lora*.safetensors"):
            load_file(path)
    assert main(words) == 0
    assert main(workshop.arguments(tmp_path / "whole", UNET, max_train_steps=60)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert len(list((tmp_path / "killed").glob("lora-step*-state"))) <= 4


def test_save_every_n_minutes_counts_minutes(workshop: Workshop, tmp_path: Path, monkeypatch):
    clock = iter(range(0, 10**6, 25))  # every look at the clock is 25 seconds later
    monkeypatch.setattr(
        "library.saving.checkpoints.time", SimpleNamespace(monotonic=lambda: float(next(clock)), time=time.time)
    )
    assert main(workshop.arguments(tmp_path, UNET, "--save_every_n_minutes", "1", max_train_steps=6)) == 0
    assert 1 <= len(list(tmp_path.glob("lora-step*.safetensors"))) <= 4


def test_two_thousand_mutated_dataset_files_give_nothing_but_clear_errors(tmp_path: Path):
    source = """[general]
resolution = [512, 768]
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
batch_size = 2
validation_split = 0.1
[[datasets.subsets]]
image_dir = "images"
num_repeats = 3
keep_tokens_separator = "|||"
custom_attributes = { diff_output_preservation = true }
"""
    rng = random.Random(0)
    pieces = [
        "=",
        "[",
        "]",
        '"',
        "\n",
        "-1",
        "1e999",
        "nan",
        "true",
        "{}",
        "é",
        "\x00",
        "[[",
        "datasets",
        "0x7fffffffffffffff",
    ]
    path, refused = tmp_path / "d.toml", 0
    logging.disable(logging.WARNING)
    try:
        for _ in range(2000):
            text = source
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(text))
                cut = rng.randint(0, 6)
                text = text[:place] + rng.choice(pieces) * rng.randint(0, 2) + text[place + cut :]
            path.write_bytes(text.encode("utf-8"))
            try:
                read_datasets(str(path), CommandLineData())
            except UserError:
                refused += 1
    finally:
        logging.disable(logging.NOTSET)
    assert 500 < refused <= 2000


def test_secrets_reach_no_file(workshop: Workshop, tmp_path: Path):
    """Tokens and keys are in no LoRA, state, log or config file."""
    secret = "hf_averysecrettoken12345"
    config = tmp_path / "out" / "config.toml"
    words = workshop.arguments(tmp_path / "out", UNET, "--save_state", max_train_steps=1)
    assert main([*words, "--wandb_api_key", secret, "--config_file", str(config), "--output_config"]) == 0
    assert main([*words, "--wandb_api_key", secret]) == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    options = json.loads((tmp_path / "out" / "lora-state" / "train_state.json").read_text(encoding="utf-8"))["options"]
    assert "wandb_api_key" not in options and options["learning_rate"] == 0.001


def test_every_saved_file_is_uploaded_and_the_token_stays_out_of_files(workshop: Workshop, tmp_path: Path, hub):
    more = ("--save_state", "--save_state_to_huggingface", "--async_upload", "--huggingface_token", "hf_verysecret")
    words = workshop.arguments(tmp_path / "out", UNET, *more, max_train_steps=4, save_every_n_steps=2)
    assert main([*words, "--huggingface_repo_id", "me/lora", "--huggingface_path_in_repo", "runs"]) == 0
    sent = set(hub.repos["me/lora"])
    assert {"runs/lora-step00000002.safetensors", "runs/lora.safetensors", "runs/lora-state/train_state.json"} <= sent
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_verysecret" in path.read_bytes()]
    resumed = workshop.arguments(tmp_path / "resumed", UNET, max_train_steps=4)
    place = ("--resume", "me/lora/runs/lora-step00000002-state", "--resume_from_huggingface")
    assert main([*resumed, *place]) == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "resumed"))


def test_a_hub_that_cannot_be_reached_is_told_with_all_other_problems(workshop: Workshop, tmp_path: Path, hub, capsys):
    hub.shutdown()
    hub.server_close()
    words = workshop.arguments(tmp_path, UNET, "--optimizer_type", "AdamWW", "--huggingface_repo_id", "me/lora")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "me/lora: the repository cannot be reached" in told and "AdamWW" in told


def traces(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file and folder below, with what writing changes: a file that came and went changes its folder's time."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.mark.parametrize("state", ["whole", "being replaced", "on the Hub"])
def test_a_dry_run_writes_nothing_anywhere(workshop: Workshop, tmp_path: Path, monkeypatch, capfd, state: str, hub):
    home, out = tmp_path / "home", tmp_path / "out"
    (tmp_path / "tmp").mkdir()
    home.mkdir()
    text = workshop.dataset.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 2\ncache_info = true")
    (tmp_path / "d.toml").write_text(text, encoding="utf-8")
    more = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(tmp_path / "caches")]
    words = workshop.arguments(out, UNET, *more, dataset_config=tmp_path / "d.toml")
    assert main([*words, "--save_state", "--max_train_steps", "2"]) == 0
    shutil.rmtree(tmp_path / "caches")
    words += ["--logging_dir", str(tmp_path / "logs"), "--log_with", "tensorboard", "--log_prefix", "x"]
    words += ["--console_log_file", str(tmp_path / "log.txt"), "--resume"]
    if state == "being replaced":
        os.replace(out / "lora-state", out / ".lora-state.old")
    if state == "on the Hub":
        for path in (out / "lora-state").iterdir():
            hub.repos.setdefault("me/lora", {})[f"lora-state/{path.name}"] = path.read_bytes()
        words += ["me/lora/lora-state", "--resume_from_huggingface"]
    else:
        words.append("auto")
    before = traces(tmp_path, workshop.folder)
    for name, folder in (("HOME", "home"), ("HF_HOME", "home"), ("TMPDIR", "tmp")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert main([*words, "--dry_run"]) == 0
    assert main(workshop.arguments(tmp_path / "new" / "out", UNET, *more, "--dry_run")) == 0
    after = traces(tmp_path, workshop.folder)
    assert set(after) == set(before)
    changed = {path for path in before if before[path] != after[path]}
    assert changed <= ({tmp_path / "tmp"} if state == "on the Hub" else set())


def test_debug_dataset_writes_its_sheets_and_nothing_else(workshop: Workshop, tmp_path: Path):
    before = traces(workshop.folder)
    words = workshop.arguments(tmp_path / "out", UNET, "--debug_dataset", "--cache_latents_to_disk")
    assert main([*words, "--cache_dir", str(tmp_path / "caches")]) == 0
    assert traces(workshop.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset"]


def test_two_runs_under_one_name_do_not_mix_and_a_killed_one_leaves_nothing(workshop: Workshop, tmp_path: Path, capfd):
    words = workshop.arguments(
        tmp_path / "out", UNET, "--cache_latents_to_disk", "--cache_dir", str(tmp_path / "caches")
    )
    first = start([*words, "--max_train_steps", "5000"])
    metrics = tmp_path / "out" / "lora.metrics.jsonl"
    wait_for(lambda: first.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    assert main([*words, "--optimizer_type", "AdamWW"]) == 2
    told = capfd.readouterr().err
    assert f'another run writes "lora" there: process {first.pid}' in told and "AdamWW" in told
    first.kill()
    first.wait()
    process = this_process()
    for target in (tmp_path / "out" / "lora.safetensors", tmp_path / "caches" / "x.latents.safetensors"):
        name = temporary_name(target).name.replace(f"-{process.pid}-", f"-{first.pid}-")  # as if killed while it wrote
        target.with_name(name).write_bytes(b"half")
    (tmp_path / "out" / ".lora-step00000004-state.tmp").mkdir()
    assert main([*words, "--max_train_steps", "2"]) == 0
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(("full", "expected"), [(1, "caches"), (2, "home"), (3, "tmp"), (4, None)])
def test_a_full_disk_at_the_end_does_not_cost_the_lora(
    workshop: Workshop, tmp_path: Path, monkeypatch, capsys, full: int, expected: str | None
):
    """A run without saves on the way: the file goes where there is room, and the message says where that is."""
    folders = [tmp_path / name for name in ("out", "caches", "home", "tmp")]
    for folder in folders[1:]:
        folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    plain = safetensors.torch.save_file

    def save(tensors, path, metadata=None):
        if Path(path).parent in folders[:full]:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    words = workshop.arguments(folders[0], UNET, "--ema_decay", "0.9", max_train_steps=2)
    if expected is not None:
        (tmp_path / expected / "lora-ema.safetensors").write_bytes(b"another's")
    assert main([*words, "--cache_dir", str(tmp_path / "caches")]) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told and "Traceback" not in told
    files = [path for folder in folders for path in sorted(folder.glob("lora*.safetensors"))]
    if expected is None:
        assert files == []
        return
    names = ["lora-ema-2.safetensors", "lora-ema.safetensors", "lora.safetensors"]
    assert files == [tmp_path / expected / name for name in names]
    assert (tmp_path / expected / "lora-ema.safetensors").read_bytes() == b"another's"
    for name in (names[0], names[2]):
        assert load_file(tmp_path / expected / name) and str(tmp_path / expected / name) in told
