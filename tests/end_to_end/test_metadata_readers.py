"""The metadata of a trained file: every key with its true value, read as ComfyUI, Civitai and the WebUI family read them.

The readers below are written after those programs: AUTOMATIC1111's sd_models.py, extra-networks lora and ui_edit_user_metadata.py,
ComfyUI's utils.safetensors_header and its /view_metadata route, Civitai's AutoV1, AutoV2 and AutoV3 hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save, save_file

from library.common.tensor_io import load_tensors
from library.sd3.checkpoint import locate_parts
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop

OPTIONS: dict[str, object] = {
    "network_dim": 64,
    "network_alpha": 32,
    "network_dropout": 0.1,
    "learning_rate": "2e-3",
    "unet_lr": "1e-3",
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 4,
    "max_grad_norm": 0.5,
    "seed": 11,
    "loss_type": "huber",
    "huber_schedule": "constant",
    "huber_c": 0.2,
    "huber_scale": 0.9,
    "prior_loss_weight": 0.5,
    "scale_weight_norms": 5,
    "validation_seed": 3,
    "max_validation_steps": 1,
    "validate_every_n_steps": 2,
    "weighting_scheme": "sigma_sqrt",
    "timestep_sampling": "logit_normal",
    "loss_weighting": "velocity",
    "logit_mean": 0.1,
    "logit_std": 1.1,
    "mode_scale": 1.2,
    "training_shift": 2.0,
    "min_timestep": 10,
    "max_timestep": 990,
    "t5xxl_max_token_length": 64,
    "clip_g_dropout_rate": 0.2,
    "t5_dropout_rate": 0.3,
    "pos_emb_random_crop_rate": 0.1,
    "ema_decay": 0.9,
    "training_comment": "für später",
    "metadata_author": "me",
    "metadata_description": "A cat, drawn.",
    "metadata_license": "CC0",
    "metadata_tags": "cat, grass",
    "metadata_title": "My cat",
    "metadata_usage_hint": "0.8",
    "metadata_trigger_phrase": "a cat",
}
GIVEN = ["--gradient_checkpointing", "--cache_latents", "--lowram", "--apply_lg_attn_mask", "--apply_t5_attn_mask"]
GIVEN += ["--optimizer_args", "weight_decay=0.1", "--text_encoder_lr", "1e-4", "2e-4"]
GIVEN += ["--network_args", "train_block_indices=0"]
VOLATILE = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
VOLATILE |= {"ss_sd_scripts_commit_hash", "modelspec.implementation_version", "modelspec.thumbnail"}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes after it, by the format's own rules."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a value of its own for nearly every option that the metadata tell."""
    folder = tmp_path_factory.mktemp("readers")
    vae = locate_parts(workshop.model).vae
    assert vae is not None
    save_file(load_tensors(vae), folder / "my_vae.safetensors")
    Image.new("RGB", (640, 30), "red").save(folder / "cover.png")
    regular = folder / "regular"
    regular.mkdir()
    Image.new("RGB", (64, 64), "blue").save(regular / "0.png")
    (folder / "data.toml").write_text(
        f"""
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
bucket_reso_steps = 32
max_bucket_reso = 128
network_multiplier = 0.9
  [[datasets.subsets]]
  image_dir = {str(workshop.folder / "images")!r}
  caption_extension = ".txt"
  num_repeats = 2
  caption_dropout_rate = 0.05
  caption_prefix = "photo, "
  [[datasets.subsets]]
  image_dir = {str(regular)!r}
  is_reg = true
  class_tokens = "cat"
""",
        encoding="utf-8",
    )
    files = {"dataset_config": folder / "data.toml", "vae": folder / "my_vae.safetensors"}
    thumbnail = {"metadata_thumbnail": folder / "cover.png"}
    assert main(workshop.arguments(folder / "out", *GIVEN, **OPTIONS, **files, **thumbnail)) == 0
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return folder / "out" / "lora.safetensors"


