"""Bad input: one clear message that names everything, exit code 2, no traceback, before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.sd3.text_encoders import load_clip
from sd3_train_network import main
from tests.end_to_end.conftest import ROOT, Workshop, run_command


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for target in (
        "library.sd3.text_encoder_manager.load_clip",
        "library.sd3.text_encoder_manager.load_t5",
        "sd3_train_network.load_mmdit",
    ):
        monkeypatch.setattr(target, loaded)
    assert load_clip is not loaded


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_a_missing_model_file(workshop: Workshop, tmp_path: Path, capsys):
    told = complaint(workshop.arguments(tmp_path, pretrained_model_name_or_path=tmp_path / "no.safetensors"), capsys)
    assert "no.safetensors" in told


def test_a_file_of_another_model_is_named_for_what_it_is(workshop: Workshop, tmp_path: Path, capsys):
    path = tmp_path / "sdxl.safetensors"
    names = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    told = complaint(workshop.arguments(tmp_path, pretrained_model_name_or_path=path), capsys)
    assert "sdxl.safetensors" in told and "SDXL" in told


def test_a_truncated_file(workshop: Workshop, tmp_path: Path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(workshop.model.read_bytes()[:-1000])
    told = complaint(workshop.arguments(tmp_path, pretrained_model_name_or_path=path), capsys)
    assert "cut.safetensors" in told


def test_an_empty_dataset_folder(workshop: Workshop, tmp_path: Path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    dataset = tmp_path / "d.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {str(empty)!r}\n", encoding="utf-8"
    )
    told = complaint(workshop.arguments(tmp_path / "out", dataset_config=dataset), capsys)
    assert "empty" in told


def test_an_unknown_option_names_the_nearest(workshop: Workshop, tmp_path: Path, capsys):
    told = complaint(workshop.arguments(tmp_path, "--learning_rat", "1"), capsys)
    assert "--learning_rat" in told and "--learning_rate" in told


def test_an_output_dir_that_cannot_be_one(workshop: Workshop, tmp_path: Path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    told = complaint(workshop.arguments(file / "out"), capsys)
    assert str(file) in told


def test_every_problem_is_told_at_once_by_the_real_command(tmp_path: Path):
    """Options, model, dataset, network arguments, optimizer: five mistakes, five numbers."""
    dataset = tmp_path / "d.toml"
    dataset.write_text(
        "[general]\nresolutoin = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n", encoding="utf-8"
    )
    done = run_command(
        [
            *("--pretrained_model_name_or_path", str(tmp_path / "no.safetensors"), "--dataset_config", str(dataset)),
            *("--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora_sd3"),
            *("--optimizer_type", "AdamWW", "--min_timestep", "900", "--max_timestep", "100", "--full_fp16"),
        ]
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in ("no.safetensors", "resolutoin", "resolution", "AdamWW", "min_timestep", "full_fp16"):
        assert word in done.stderr, word


def test_the_message_is_the_last_thing_that_a_launched_command_prints(tmp_path: Path):
    """With the launcher's words of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = text[text.index("accelerate launch") :].split("sd3_train_network.py")[0].split()[2:]
    launcher = ("-m", "accelerate.commands.launch", *words)
    done = run_command(["--learning_rat", "1"], launcher, {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode != 0
    assert "--learning_rat" in done.stderr
    assert "Traceback" not in done.stderr and "CalledProcessError" not in done.stderr


def test_a_preview_prompt_file_with_a_mistake(workshop: Workshop, tmp_path: Path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w wide\n", encoding="utf-8")
    told = complaint(workshop.arguments(tmp_path, sample_prompts=prompts, sample_every_n_steps=2), capsys)
    assert "p.txt" in told and "line 1" in told


@pytest.mark.parametrize("words", [("--network_train_unet_only",), ("--text_encoder_lr", "0")])
def test_a_run_that_would_train_nothing(workshop: Workshop, tmp_path: Path, capsys, words):
    assert main(workshop.arguments(tmp_path, *words, unet_lr="0")) == 2
    assert "Nothing would be trained: the learning rate of every part is 0" in capsys.readouterr().err


def test_what_was_found_late_before_is_in_the_list(workshop: Workshop, tmp_path: Path, hub, monkeypatch, capsys):
    """Caches that cannot be written, chance that they would freeze, a full disk, a network that cannot be saved as asked, and a
    state on a Hub that cannot be reached: told together."""
    hub.shutdown()
    hub.server_close()
    (tmp_path / "file").write_text("x")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    words = workshop.arguments(
        tmp_path / "out",
        *("--color_aug", "--cache_latents_to_disk", "--cache_dir", str(tmp_path / "file" / "caches")),
        *("--resume", "me/lora/x-state", "--resume_from_huggingface"),
        *("--network_args", "use_dora=True", "--save_format", "both"),
    )
    told = complaint(words, capsys)
    for part in (
        "color_aug would be lost by --cache_latents",
        "caches: cache files cannot be written there (Not a directory)",
        "me/lora/x-state: the state cannot be downloaded",
        "this network is a DoRA, which diffusers does not read",
        "has 0.00 GiB free, and the run will need about 0.06 GiB",
    ):
        assert part in told, part
    assert [line[:2] for line in told.splitlines() if line[1:2] == "."] == [f"{number}." for number in range(1, 7)]


def test_weights_that_do_not_fit_the_network_are_told_before_models_are_loaded(
    workshop: Workshop, tmp_path: Path, capsys
):
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    path = tmp_path / "start.safetensors"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 128), f"{name}.lora_up.weight": torch.zeros(384, 4)}, path)
    told = complaint(
        workshop.arguments(tmp_path / "out", "--network_args", "verbose=maybe", network_weights=path), capsys
    )
    assert "verbose" in told  # a network that cannot be made is not compared
    told = complaint(workshop.arguments(tmp_path / "out", network_weights=path, network_dim=2), capsys)
    assert "start.safetensors" in told and "Give the same --network_dim" in told


