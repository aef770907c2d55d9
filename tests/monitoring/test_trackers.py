"""What a run tells to trackers and to its metrics file, seen by reading both back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.common.errors import UserError
from library.monitoring.async_scalars import MAX_PENDING, AsyncScalars
from library.monitoring.metrics_file import Curves, MetricsFile
from library.monitoring.trackers import (
    Trackers,
    TrackingSettings,
    tracker_arguments,
    tracking_problems,
)
from library.training.callback_settings import chosen_trackers, log_folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- numbers on their way ---------------------------------------------------------------------------------------------


def test_numbers_are_told_in_the_order_in_which_they_were_sent() -> None:
    told: list[object] = []
    scalars = AsyncScalars(torch.device("cpu"))
    scalars.push(torch.tensor([1.0, 2.0]), told.append)
    scalars.push(None, lambda _: told.append("epoch"))
    scalars.push(torch.tensor([True]), told.append)
    scalars.flush()
    assert told == [[1.0, 2.0], "epoch", [1.0]]


def test_processes_are_told_at_the_same_step() -> None:
    """All but the newest, however fast the numbers come."""
    told: list[list[float]] = []
    scalars = AsyncScalars(torch.device("cpu"), lockstep=True)
    for number in range(3):
        scalars.push(torch.tensor([float(number)]), told.append)
        scalars.poll()
        assert len(told) == number
    scalars.flush()
    assert told == [[0.0], [1.0], [2.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reading_numbers_does_not_wait_for_the_gpu() -> None:
    """Behind half a second of work the numbers have not arrived, and asking for them returns at once."""
    device = torch.device("cuda")
    torch.zeros(1, device=device, dtype=torch.float32).cpu()
    told: list[list[float]] = []
    scalars = AsyncScalars(device)
    torch.cuda._sleep(1_000_000_000)
    value = torch.full((1,), 3.0, device=device)
    with torch.cuda.device(device):
        torch.cuda.set_sync_debug_mode("error")
        try:
            scalars.push(value, told.append)
            scalars.poll()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert told == []
    scalars.flush()
    assert told == [[3.0]]
    for number in range(MAX_PENDING + 3):
        scalars.push(torch.full((1,), float(number), device=device), told.append)
    scalars.flush()
    assert told[1:] == [[float(number)] for number in range(MAX_PENDING + 3)]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_new_run_starts_a_new_file_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.metrics.jsonl"
    first = MetricsFile(path)
    assert first.open(0) == []
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 10})
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo', encoding="utf-8")  # killed while it wrote
    resumed = MetricsFile(path)
    assert [record["step"] for record in resumed.open(2)] == [1, 2]
    resumed.write({"step": 3, "loss": 9})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 0.1), (2, 0.2), (3, 9)]
    again = MetricsFile(path)
    again.open(0)
    again.close()
    assert read_lines(path) == []


def test_numbers_that_are_not_finite_are_still_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "x.jsonl")
    file.open(0)
    file.write({"step": 1, "a": float("nan"), "b": float("inf"), "c": "text"})
    file.close()
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1, "a": None, "b": None, "c": "text"}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "x.jsonl")
    file.open(0)
    file.close()
    file._file = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - write and close are tested
    for step in range(3):
        file.write({"step": step})
    file.close()
    assert len(caplog.messages) == 1 and "training goes on" in caplog.text


def test_curves_hold_the_numbers_by_name() -> None:
    curves = Curves()
    curves.add({"step": 1, "epoch": 1, "loss": 0.5, "prompt": "x"})
    curves.add({"step": 2, "epoch": 1, "loss": 0.25, "lr/unet": 1e-4})
    assert curves["loss"] == ([1, 2], [0.5, 0.25])
    assert curves["lr/unet"] == ([2], [1e-4])
    assert curves["never"] == ([], [])
    assert curves.names() == ["loss", "lr/unet"]


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_which_trackers_are_meant() -> None:
    assert chosen_trackers(None, None) == ()
    assert chosen_trackers("all", "logs") == ("tensorboard", "wandb")
    assert chosen_trackers("wandb", None) == ("wandb",)
    assert chosen_trackers("tensorboard", None) == ()  # the options' checks say that it needs a folder


def test_the_log_folder_has_prefix_and_time() -> None:
    folder = log_folder("logs", "cat_")
    assert folder is not None and folder.parent == Path("logs")
    assert folder.name.startswith("cat_20") and len(folder.name) == len("cat_") + 14
    assert log_folder(None, "cat_") is None


def test_the_tracker_file_wins_over_the_run_name(tmp_path: Path) -> None:
    file = tmp_path / "trackers.toml"
    file.write_text('[wandb]\nname = "other"\nentity = "team"\n[tensorboard]\nflush_secs = 5\n', encoding="utf-8")
    settings = TrackingSettings(("wandb",), None, run_name="mine", arguments_file=file)
    assert tracker_arguments(settings) == {"wandb": {"name": "other", "entity": "team"}}
    assert tracker_arguments(TrackingSettings(("wandb",), None, run_name="mine")) == {"wandb": {"name": "mine"}}


@pytest.mark.parametrize("text", ["[mlflow]\nx = 1\n", "wandb = 3\n", "[wandb\n"])
def test_a_tracker_file_that_is_wrong_is_told_with_its_path(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trackers.toml"
    file.write_text(text, encoding="utf-8")
    (problem,) = tracking_problems(TrackingSettings((), None, arguments_file=file))
    assert str(file) in problem and "--log_tracker_config" in problem


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("tensorboard", "flush_sec = 3", "flush_secs"),
        ("tensorboard", 'log_dir = "x"', "--logging_dir"),
        ("wandb", "enttiy = 1", "entity"),
        ("wandb", 'project = "x"', "--log_tracker_name"),
    ],
)
def test_an_argument_that_a_tracker_does_not_take_is_told_before_training(
    tmp_path: Path, name: str, line: str, told: str
) -> None:
    pytest.importorskip(name)
    file = tmp_path / "trackers.toml"
    file.write_text(f"[{name}]\n{line}\n", encoding="utf-8")
    (problem,) = tracking_problems(TrackingSettings((name,), tmp_path, arguments_file=file))
    assert line.split(" ")[0] in problem and told in problem and f"[{name}]" in problem
    file.write_text({"tensorboard": "[tensorboard]\nflush_secs = 5\n", "wandb": '[wandb]\nentity = "team"\n'}[name])
    assert tracking_problems(TrackingSettings((name,), tmp_path, run_name="mine", arguments_file=file)) == []


def test_a_tracker_that_is_not_installed_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = tracking_problems(TrackingSettings(("wandb",)))
    assert "pip install wandb" in problem
    with pytest.raises(UserError):
        tracker_arguments(TrackingSettings((), None, arguments_file=Path("none.toml")))


def test_tensorboard_gets_scalars_and_previews_under_their_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path)
    trackers = Trackers(accelerator, TrackingSettings(("tensorboard",), tmp_path, "cats"), {"seed": 1, "list": [1, 2]})
    trackers.scalars({"loss/current": 0.5, "lr/textencoder 2": 1e-4}, x=3, step=3, epoch=1)
    trackers.scalars({"loss/epoch_average": 0.25}, x=1, step=3, epoch=1)
    trackers.images([(2, "a cat", Image.new("RGB", (8, 16), "red"))], step=3, epoch=1)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "cats"))
    events.Reload()
    (current,) = events.Scalars("loss/current")
    assert (current.step, current.value) == (3, 0.5)
    assert events.Scalars("loss/epoch_average")[0].step == 1
    assert "lr/textencoder 2" in events.Tags()["scalars"]
    (image,) = events.Images("sample_2")
    assert (image.width, image.height, image.step) == (8, 16, 3)


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from accelerate.tracking import TensorBoardTracker

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    trackers = Trackers(
        Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path),
        TrackingSettings(("tensorboard",), tmp_path),
    )
    monkeypatch.setattr(TensorBoardTracker, "log", full)
    for step in range(3):
        trackers.scalars({"loss/current": 1.0}, step, step, 0)
    trackers.close()
    assert [record.getMessage() for record in caplog.records if "No space" in record.getMessage()] == [
        "A tracker failed, and may miss values: OSError: [Errno 28] No space left on device"
    ]
    trackers.scalars({"loss/current": 1.0}, 9, 9, 0)  # after the end: nothing, and no error


WANDB_RUN = """
import sys
from pathlib import Path
from accelerate import Accelerator
from PIL import Image
from library.monitoring.trackers import Trackers, TrackingSettings
accelerator = Accelerator(cpu=True, log_with=["wandb"])
settings = TrackingSettings(("wandb",), None, "cats", "my run", api_key=sys.argv[2], secrets=(sys.argv[2],))
trackers = Trackers(accelerator, settings, {"seed": 1})
assert sys.argv[2] == "KEY" * 14
trackers.scalars({"loss/current": 0.5}, x=3, step=3, epoch=1)
trackers.images([(0, "a cat", Image.new("RGB", (8, 8), "red"))], step=3, epoch=1)
trackers.close()
"""


def test_wandb_without_a_key_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from accelerate import Accelerator

    def fails(*_: object, **__: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    accelerator = Accelerator(cpu=True, log_with=["wandb"])
    monkeypatch.setattr(accelerator, "init_trackers", fails)
    with pytest.raises(UserError, match=r"No API key.*WANDB_MODE=offline"):
        Trackers(accelerator, TrackingSettings(("wandb",), tmp_path))


def test_wandb_gets_values_offline_and_never_the_key(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    key = "KEY" * 14
    home = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, **home, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = tmp_path / "run.py"
    script.write_text(WANDB_RUN, encoding="utf-8")
    words = [sys.executable, str(script), "--wandb_api_key", key]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    data = record.read_bytes()
    assert b"loss/current" in data and b"sample_0" in data and b"my run" in data and b"global_step" in data
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/sample_0*.png"))
    for path in tmp_path.rglob("*"):
        assert path == script or not path.is_file() or key.encode() not in path.read_bytes(), path