def expected_options(workshop: Workshop, folder: Path) -> dict[str, str]:
    base, vae = workshop.model.read_bytes(), (folder / "my_vae.safetensors").read_bytes()
    return {
        "ss_output_name": "lora",
        "ss_learning_rate": "0.002",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "[0.0001, 0.0002, 0.0]",
        "ss_num_train_images": "12",
        "ss_num_validation_images": "0",
        "ss_num_reg_images": "12",  # repeated until there are as many as images to learn
        "ss_num_batches_per_epoch": "12",
        "ss_num_epochs": "1",
        "ss_epoch": "1",
        "ss_steps": "4",
        "ss_max_train_steps": "4",
        "ss_gradient_checkpointing": "True",
        "ss_gradient_accumulation_steps": "2",
        "ss_lr_warmup_steps": "1",
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_max_grad_norm": "0.5",
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": "64",
        "ss_network_alpha": "32.0",
        "ss_network_dropout": "0.1",
        "ss_network_args": '{"train_block_indices": "0"}',
        "ss_scale_weight_norms": "5.0",
        "ss_mixed_precision": "no",
        "ss_full_fp16": "False",
        "ss_full_bf16": "False",
        "ss_fp8_base": "False",
        "ss_fp8_base_unet": "False",
        "ss_fp8_matmul": "False",
        "ss_base_quantization": "None",
        "ss_lowram": "True",
        "ss_cache_latents": "True",
        "ss_seed": "11",
        "ss_num_processes": "1",
        "ss_training_comment": "für später",
        "ss_ema_decay": "0.9",
        "ss_masked_loss": "False",
        "ss_text_cache_variants": "None",
        "ss_base_weights": "None",
        "ss_base_weights_multiplier": "None",
        "ss_caption_dropout_rate": "[0.05, 0.0]",
        "ss_caption_dropout_every_n_epochs": "0",
        "ss_caption_tag_dropout_rate": "0.0",
        "ss_face_crop_aug_range": "None",
        "ss_resize_interpolation": "None",
        "ss_prior_loss_weight": "0.5",
        "ss_loss_type": "huber",
        "ss_huber_schedule": "constant",
        "ss_huber_c": "0.2",
        "ss_huber_scale": "0.9",
        "ss_validation_seed": "3",
        "ss_validation_split": "0.0",
        "ss_max_validation_steps": "1",
        "ss_validate_every_n_epochs": "None",
        "ss_validate_every_n_steps": "2",
        "ss_base_model_version": "5-medium",
        "ss_sd_model_name": workshop.model.name,
        "ss_sd_model_hash": sha256(base[0x100000:0x110000])[:8],
        "ss_new_sd_model_hash": sha256(base),
        "ss_vae_name": "my_vae.safetensors",
        "ss_vae_hash": sha256(vae[0x100000:0x110000])[:8],
        "ss_new_vae_hash": sha256(vae),
        "ss_apply_lg_attn_mask": "True",
        "ss_apply_t5_attn_mask": "True",
        "ss_t5xxl_max_token_length": "64",
        "ss_clip_l_dropout_rate": "0.0",
        "ss_clip_g_dropout_rate": "0.2",
        "ss_t5_dropout_rate": "0.3",
        "ss_weighting_scheme": "sigma_sqrt",
        "ss_timestep_sampling": "logit_normal",
        "ss_loss_weighting": "velocity",
        "ss_logit_mean": "0.1",
        "ss_logit_std": "1.1",
        "ss_mode_scale": "1.2",
        "ss_training_shift": "2.0",
        "ss_resolution_shift": "False",
        "ss_min_timestep": "10",
        "ss_max_timestep": "990",
        "ss_enable_scaled_pos_embed": "False",
        "ss_pos_emb_random_crop_rate": "0.1",
        "ss_resolution": "(64, 64)",
        # what does not act on SD3 is told as not done
        "ss_v2": "False",
        "ss_clip_skip": "None",
        "ss_max_token_length": "None",
        "ss_noise_offset": "None",
        "ss_noise_offset_random_strength": "None",
        "ss_multires_noise_iterations": "None",
        "ss_multires_noise_discount": "None",
        "ss_adaptive_noise_scale": "None",
        "ss_zero_terminal_snr": "False",
        "ss_ip_noise_gamma": "None",
        "ss_ip_noise_gamma_random_strength": "None",
        "ss_min_snr_gamma": "None",
        "ss_debiased_estimation": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-3-5-medium/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "My cat",
        "modelspec.author": "me",
        "modelspec.description": "A cat, drawn.",
        "modelspec.license": "CC0",
        "modelspec.tags": "cat, grass",
        "modelspec.usage_hint": "0.8",
        "modelspec.trigger_phrase": "a cat",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "flow",
        "modelspec.timestep_range": "10,990",
    }


