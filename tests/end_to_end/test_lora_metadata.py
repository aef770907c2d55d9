"""The metadata of files that the real command writes, read as the programs that show LoRA files read them."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from sd3_train_network import main
from tests.end_to_end.conftest import Workshop

SECRET = "hunter2-secret-key"
ALWAYS = [
    "session_id",
    "training_started_at",
    "training_finished_at",
    "output_name",
    "learning_rate",
    "text_encoder_lr",
    "unet_lr",
    "num_train_images",
    "num_validation_images",
    "num_reg_images",
    "num_batches_per_epoch",
    "num_epochs",
    "epoch",
    "steps",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "max_train_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "mixed_precision",
    "full_fp16",
    "v2",
    "base_model_version",
    "clip_skip",
    "max_token_length",
    "cache_latents",
    "seed",
    "lowram",
    "noise_offset",
    "noise_offset_random_strength",
    "multires_noise_iterations",
    "multires_noise_discount",
    "adaptive_noise_scale",
    "zero_terminal_snr",
    "ip_noise_gamma",
    "ip_noise_gamma_random_strength",
    "training_comment",
    "sd_scripts_commit_hash",
    "optimizer",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "face_crop_aug_range",
    "prior_loss_weight",
    "min_snr_gamma",
    "scale_weight_norms",
    "debiased_estimation",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "fp8_base",
    "fp8_base_unet",
    "validation_seed",
    "validation_split",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "resize_interpolation",
    "sd_model_name",
    "sd_model_hash",
    "new_sd_model_hash",
    "apply_lg_attn_mask",
    "apply_t5_attn_mask",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
]


def read(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def as_webui_reads(path: Path) -> dict[str, Any]:
    """AUTOMATIC1111's read_metadata_from_safetensors: values that begin with a brace are JSON."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {k: json.loads(v) if v[0:1] == "{" else v for k, v in header["__metadata__"].items()}


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described")
    picture = folder / "cover.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    options = [
        "--save_every_n_steps",
        "2",
        "--save_every_n_epochs",
        "1",
        "--training_comment",
        "héllo",
        "--wandb_api_key",
        SECRET,
    ]
    options += ["--metadata_title", "My cat", "--metadata_author", "me", "--metadata_tags", "cat, grass"]
    options += ["--metadata_thumbnail", str(picture), "--metadata_trigger_phrase", "a cat", "--training_shift", "3.0"]
    options += ["--min_timestep", "100", "--clip_l_dropout_rate", "0.25", "--network_args", "train_block_indices=0"]
    assert main(workshop.arguments(folder, *options, "--network_train_unet_only", max_train_steps=8)) == 0
    return folder