def test_a_state_that_does_not_fit_is_told_before_models_are_loaded(workshop: Workshop, tmp_path: Path, capsys):
    folder = tmp_path / "lora-state"
    folder.mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    facts = {"position": {"epoch": 1, "batch": 0, "step": 7}, "options": {"network_dim": 4, "seed": 7}}
    (folder / "train_state.json").write_text(json.dumps(facts), encoding="utf-8")
    told = complaint(workshop.arguments(tmp_path / "out", resume=folder, network_dim=8), capsys)
    assert "options that shape the run have changed" in told and "network_dim: 4 -> 8" in told
    assert "the state is at step 7, and the run is to end at 6" in told
    assert "optimizer.pt is missing" in told


def test_of_a_state_on_the_hub_the_position_alone_is_fetched_before_the_checks(
    workshop: Workshop, tmp_path: Path, hub, capsys
):
    facts = {"position": {"epoch": 1, "batch": 0, "step": 6}, "options": {"network_dim": 4, "seed": 7}}
    hub.repos["me/lora"] = {"x-state/train_state.json": json.dumps(facts).encode(), "x-state/model.safetensors": b"w"}
    place = ("--resume", "me/lora/x-state", "--resume_from_huggingface")
    told = complaint(workshop.arguments(tmp_path, *place), capsys)
    assert "network_dim: 4 -> None" in told
    assert [path.name for path in (tmp_path / "hub_states" / "x-state").iterdir()] == ["train_state.json"]
    told = complaint(
        workshop.arguments(tmp_path, "--resume", "me/lora/none-state", "--resume_from_huggingface"), capsys
    )
    assert "the repository me/lora holds no folder none-state" in told


def test_tokenizers_that_are_missing_are_told_with_all_else(workshop: Workshop, tmp_path: Path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    model = tmp_path / "alone" / workshop.model.name
    model.parent.mkdir()
    shutil.copy(workshop.model, model)
    told = complaint(
        workshop.arguments(tmp_path / "out", pretrained_model_name_or_path=model, optimizer_type="AdamWW"), capsys
    )
    for part in ("AdamWW", "There is no tokenizer for clip_l", "no tokenizer for clip_g", "no tokenizer for t5xxl"):
        assert part in told, part


def test_a_tokenizer_of_another_model_is_refused(workshop: Workshop, tmp_path: Path, capsys):
    from transformers import CLIPTokenizer

    folder = tmp_path / "tokenizers"
    shutil.copytree(workshop.model.with_name("tokenizers"), folder)
    own = next(path for path in folder.iterdir() if path.name.startswith("openai"))
    larger = CLIPTokenizer.from_pretrained(str(own))
    larger.add_tokens([f"<word{number}>" for number in range(50)])
    larger.save_pretrained(str(own))
    told = complaint(workshop.arguments(tmp_path / "out", tokenizer_cache_dir=folder), capsys)
    assert "The tokenizer of clip_l has" in told and "--tokenizer_cache_dir" in told
