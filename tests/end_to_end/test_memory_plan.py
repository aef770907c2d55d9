"""`--memory_plan auto`, `--vram` and `--blocks_to_swap auto`, at the sizes of the released models and in real runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from library.common.errors import UserError
from library.options.resolve import resolve_options
from sd3_train_network import Sd3NetworkTrainer, main
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, train
from tests.sd3.real_sizes import hollow_checkpoint

CACHED = ("--cache_latents", "--cache_text_encoder_outputs", UNET)


def planned(workshop: Workshop, folder: Path, kind: str, *more: str) -> tuple[Sd3NetworkTrainer, str]:
    """A trainer that has worked out a run of a released model at 1024 x 1024, and its table."""
    images = folder / "data" / "1_thing"
    images.mkdir(parents=True)
    Image.new("RGB", (1024, 1024)).save(images / "0.png")
    options = {
        "pretrained_model_name_or_path": hollow_checkpoint(folder / f"{kind}.safetensors", kind),
        "dataset_config": "",
        "train_data_dir": images.parent,
        "resolution": "1024,1024",
        "network_dim": 16,
        "tokenizer_cache_dir": workshop.model.with_name("tokenizers"),
        "mixed_precision": "bf16",
    }
    resolved = resolve_options(workshop.arguments(folder / "out", *CACHED, "--dry_run", *more, **options))
    trainer = Sd3NetworkTrainer(resolved.args, resolved.problems)
    trainer.start()
    trainer.prepare()
    assert trainer.prepared.memory is not None
    return trainer, trainer.prepared.memory.text()


@pytest.mark.parametrize(("kind", "vram"), [("sd35l", 8), ("sd35m", 4)])
def test_the_released_models_train_at_1024_on_small_cards(workshop: Workshop, tmp_path: Path, kind: str, vram: int):
    """SD3.5 Large under 8 GB, 3.5 Medium under 4 GB, reckoned from shapes; T5 does not fit and goes to the CPU."""
    trainer, text = planned(workshop, tmp_path, kind, "--memory_plan", "auto", "--vram", str(vram))
    args = trainer.args
    assert args.gradient_checkpointing and args.blocks_to_swap and args.t5xxl_device == "cpu"
    assert not args.fp8_base  # exact levers are enough
    sizes = {
        title.strip(): float(size) for title, size in re.findall(r"^  (.+?) {2,}([\d.]+) GiB$", text, re.MULTILINE)
    }
    assert 0.5 * vram < sizes["training step"] <= vram - 0.5
    assert sizes["pinned host memory"] <= (16 if kind == "sd35l" else 5)
    assert f"--blocks_to_swap {args.blocks_to_swap}" in text and "--t5xxl_device cpu" in text


def test_blocks_to_swap_auto_takes_the_fewest_and_leaves_all_else_as_given(workshop: Workshop, tmp_path: Path):
    trainer, text = planned(
        workshop, tmp_path, "sd35m", "--blocks_to_swap", "auto", "--gradient_checkpointing", "--vram", "6"
    )
    blocks = trainer.args.blocks_to_swap
    assert 0 < blocks < 22 and trainer.args.gradient_checkpointing_blocks is None
    step = float(re.search(r"training step +([\d.]+) GiB", text)[1])
    base = float(re.search(r"base weights +([\d.]+) GiB", text)[1])
    room = float(re.search(r"([\d.]+) GiB can be used", text)[1])
    assert step <= room < step + 2 * base / (24 - blocks)  # one block fewer would not do


def test_where_nothing_fits_the_least_is_told_before_any_model_is_loaded(workshop: Workshop, tmp_path: Path):
    with pytest.raises(UserError) as told:
        train(workshop, tmp_path, *CACHED, memory_plan="auto", vram=0.501)
    (problem,) = told.value.problems
    assert "No choice of memory options fits" in problem and "--vram 0.501" in problem and "The least: " in problem
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_run_trains_under_its_own_plan(workshop: Workshop, tmp_path: Path, caplog):
    """A tiny model under a card that is smaller still: the plan is used, written down and changes no weight."""
    caplog.set_level("INFO")
    plain = train(workshop, tmp_path / "plain", *CACHED)
    run = train(workshop, tmp_path / "planned", *CACHED, memory_plan="auto", vram=0.512)
    args = run.trainer.args
    assert args.gradient_checkpointing or args.blocks_to_swap or args.fp8_base
    assert "Memory plan for" in caplog.text and "Chosen: " in caplog.text
    if not args.fp8_base:
        assert all((run.weights()[key] - tensor).abs().max() < 1e-5 for key, tensor in plain.weights().items())


def test_a_dry_run_prints_the_plan(workshop: Workshop, tmp_path: Path, capsys):
    assert main(workshop.arguments(tmp_path, *CACHED, "--dry_run", memory_plan="auto", vram=8)) == 0
    assert "Chosen: no memory option is needed" in capsys.readouterr().out


def test_trained_encoders_and_live_images_are_counted(workshop: Workshop, tmp_path: Path, capsys):
    assert main(workshop.arguments(tmp_path, "--dry_run", memory_plan="auto", vram=8)) == 0
    text = capsys.readouterr().out
    assert "images encoded in a step" in text and "text encoders, VAE" in text


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("networks.lora_sd3", ("use_dora=True",)), ("lycoris.kohya", ("algo=loha",)), ("lycoris.kohya", ("algo=full",))],
)
def test_every_kind_of_network_is_reckoned_with_or_refused(
    workshop: Workshop, tmp_path: Path, capsys, module: str, arguments: tuple[str, ...]
):
    words = [*CACHED, "--dry_run", "--network_args", *arguments]
    code = main(workshop.arguments(tmp_path, *words, memory_plan="auto", vram=8, network_module=module))
    said = capsys.readouterr()
    if "algo=full" in arguments:  # it copies the base model's weights while it is made
        assert code == 2 and "can't reckon with this network" in said.err
    else:
        assert code == 0 and "LoRA, optimizer, averages" in said.out