def test_every_key_of_sd_scripts_is_there(trained: Path) -> None:
    metadata = read(trained / "lora.safetensors")
    assert [name for name in ALWAYS if f"ss_{name}" not in metadata] == []
    assert {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_network_args"} <= metadata.keys()


def test_values_are_true(trained: Path, workshop: Workshop) -> None:
    metadata = read(trained / "lora.safetensors")
    expected = {
        "ss_base_model_version": "5-medium",
        "ss_network_dim": "4",  # the default rank, not "None"
        "ss_network_alpha": "1",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "None",
        "ss_training_shift": "3.0",
        "ss_min_timestep": "100",
        "ss_clip_l_dropout_rate": "0.25",
        "ss_steps": "8",
        "ss_max_train_steps": "8",
        "ss_seed": "7",
        "ss_mixed_precision": "no",
        "ss_training_comment": "héllo",
        "ss_num_train_images": "12",
        "ss_network_args": '{"train_block_indices": "0"}',
        "ss_sd_model_name": workshop.model.name,
        "modelspec.architecture": "stable-diffusion-3-5-medium/lora",
        "modelspec.prediction_type": "flow",
        "modelspec.resolution": "64x64",
        "modelspec.timestep_range": "100,1000",
        "modelspec.title": "My cat",
        "modelspec.author": "me",
        "modelspec.tags": "cat, grass",
        "modelspec.trigger_phrase": "a cat",
        "modelspec.sai_model_spec": "1.0.1",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert float(metadata["ss_training_started_at"]) < float(metadata["ss_training_finished_at"])
    assert abs((datetime.fromisoformat(metadata["modelspec.date"]) - datetime.now()).total_seconds()) < 600


def test_hashes_are_those_of_the_base_file_and_of_the_lora(trained: Path, workshop: Workshop) -> None:
    path = trained / "lora.safetensors"
    metadata, base, data = read(path), workshop.model.read_bytes(), path.read_bytes()
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(base).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(base[1 << 20 :][: 64 << 10]).hexdigest()[:8]
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    alone = save(load_file(path), training)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[1 << 20 :][: 64 << 10]).hexdigest()[:8]


def test_step_and_epoch_files_name_their_epoch(trained: Path) -> None:
    batches = int(read(trained / "lora.safetensors")["ss_num_batches_per_epoch"])
    for step in (2, 4, 6, 8):
        metadata = read(trained / f"lora-step{step:08d}.safetensors")
        assert metadata["ss_steps"] == str(step)
        assert metadata["ss_epoch"] == str((step - 1) // batches + 1)
    assert read(trained / "lora-000001.safetensors")["ss_epoch"] == "1"


def test_webui_finds_trigger_words_resolutions_and_dates(trained: Path) -> None:
    """What its LoRA card works out (ui_edit_user_metadata.py)."""
    metadata = as_webui_reads(trained / "lora.safetensors")
    tags = metadata["ss_tag_frequency"]["images"]
    assert tags["a cat"] == 6 and tags["number 3"] == 1
    resolutions = {
        f"{bucket['resolution'][1]}x{bucket['resolution'][0]}": bucket["count"]
        for bucket in metadata["ss_bucket_info"]["buckets"].values()
    }
    assert sum(resolutions.values()) == 12 and "64x64" in resolutions
    assert sum(int(params.get("img_count", 0)) for params in metadata["ss_dataset_dirs"].values()) == 6
    assert datetime.fromtimestamp(float(metadata["ss_training_started_at"]))
    assert metadata["ss_output_name"] == "lora" and metadata["ss_clip_skip"] == "None" and metadata["ss_v2"] == "False"
    assert len(metadata["sshs_model_hash"]) == 64


def test_datasets_are_described_as_sd_scripts_does(trained: Path) -> None:
    (dataset,) = json.loads(read(trained / "lora.safetensors")["ss_datasets"])
    assert dataset["is_dreambooth"] is True and dataset["resolution"] == [64, 64] and dataset["enable_bucket"] is True
    assert dataset["num_train_images"] == 12 and dataset["batch_size_per_device"] == 2
    (subset,) = dataset["subsets"]
    assert subset["image_dir"] == "images" and subset["num_repeats"] == 2 and subset["img_count"] == 6


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


def test_a_run_without_a_dataset_file_describes_its_folders(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "3_blue cat"
    folder.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), "blue").save(folder / f"{number}.png")
    words = workshop.arguments(
        tmp_path / "out", "--network_train_unet_only", max_train_steps=1, train_data_dir=folder.parent
    )
    at = words.index("--dataset_config")
    del words[at : at + 2]
    assert main([*words, "--resolution", "64", "--train_batch_size", "2", "--gradient_accumulation_steps", "2"]) == 0
    metadata = as_webui_reads(tmp_path / "out" / "lora.safetensors")
    assert metadata["ss_dataset_dirs"] == {"3_blue cat": {"n_repeats": 3, "img_count": 2}}
    assert metadata["ss_tag_frequency"] == {"3_blue cat": {"blue cat": 2}}
    assert metadata["ss_batch_size_per_device"] == "2" and metadata["ss_total_batch_size"] == "4"
    assert metadata["ss_resolution"] == "(64, 64)" and "ss_datasets" not in metadata


def test_a_missing_thumbnail_is_told_before_training(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(workshop.arguments(tmp_path, metadata_thumbnail=tmp_path / "none.png")) == 2
    assert "--metadata_thumbnail" in capsys.readouterr().err
