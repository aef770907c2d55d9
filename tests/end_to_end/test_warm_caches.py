"""With complete disk caches the next run loads no text encoder and no VAE, and trains the same LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sd3_train_network import main
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.test_resume import same, weights
from tests.warm_processes import run_python
from tools import cache_latents

DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only", "--flip_aug")
DROPPED = ("--caption_dropout_rate", "0.4")


@pytest.fixture
def own_images(workshop: Workshop, tmp_path: Path) -> Path:
    shutil.copytree(workshop.folder / "images", tmp_path / "data" / "2_cat")
    return tmp_path / "data"


def words(workshop: Workshop, data: Path, output: Path, *more: str) -> list[str]:
    images = (
        "--train_data_dir",
        str(data),
        "--caption_extension",
        ".txt",
        "--resolution",
        "64",
        "--train_batch_size",
        "2",
    )
    given = workshop.arguments(output, *DISK, *DROPPED, *images, *more, max_train_steps=5)
    place = given.index("--dataset_config")
    return given[:place] + given[place + 2 :]


def test_the_second_run_loads_neither_encoders_nor_vae(
    workshop: Workshop, own_images: Path, tmp_path: Path, monkeypatch
):
    assert main(words(workshop, own_images, tmp_path / "cold")) == 0

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded for nothing")

    for name in (
        "library.sd3.text_encoder_manager.load_clip",
        "library.sd3.text_encoder_manager.load_t5",
        "library.sd3.codec.load_vae",
    ):
        monkeypatch.setattr(name, loaded)
    assert main(words(workshop, own_images, tmp_path / "warm")) == 0
    assert same(weights(tmp_path / "cold"), weights(tmp_path / "warm"))


def test_cached_in_memory_on_disk_and_in_another_folder_train_the_same(
    workshop: Workshop, own_images: Path, tmp_path: Path
):
    assert main(words(workshop, own_images, tmp_path / "disk")) == 0
    other = words(
        workshop, own_images, tmp_path / "elsewhere", "--cache_dir", str(tmp_path / "cache"), "--vae_batch_size", "3"
    )
    assert main(other) == 0
    assert list((tmp_path / "cache").glob("*.safetensors"))
    memory = [word.replace("_to_disk", "") for word in words(workshop, own_images, tmp_path / "memory")]
    assert main([*memory, "--text_encoder_batch_size", "4"]) == 0
    first = weights(tmp_path / "disk")
    assert _near(first, weights(tmp_path / "elsewhere"))
    assert _near(first, weights(tmp_path / "memory"))


def _near(a, b) -> bool:
    """Batches of another size round differently in the encoders."""
    return a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-4 for key in a)


def test_an_edited_caption_is_seen_at_once(workshop: Workshop, own_images: Path, tmp_path: Path):
    assert main(words(workshop, own_images, tmp_path / "a")) == 0
    (own_images / "2_cat" / "0.txt").write_text("a dog", encoding="utf-8")
    assert main(words(workshop, own_images, tmp_path / "b")) == 0
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_caching_tools_fill_what_training_reads(workshop: Workshop, own_images: Path, tmp_path: Path, monkeypatch):
    """By their real commands; then training loads nothing."""
    tools = Path(__file__).resolve().parents[2] / "tools"
    images = (
        "--train_data_dir",
        str(own_images),
        "--caption_extension",
        ".txt",
        "--resolution",
        "64",
        *DROPPED,
        "--flip_aug",
    )
    for name in ("cache_latents.py", "cache_text_encoder_outputs.py"):
        command = [str(tools / name), "--pretrained_model_name_or_path", str(workshop.model), *images]
        done = run_python([*command, "--network_train_unet_only"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded for nothing")

    for name in (
        "library.sd3.text_encoder_manager.load_clip",
        "library.sd3.text_encoder_manager.load_t5",
        "library.sd3.codec.load_vae",
    ):
        monkeypatch.setattr(name, loaded)
    assert main(words(workshop, own_images, tmp_path / "warm")) == 0
    done = run_python([str(tools / "cache_latents.py"), "--dataset_config", "none.toml"], cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "none.toml" in done.stderr


def test_a_dry_run_of_a_caching_tool_shows_the_plan_and_writes_nothing(workshop: Workshop, own_images: Path, capsys):
    images = ["--train_data_dir", str(own_images), "--caption_extension", ".txt", "--resolution", "64"]
    options = ["--pretrained_model_name_or_path", str(workshop.model), *images]
    before = sorted(own_images.rglob("*"))
    assert cache_latents.main([*options, "--dry_run"]) == 0
    assert "images" in capsys.readouterr().out and sorted(own_images.rglob("*")) == before
    assert cache_latents.main([*options, "--output_config"]) == 2
    assert "--output_config is for sd3_train_network.py" in capsys.readouterr().err
