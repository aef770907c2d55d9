"""The metadata of all files that a run writes; test_metadata_readers.py reads every key of one."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from sd3_train_network import main
from tests.end_to_end.conftest import Workshop

SECRET = "hunter2-secret-key"


def read(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described")
    picture = folder / "cover.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    options = ["--save_every_n_steps", "2", "--save_every_n_epochs", "1", "--wandb_api_key", SECRET]
    options += ["--metadata_thumbnail", str(picture), "--min_timestep", "100"]
    assert main(workshop.arguments(folder, *options, "--network_train_unet_only", max_train_steps=8)) == 0
    return folder


def test_what_is_not_given_is_told_as_it_is_in_force(trained: Path) -> None:
    metadata = read(trained / "lora.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "1")
    assert (metadata["ss_unet_lr"], metadata["ss_text_encoder_lr"]) == ("0.001", "None")
    assert (metadata["modelspec.timestep_range"], metadata["modelspec.title"]) == ("100,1000", "lora")


def test_step_and_epoch_files_name_their_epoch(trained: Path) -> None:
    batches = int(read(trained / "lora.safetensors")["ss_num_batches_per_epoch"])
    for step in (2, 4, 6, 8):
        metadata = read(trained / f"lora-step{step:08d}.safetensors")
        assert metadata["ss_steps"] == str(step)
        assert metadata["ss_epoch"] == str((step - 1) // batches + 1)
    assert read(trained / "lora-000001.safetensors")["ss_epoch"] == "1"


def test_the_thumbnail_is_a_picture_in_a_data_url(trained: Path) -> None:
    url = read(trained / "lora.safetensors")["modelspec.thumbnail"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(BytesIO(base64.b64decode(data))).size == (40, 30)


def test_no_secret_and_no_folder_is_told(trained: Path, workshop: Workshop) -> None:
    for path in [*trained.glob("*.safetensors"), *trained.glob("*.jsonl"), *trained.glob("*.html")]:
        data = path.read_bytes()
        assert SECRET.encode() not in data
        assert path.suffix != ".safetensors" or str(workshop.folder).encode() not in data


def test_no_metadata_keeps_what_programs_need(workshop: Workshop, tmp_path: Path) -> None:
    words = workshop.arguments(tmp_path, "--no_metadata", "--network_train_unet_only", max_train_steps=1)
    assert main(words) == 0
    metadata = read(tmp_path / "lora.safetensors")
    assert {key for key in metadata if key.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
    }
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora" and "sshs_model_hash" in metadata


def test_a_missing_thumbnail_is_told_before_training(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(workshop.arguments(tmp_path, metadata_thumbnail=tmp_path / "none.png")) == 2
    assert "--metadata_thumbnail" in capsys.readouterr().err