TAGS = {"a cat": 6, "on grass": 6, **{f"number {n}": 1 for n in range(6)}}
BUCKETS = {"buckets": {"0": {"resolution": [64, 64], "count": 24}}, "mean_img_ar_error": 0.0}
TABLES = {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info"}


def test_every_key_has_its_true_value_and_there_is_no_other(workshop: Workshop, folder: Path, trained: Path) -> None:
    metadata = header_of(trained)[0]["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    expected = expected_options(workshop, folder)
    own_hashes = {"sshs_model_hash", "sshs_legacy_hash"}
    assert {k: v for k, v in metadata.items() if k not in VOLATILE | TABLES | own_hashes} == expected
    assert metadata.keys() == expected.keys() | VOLATILE | TABLES | own_hashes


def test_tables_are_json_in_sd_scripts_structure(workshop: Workshop, trained: Path) -> None:
    metadata = header_of(trained)[0]["__metadata__"]
    tables = {key: json.loads(metadata[key]) for key in TABLES}
    assert tables["ss_tag_frequency"] == {"images": TAGS}
    assert tables["ss_dataset_dirs"] == {"images": {"n_repeats": 2, "img_count": 6}}
    (dataset,) = tables["ss_datasets"]
    images, regular = dataset.pop("subsets")
    buckets = tables["ss_bucket_info"]
    assert buckets == dataset.pop("bucket_info")
    assert dataset == {
        "is_dreambooth": True,
        "batch_size_per_device": 2,
        "num_train_images": 12,
        "num_reg_images": 12,
        "resolution": [64, 64],
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "tag_frequency": {"images": TAGS},
        "resize_interpolation": None,
        "network_multiplier": 0.9,
    }
    plain = {
        "color_aug": False,
        "flip_aug": False,
        "random_crop": False,
        "shuffle_caption": False,
        "keep_tokens": 0,
        "keep_tokens_separator": "",
        "secondary_separator": "",
        "enable_wildcard": False,
        "caption_suffix": "",
        "resize_interpolation": None,
        "caption_tag_dropout_rate": 0.0,
        "alpha_mask": False,
        "loss_weight": 1.0,
    }
    kept: dict[str, Any] = {"img_count": 6, "num_repeats": 2, "caption_prefix": "photo, ", "caption_dropout_rate": 0.05}
    assert images == plain | kept | {"image_dir": "images", "class_tokens": None, "is_reg": False}
    own: dict[str, Any] = {"img_count": 1, "num_repeats": 1, "caption_prefix": "", "caption_dropout_rate": 0.0}
    own["loss_weight"] = 0.5  # --prior_loss_weight
    assert regular == plain | own | {"image_dir": "regular", "class_tokens": "cat", "is_reg": True}


def test_what_changes_from_run_to_run_is_of_the_right_form(trained: Path) -> None:
    metadata = header_of(trained)[0]["__metadata__"]
    started, finished = (float(metadata[f"ss_training_{when}_at"]) for when in ("started", "finished"))
    now = datetime.now().timestamp()
    assert now - 600 < started < finished < now
    assert metadata["modelspec.date"] == datetime.fromtimestamp(finished).replace(microsecond=0).isoformat()
    assert 0 <= int(metadata["ss_session_id"]) < 2**32
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = f"/{git.stdout[:12]}" if git.returncode == 0 else ""
    for key in ("ss_sd_scripts_commit_hash", "modelspec.implementation_version"):
        assert metadata[key].startswith("sd3-lora-trainer") and bool(commit) == ("/" in metadata[key])


# --- AUTOMATIC1111's WebUI, Forge, SD.Next -----------------------------------------------------------------------------


def webui_metadata(path: Path) -> dict[str, Any]:
    """read_metadata_from_safetensors: the header must begin with a brace and a quote; values with a brace are JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(2)
        assert length > 2 and start in (b'{"', b"{'")
        header = json.loads(start + file.read(length - 2))
    found = {}
    for key, value in header.get("__metadata__", {}).items():
        found[key] = json.loads(value) if isinstance(value, str) and value[0:1] == "{" else value
    return found


def test_the_webuis_lora_card_shows_all_its_facts(workshop: Workshop, trained: Path) -> None:
    metadata = webui_metadata(trained)
    assert metadata.get("ss_output_name") == "lora"  # the alias in prompts: <lora:lora:1>
    assert metadata.get("ss_sd_model_name") == workshop.model.name
    assert metadata.get("ss_network_module") == "networks.lora_sd3"
    assert datetime.fromtimestamp(float(metadata["ss_training_started_at"]))
    tags: dict[str, int] = {}
    for counts in metadata.get("ss_tag_frequency", {}).values():
        for tag, count in counts.items():
            tags[tag.strip()] = tags.get(tag.strip(), 0) + int(count)
    assert sorted(tags, key=lambda tag: -tags[tag])[:2] == ["a cat", "on grass"]
    resolutions: dict[str, int] = {}
    for bucket in metadata["ss_bucket_info"]["buckets"].values():
        name = f"{bucket['resolution'][1]}x{bucket['resolution'][0]}"
        resolutions[name] = resolutions.get(name, 0) + int(bucket["count"])
    assert sum(resolutions.values()) == 24 and "64x64" in resolutions
    assert sum(int(folder.get("img_count", 0)) for folder in metadata["ss_dataset_dirs"].values()) == 6
    version = metadata.get("ss_base_model_version", "")
    assert not version.startswith("sdxl_") and str(metadata.get("ss_v2", "")) != "True"  # so it is hidden from neither


def test_the_webui_knows_the_file_by_its_hashes(trained: Path) -> None:
    """network.py takes sshs_model_hash on trust; the additional-networks extension works both out."""
    metadata = webui_metadata(trained)
    _, body = header_of(trained)
    assert len(body) > 0x110000  # else the old hash would be that of nothing
    assert metadata["sshs_model_hash"] == sha256(body)
    training = {k: v for k, v in header_of(trained)[0]["__metadata__"].items() if k.startswith("ss_")}
    assert metadata["sshs_legacy_hash"] == sha256(save(load_file(trained), training)[0x100000:0x110000])[:8]


# --- Civitai -----------------------------------------------------------------------------------------------------------


def test_civitais_autov3_is_what_the_file_says_of_itself(trained: Path) -> None:
    """AutoV1: 64 KiB at 1 MiB; AutoV2: the whole file; AutoV3: the file without its header, so that edits of metadata keep it."""
    data, (header, body) = trained.read_bytes(), header_of(trained)
    autov1, autov2, autov3 = sha256(data[0x100000:0x110000])[:8], sha256(data)[:10], sha256(body)[:12]
    assert header["__metadata__"]["sshs_model_hash"].startswith(autov3)
    assert len({autov1, autov2, autov3}) == 3
    other = trained.with_name("edited.safetensors")
    save_file(load_file(trained), other, {**header["__metadata__"], "modelspec.title": "Another"})
    assert sha256(header_of(other)[1])[:12] == autov3 and sha256(other.read_bytes())[:10] != autov2


# --- ComfyUI and modelspec -----------------------------------------------------------------------------------------------


def test_comfyuis_metadata_view_reads_the_header(trained: Path) -> None:
    """utils.safetensors_header gives up on headers of more than a mebibyte; the route sends __metadata__ on as JSON."""
    with trained.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length <= 1024 * 1024
        metadata = json.loads(file.read(length))["__metadata__"]
    assert json.loads(json.dumps(metadata))["modelspec.trigger_phrase"] == "a cat"


def test_modelspec_has_its_required_fields_in_their_forms(trained: Path) -> None:
    spec = {
        key.removeprefix("modelspec."): value
        for key, value in header_of(trained)[0]["__metadata__"].items()
        if key.startswith("modelspec.")
    }
    assert {"sai_model_spec", "architecture", "implementation", "title"} <= spec.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", spec["sai_model_spec"])
    assert re.fullmatch(r"[a-z0-9-]+/lora", spec["architecture"])
    assert re.fullmatch(r"\d+x\d+", spec["resolution"]) and re.fullmatch(r"\d+,\d+", spec["timestep_range"])
    assert datetime.fromisoformat(spec["date"])
    head, _, data = spec["thumbnail"].partition(",")
    assert re.fullmatch(r"data:image/(png|jpeg|webp|gif);base64", head)
    with Image.open(BytesIO(base64.b64decode(data, validate=True))) as image:
        assert image.size == (640, 30) and image.get_format_mimetype() == head[5:-7]


# --- a dataset of the command line -----------------------------------------------------------------------------------------


def test_a_run_without_a_dataset_file_tells_its_dataset_in_keys_of_their_own(
    workshop: Workshop, tmp_path: Path
) -> None:
    for name, colour in (("train/3_blue cat", "blue"), ("regular/1_cat", "green")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    words = workshop.arguments(tmp_path, "--network_train_unet_only", max_train_steps=1)
    at = words.index("--dataset_config")
    words[at : at + 2] = ["--train_data_dir", str(tmp_path / "train"), "--reg_data_dir", str(tmp_path / "regular")]
    words += ["--resolution", "64", "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--flip_aug"]
    words += ["--shuffle_caption", "--keep_tokens", "1", "--color_aug", "--enable_bucket", "--bucket_no_upscale"]
    words += ["--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--random_crop"]
    assert main(words) == 0
    metadata = webui_metadata(tmp_path / "lora.safetensors")
    expected = {
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "4",
        "ss_resolution": "(64, 64)",
        "ss_color_aug": "True",
        "ss_flip_aug": "True",
        "ss_random_crop": "True",
        "ss_shuffle_caption": "True",
        "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "True",
        "ss_min_bucket_reso": "32",
        "ss_max_bucket_reso": "128",
        "ss_keep_tokens": "1",
        "ss_dataset_dirs": {"3_blue cat": {"n_repeats": 3, "img_count": 2}},
        "ss_reg_dataset_dirs": {"1_cat": {"n_repeats": 1, "img_count": 2}},
        "ss_tag_frequency": {"3_blue cat": {"blue cat": 2}},
        "ss_bucket_info": {"buckets": {"0": {"resolution": [64, 64], "count": 12}}, "mean_img_ar_error": 0.0},
        "ss_num_train_images": "6",
        "ss_num_reg_images": "6",
    }
    assert {key: metadata.get(key) for key in expected} == expected and "ss_datasets" not in metadata
