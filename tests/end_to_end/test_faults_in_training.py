"""Files that vanish, caches that break and workers that die in the middle of training: the run is saved, or goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from library.monitoring.metrics import RunMetrics
from library.saving.state import newest_state
from library.training.step import TrainingStep
from networks.network import Network
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop
from tests.end_to_end.launching import free_port
from tests.end_to_end.test_resume import same, wait_for, weights
from tests.warm_processes import start_python

SCRIPT = str(ROOT / "sd3_train_network.py")
UNET = "--network_train_unet_only"
AfterStep = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def own(workshop: Workshop, tmp_path: Path) -> Workshop:
    """The workshop with images and a model that a test may damage."""
    shutil.copytree(workshop.folder / "images", tmp_path / "images")
    shutil.copytree(workshop.model.parent / "tokenizers", tmp_path / "tokenizers")
    model = shutil.copy(workshop.model, tmp_path / "model.safetensors")
    text = workshop.dataset.read_text(encoding="utf-8")
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(
        text.replace((workshop.folder / "images").as_posix(), (tmp_path / "images").as_posix()), encoding="utf-8"
    )
    return Workshop(tmp_path, Path(model), dataset)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> AfterStep:
    """after_step(n, action): call `action` when the n-th step of the test is done."""
    actions: dict[int, Callable[[], None]] = {}
    count = 0
    step = TrainingStep.__call__

    def observed(self, *args, **kwargs):
        nonlocal count
        report = step(self, *args, **kwargs)
        count += 1
        actions.pop(count, lambda: None)()
        return report

    monkeypatch.setattr(TrainingStep, "__call__", observed)
    return actions.__setitem__


def hide(folder: Path, pattern: str) -> Callable[[], None]:
    def move() -> None:
        (folder / "hidden").mkdir()
        for path in sorted(folder.glob(pattern)):
            path.rename(folder / "hidden" / path.name)

    return move


def bring_back(folder: Path) -> None:
    for path in (folder / "hidden").iterdir():
        path.rename(folder / path.name)
    (folder / "hidden").rmdir()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_end_the_run_saved_and_it_resumes_to_the_same_weights(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capsys, workers: int
):
    words = lambda name: own.arguments(  # noqa: E731
        tmp_path / name, UNET, max_train_steps=12, max_data_loader_n_workers=workers
    )
    assert main(words("whole")) == 0
    after_step(12 + 2, hide(tmp_path / "images", "*.png"))
    capsys.readouterr()
    assert main(words("broken")) == 1
    err = capsys.readouterr().err
    assert ".png" in err and "--resume auto" in err and "Traceback" not in err
    state = newest_state(tmp_path / "broken", "lora")
    assert state is not None and 2 <= state.position.step < 12
    assert f"step {state.position.step}" in err
    assert (tmp_path / "broken" / f"lora-step{state.position.step:08d}.safetensors").exists()
    bring_back(tmp_path / "images")
    assert main([*words("broken"), "--resume", "auto"]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_images_that_vanish_before_the_first_step_leave_nothing(own: Workshop, tmp_path: Path, monkeypatch, capsys):
    start = RunMetrics.start

    def hiding(self, progress):
        hide(tmp_path / "images", "*.png")()
        return start(self, progress)

    monkeypatch.setattr(RunMetrics, "start", hiding)
    assert main(own.arguments(tmp_path / "out", UNET)) == 2
    assert newest_state(tmp_path / "out", "lora") is None and not list((tmp_path / "out").glob("*.safetensors"))


def test_an_image_that_vanishes_is_left_out_with_skip_bad_images(own: Workshop, tmp_path: Path, after_step: AfterStep):
    after_step(2, hide(tmp_path / "images", "0.png"))
    assert main(own.arguments(tmp_path / "out", UNET, "--skip_bad_images", max_train_steps=12)) == 0


CACHES = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("fault", ["missing", "damaged"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_file_is_made_again(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capsys, kind: str, fault: str, workers: int
):
    words = lambda name: own.arguments(  # noqa: E731
        tmp_path / name, UNET, *CACHES, max_train_steps=12, max_data_loader_n_workers=workers
    )
    assert main(words("whole")) == 0

    def break_caches() -> None:
        for path in (tmp_path / "images").glob(f"*.{kind}.safetensors"):
            path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:100])

    after_step(12 + 2, break_caches)
    assert main(words("broken")) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert list((tmp_path / "images").glob(f"*.{kind}.safetensors"))


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_cache_file_that_cannot_be_made_again_ends_the_run_saved(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capsys, kind: str
):
    def lose_everything() -> None:
        own.model.rename(tmp_path / "elsewhere")
        hide(tmp_path / "images", f"*.{kind}.safetensors")()

    after_step(2, lose_everything)
    assert main(own.arguments(tmp_path / "out", UNET, *CACHES, max_train_steps=12)) == 1
    err = capsys.readouterr().err
    assert f".{kind}.safetensors" in err and "model.safetensors" in err and "--resume auto" in err
    state = newest_state(tmp_path / "out", "lora")
    assert state is not None and state.position.step >= 2


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_with_skip_bad_images_the_run_goes_on_without_them(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capsys, kind: str
):
    def lose_everything() -> None:
        own.model.rename(tmp_path / "elsewhere")
        hide(tmp_path / "images", f"0.*{kind}.safetensors")()

    after_step(2, lose_everything)
    assert main(own.arguments(tmp_path / "out", UNET, *CACHES, "--skip_bad_images", max_train_steps=12)) == 0


def test_a_killed_data_worker_ends_the_run_saved(own: Workshop, tmp_path: Path, after_step: AfterStep, capsys):
    def kill() -> None:
        for child in psutil.Process().children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)

    after_step(2, kill)
    more = ("--persistent_data_loader_workers",)
    assert main(own.arguments(tmp_path / "out", UNET, *more, max_train_steps=60, max_data_loader_n_workers=2)) == 1
    err = capsys.readouterr().err
    assert "data worker" in err and "--resume auto" in err and "Traceback" not in err
    assert newest_state(tmp_path / "out", "lora") is not None


def test_a_base_model_that_vanishes_before_a_preview_ends_the_run_saved(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    words = own.arguments(tmp_path / "out", UNET, *CACHES, max_train_steps=6)
    previews = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    assert main([*words, *previews, "--dry_run"]) == 0
    assert main(words) == 0  # fills the caches: the next run loads the VAE for its first preview
    after_step(6 + 2, lambda: own.model.rename(tmp_path / "elsewhere"))
    assert main([*own.arguments(tmp_path / "new", UNET, *CACHES, max_train_steps=6), *previews]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    state = newest_state(tmp_path / "new", "lora")
    assert state is not None and state.position.step == 4


# --- the base model's file -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_no_model_file_is_mapped_while_training(own: Workshop, tmp_path: Path, after_step: AfterStep):
    mapped: list[str] = []
    after_step(1, lambda: mapped.extend(re.findall(r"/.*\.safetensors", Path("/proc/self/maps").read_text())))
    assert main(own.arguments(tmp_path / "out", UNET, max_train_steps=2)) == 0
    assert str(own.model) not in mapped


def test_a_base_model_that_is_truncated_while_training_is_reported_and_loses_nothing(
    own: Workshop, tmp_path: Path, after_step: AfterStep, capfd
):
    assert main(own.arguments(tmp_path / "whole", UNET, max_train_steps=6)) == 0
    after_step(6 + 2, lambda: os.truncate(own.model, 1000))
    words = own.arguments(tmp_path / "out", UNET, "--save_every_n_steps", "3", max_train_steps=6)
    assert main(words) == 0
    err = capfd.readouterr().err
    assert "changed since the run began" in err and "--disable_mmap_load_safetensors" in err
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_base_model_that_changed_is_not_loaded_from(own: Workshop, tmp_path: Path, after_step: AfterStep, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    assert main(own.arguments(tmp_path / "first", UNET, *CACHES)) == 0
    previews = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    after_step(6 + 2, lambda: os.utime(own.model, (1, 1)))
    assert main(own.arguments(tmp_path / "out", UNET, *CACHES, *previews)) == 1
    assert "changed since the run began" in capsys.readouterr().err


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_run_whose_every_step_was_skipped_fails(workshop: Workshop, tmp_path: Path, monkeypatch, capsys):
    losses_of = TrainingStep.losses

    def losses(self, batch, generators, timestep=None):
        result = losses_of(self, batch, generators, timestep)
        return type(result)(result.losses * float("nan"), result.timesteps)

    monkeypatch.setattr(TrainingStep, "losses", losses)
    assert main(workshop.arguments(tmp_path, UNET, max_train_steps=3)) == 2
    assert "Every step was skipped" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(
    workshop: Workshop, tmp_path: Path, monkeypatch, capsys, after_step: AfterStep
):
    networks: list[Network] = []
    attach = Network.attach

    def observed(self):
        networks.append(self)
        return attach(self)

    monkeypatch.setattr(Network, "attach", observed)

    def spoil() -> None:
        with torch.no_grad():
            for parameter in networks[-1].parameters():
                parameter.fill_(float("nan"))

    after_step(4, spoil)
    words = workshop.arguments(tmp_path, UNET, "--save_every_n_steps", "2", max_train_steps=4)
    assert main(words) == 2
    assert "not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000002.safetensors"]


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_processes(own: Workshop, tmp_path: Path):
    """A run of two processes that has made some steps: (launcher, the two processes)."""
    words = own.arguments(tmp_path / "out", UNET, max_train_steps=5000)
    launcher = start_python(
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), SCRIPT, *words],
        {"ACCELERATE_USE_CPU": "true"},
    )
    metrics = tmp_path / "out" / "lora.metrics.jsonl"
    wait_for(lambda: launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    yield launcher, sorted(psutil.Process(launcher.pid).children(), key=lambda child: child.pid)
    launcher.kill()


def test_images_that_vanish_stop_both_processes_saved(two_processes, tmp_path: Path):
    launcher, _ = two_processes
    hide(tmp_path / "images", "*.png")()
    err = "".join(launcher.communicate(timeout=120))
    assert "LoRA and state are saved" in err and "another process of this run" not in err, err[-3000:]
    state = newest_state(tmp_path / "out", "lora")
    assert state is not None and len(list(state.folder.glob("random_states_*.pt"))) == 2


def test_a_process_whose_peer_died_says_so_in_one_line(two_processes):
    launcher, ranks = two_processes
    ranks[1].kill()
    err = "".join(launcher.communicate(timeout=120))
    assert "Process 0: another process of this run has ended" in err, err[-3000:]
    assert "Traceback" not in err.split("Process 0: another process")[0]
