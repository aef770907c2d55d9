"""generate.py: the images that the trainer's previews are, with any LoRA files merged in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from networks.diffusers_layout import to_diffusers
from tests.sd3.tiny import (
    PREFIXES,
    save_single_file,
    save_tokenizers,
    tiny_checkpoint,
    tiny_clip,
    tiny_model_folder,
    tiny_parts,
)
from tests.tools.loras import lora_for_checkpoint, run_script, write_lora
from tools import merge_lora
from tools.generate import main

QUICK = ["--prompt", "a red cat", "--width", "64", "--height", "96", "--steps", "3", "--seed", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), "5-medium")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def make(base: Path, folder: Path, *more: object) -> np.ndarray:
    """The first image that the tool makes into an empty folder."""
    assert main(["--ckpt_path", str(base), "--output_dir", str(folder), *QUICK, *map(str, more)]) == 0
    return pixels(folder / "00001.png")


def test_the_real_command_makes_images_with_their_settings_in_them(base: Path, tmp_path: Path):
    more = ["--images", 2, "--negative_prompt", "a dog", "--sampler", "dpmpp_2m", "--cfg_scale", 3, "--no_half_vae"]
    ran = run_script("generate", "--ckpt_path", base, "--output_dir", tmp_path, *QUICK, *more)
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001.png", "00002.png"]
    text = Image.open(tmp_path / "00002.png").info["parameters"]
    for piece in ("a red cat", "Negative prompt: a dog", "Sampler: dpmpp_2m", "CFG scale: 3.0", "Seed: 5", "64x96"):
        assert piece in text
    assert (pixels(tmp_path / "00001.png") != pixels(tmp_path / "00002.png")).any()


def test_images_without_a_seed_differ_and_say_which_seed_they_had(base: Path, tmp_path: Path):
    at = QUICK.index("--seed")
    words = [*QUICK[:at], *QUICK[at + 2 :], "--images", "2", "--steps", "1"]
    assert main(["--ckpt_path", str(base), "--output_dir", str(tmp_path), *words]) == 0
    files = sorted(tmp_path.glob("*.png"))
    assert (pixels(files[0]) != pixels(files[1])).any()
    seeds = [int(Image.open(file).info["parameters"].partition("Seed: ")[2].split(",")[0]) for file in files]
    assert seeds[1] == seeds[0] + 1
    again = [*QUICK[: at + 1], str(seeds[0]), *QUICK[at + 2 :], "--steps", "1"]
    assert main(["--ckpt_path", str(base), "--output_dir", str(tmp_path / "again"), *again]) == 0
    assert (pixels(files[0]) == pixels(tmp_path / "again" / "00001.png")).all()


def test_loras_of_all_parts_do_what_a_merged_checkpoint_does(base: Path, tmp_path: Path):
    encoders = [tiny_clip("clip_l"), tiny_clip("clip_g")]
    first = write_lora(tmp_path / "a.safetensors", lora_for_checkpoint(encoders=encoders))
    second = write_lora(tmp_path / "b.safetensors", to_diffusers(lora_for_checkpoint(seed=9)))
    merged = tmp_path / "merged.safetensors"
    words = ["--models", first, second, "--ratios", 0.6, -0.5, "--base_model", base, "--save_to", merged]
    assert merge_lora.main([str(word) for word in words]) == 0
    tokenizers = ["--tokenizer_cache_dir", base.parent / "tokenizers"]
    expected = make(merged, tmp_path / "merged", *tokenizers)
    actual = make(base, tmp_path / "live", "--lora_weights", first, second, "--lora_multipliers", 0.6, -0.5)
    assert abs(actual - expected).max() <= 1
    assert abs(actual - make(base, tmp_path / "plain")).max() > 20


def test_a_file_of_prompts_numbers_on_and_encoders_may_be_separate(base: Path, tmp_path: Path):
    parts = tiny_parts("5-medium")
    plain = dict.fromkeys(PREFIXES, "")
    alone = save_single_file(tmp_path / "alone.safetensors", {"mmdit": parts["mmdit"], "vae": parts["vae"]})
    single = [
        save_single_file(tmp_path / f"{n}.safetensors", {n: parts[n]}, None, plain)
        for n in ("clip_l", "clip_g", "t5xxl")
    ]
    (tmp_path / "prompts.txt").write_text(
        "a red cat --w 64 --h 96 --s 3 --d 4 --l 5\na dog --w 64 --h 64 --s 2 --d 1\n", "utf-8"
    )
    save_tokenizers(tmp_path / "tokenizers")
    words = [
        "--ckpt_path",
        alone,
        "--clip_l",
        single[0],
        "--clip_g",
        single[1],
        "--t5xxl",
        single[2],
        "--device",
        "cpu",
    ]
    words += ["--from_file", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in words]) == 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [f"{n:05d}.png" for n in range(1, 5)]
    assert abs(pixels(tmp_path / "out" / "00001.png") - make(base, tmp_path / "whole")).max() <= 1


def test_memory_savers_change_the_image_little_or_not_at_all(base: Path, tmp_path: Path):
    deep = tiny_checkpoint(tmp_path / "deep.safetensors", "5-medium", depth=5)
    tokenizers = ["--tokenizer_cache_dir", base.parent / "tokenizers"]
    plain = make(deep, tmp_path / "plain", *tokenizers)
    assert abs(make(deep, tmp_path / "swapped", "--blocks_to_swap", 2, *tokenizers) - plain).max() <= 1
    fp8 = make(deep, tmp_path / "fp8", "--fp8_base", "--dtype", "bf16", "--t5xxl_dtype", "fp8", *tokenizers)
    assert 0 < abs(fp8 - plain).mean() < 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width", "70"], "--width 70: a multiple of 16"),
        (["--steps", "0"], "--steps 0 is not within"),
        (["--images", "0"], "--images must be 1 or more"),
        (["--flow_shift", "0"], "--flow_shift 0 must be above 0"),
        (["--seed", "-1"], "--seed -1 must be 0 or more"),
        (["--width", "4096"], "larger than the model can place, 192 pixels"),
        (["--lora_weights", "{lora}", "--lora_multipliers", "1", "2"], "has 2 values for 1 files"),
        (["--lora_weights", "{flux}"], "is no layer of this model"),
        (["--blocks_to_swap", "9"], "--blocks_to_swap 9 is not within 0 to 0"),
        (["--vae", "{lora}"], "a LoRA file, not a base model"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    words: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = lora_for_checkpoint()
    flux = {key.replace("joint_blocks", "double_blocks"): value for key, value in lora.items()}
    files = {
        "lora": write_lora(tmp_path / "lora.safetensors", lora),
        "flux": write_lora(tmp_path / "flux.safetensors", flux),
    }
    given = [word.format(**files) for word in words]
    assert main(["--ckpt_path", str(base), "--output_dir", str(tmp_path / "out"), *QUICK, *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
