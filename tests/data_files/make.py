"""Make the files of an earlier commit that today's code must still read: training states, caches and LoRA files.

Run it in a checkout of that commit, with the folder to make:

    cd CHECKOUT && OMP_NUM_THREADS=1 PYTHONPATH=. python THIS_REPOSITORY/tests/data_files/make.py FOLDER

A training state knows the absolute paths of its images, so they are trained at WORK_FOLDER here and in the test.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open

from tests.sd3.tiny import save_single_file, save_tokenizers, tiny_parts

WORK_FOLDER = Path("/tmp/sd3_lora_states_of_an_earlier_commit")
IMAGE_SIZES = [(64, 64), (80, 64), (64, 96), (64, 64), (96, 64)]
STATE_STEP, LAST_STEP = 3, 6
FEW_LAYERS = (
    *("context_attn_dim=0", "context_mlp_dim=0", "context_mod_dim=0"),
    *("x_mlp_dim=0", "x_mod_dim=0", "train_block_indices=0"),
)
UNET = "--network_train_unet_only"
AUGMENTED = (
    *("--network_dropout", "0.1", "--shuffle_caption", "--caption_dropout_rate", "0.2", "--flip_aug"),
    *("--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--weighting_scheme", "logit_normal"),
)
STATES: dict[str, tuple[str, ...]] = {
    "adamw": (UNET, *AUGMENTED, "--network_args", *FEW_LAYERS),
    "ema_text_encoder": (
        *("--text_encoder_lr", "1e-3", "0", "0", "--unet_lr", "1e-3", "--ema_decay", "0.9"),
        *("--mixed_precision", "no", "--save_precision", "float", "--network_args", *FEW_LAYERS),
    ),
    "prodigy_plus": (
        *(UNET, "--optimizer_type", "ProdigyPlusScheduleFree", "--learning_rate", "1.0"),
        *("--network_args", *FEW_LAYERS),
    ),
    "dora": (UNET, "--optimizer_type", "Lion", "--network_args", "use_dora=True", *FEW_LAYERS),
}
LORAS: dict[str, tuple[str, ...]] = {
    "plain": (UNET, "--network_args", *FEW_LAYERS[:-1]),
    "split_qkv": (UNET, "--network_args", "split_qkv=True", *FEW_LAYERS),
    "dora": (UNET, "--network_args", "use_dora=True", *FEW_LAYERS),
    "diffusers": (UNET, "--save_format", "diffusers", "--network_args", *FEW_LAYERS[:-1]),
    "text_encoder": ("--text_encoder_lr", "1e-2", "0", "0", "--network_args", *FEW_LAYERS),
    "locon": (UNET, "--network_module", "lycoris.kohya", "--network_args", "algo=locon", "preset=attn-only"),
}
CACHED_IMAGES = ("0", "2")
CACHES = (
    "--t5xxl_max_token_length",
    "16",
    "--cache_latents_to_disk",
    "--cache_text_encoder_outputs_to_disk",
    UNET,
    "--flip_aug",
)
STILL = ("--learning_rate", "1e-9", "--max_train_steps", "1")


def make_model(folder: Path) -> Path:
    """A tiny SD3.5 checkpoint with its tokenizers, of numbers that every CPU and version of torch draws alike."""
    save_tokenizers(folder / "tokenizers")
    draws = np.random.default_rng(0)
    parts = tiny_parts("5-medium")
    for part in parts.values():
        for name, tensor in part.items():
            if not tensor.is_floating_point():
                continue
            noise = draws.uniform(-1, 1, tuple(tensor.shape))
            if name.endswith("weight") and tensor.dim() > 1 and "embedding" not in name and name != "shared.weight":
                noise *= 2.0 ** -round(float(np.log2(tensor[0].numel())) / 2 - 0.8)
            else:
                noise = noise / 4 + (1 if tensor.dim() == 1 and name.endswith("weight") else 0)
            part[name] = torch.from_numpy(noise).to(torch.float32)
    return save_single_file(folder / "model.safetensors", parts)


def make_images(folder: Path) -> None:
    """Small images with captions, in a folder whose name says the repeats."""
    images = folder / "2_cat"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(IMAGE_SIZES):
        corners = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a cat, number {number}, on grass", encoding="utf-8")


def words(model: Path, images: Path, output: Path, *more: str) -> list[str]:
    """The command line of a short run; later words win. The base model is read, not mapped: mapped weights are aligned otherwise, and
    a CPU sums matrix products of them in another order."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images)),
        *("--output_dir", str(output), "--output_name", "lora", "--network_module", "networks.lora_sd3"),
        *("--resolution", "64", "--enable_bucket", "--bucket_reso_steps", "32", "--caption_extension", ".txt"),
        *("--train_batch_size", "2", "--network_dim", "1", "--learning_rate", "1e-3", "--seed", "7"),
        *(
            "--max_train_steps",
            str(LAST_STEP),
            "--max_data_loader_n_workers",
            "0",
            "--no_report",
            "--disable_mmap_load_safetensors",
            *more,
        ),
    ]


def cache_run_words(model: Path, images: Path, output: Path) -> list[str]:
    return words(model, images, output, *CACHES, "--max_train_steps", "2", "--network_args", *FEW_LAYERS)


def lora_words(model: Path, images: Path, output: Path, name: str) -> list[str]:
    """The command line that made a LoRA file; its alpha and rate make the change large enough to see."""
    more = ("--network_dim", "2", "--network_alpha", "2", "--learning_rate", "0.05", "--max_train_steps", "2")
    return words(model, images, output, *more, *LORAS[name])


def losses(folder: Path) -> list[float]:
    lines = (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss/current"] for line in map(json.loads, lines) if "loss/current" in line]


def environment() -> dict[str, str]:
    """What decides the last bits of a result."""
    names = ("torch", "numpy", "transformers", "tokenizers", "prodigy-plus-schedule-free")
    return {
        **{name: version(name) for name in names},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor_name(),
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def work_folder(images: Path) -> Iterator[Path]:
    """WORK_FOLDER with a copy of the images, removed at the end; other processes wait for their turn."""
    from filelock import FileLock

    with FileLock(f"{WORK_FOLDER}.lock", timeout=250):
        shutil.rmtree(WORK_FOLDER, ignore_errors=True)
        shutil.copytree(images, WORK_FOLDER / "images")
        try:
            yield WORK_FOLDER / "images"
        finally:
            shutil.rmtree(WORK_FOLDER, ignore_errors=True)


def make(target: Path) -> None:
    import tempfile

    from sd3_train_network import main

    def run(arguments: list[str]) -> None:
        if main(arguments) != 0:
            raise SystemExit(f"failed: {' '.join(arguments)}")

    torch.set_num_threads(1)
    shutil.rmtree(target, ignore_errors=True)
    make_images(target / "images")
    facts: dict[str, object] = {"environment": environment()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        make_states(run, model, target, folder, facts)
        make_caches(run, model, target, folder, facts)
        make_loras(run, model, target, folder, facts)
    (target / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def make_states(run, model: Path, target: Path, folder: Path, facts: dict) -> None:
    """Each state in the middle of a run, the weights at its end and its losses."""
    facts["losses"] = {}
    for name, more in STATES.items():
        output = folder / name
        with work_folder(target / "images") as images:
            run(words(model, images, output, "--save_state", "--save_every_n_steps", str(STATE_STEP), *more))
        shutil.copytree(output / f"lora-step{STATE_STEP:08d}-state", target / "states" / name / "state")
        for file in ("lora.safetensors", "lora-ema.safetensors"):
            if (output / file).exists():
                shutil.copy(output / file, target / "states" / name / file)
        facts["losses"][name] = losses(output)


def make_caches(run, model: Path, target: Path, folder: Path, facts: dict) -> None:
    """The images with their cache files, and the losses of a run that read them."""
    (target / "cached_images" / "2_cat").mkdir(parents=True)
    for path in (target / "images" / "2_cat").iterdir():
        if path.stem in CACHED_IMAGES:
            shutil.copy(path, target / "cached_images" / "2_cat")
    run(cache_run_words(model, target / "cached_images", folder / "cached"))
    facts["losses_with_caches"] = losses(folder / "cached")


def make_loras(run, model: Path, target: Path, folder: Path, facts: dict) -> None:
    """LoRA files, and for each the first loss of a run that starts from it."""
    from tools.merge_lora import main as merge

    (target / "loras").mkdir()
    facts["loss_with"], facts["merged_change"] = {}, {}
    for name in LORAS:
        file = target / "loras" / f"{name}.safetensors"
        run(lora_words(model, target / "images", folder / name, name))
        shutil.copy(folder / name / "lora.safetensors", file)
        module = ("--network_module", "lycoris.kohya") if name == "locon" else ()
        start = ("--network_weights", str(file), "--dim_from_weights", UNET, *module, *STILL)
        run(words(model, target / "images", folder / f"{name}-start", *start))
        facts["loss_with"][name] = losses(folder / f"{name}-start")[0]
        merged = folder / f"{name}-merged.safetensors"
        if merge(["--models", str(file), "--base_model", str(model), "--save_to", str(merged)]) != 0:
            raise SystemExit(f"merging {file} failed")
        facts["merged_change"][name] = change_of(model, merged)
    run(words(model, target / "images", folder / "bare", UNET, *STILL))
    facts["loss_with"]["nothing"] = losses(folder / "bare")[0]


def change_of(model: Path, merged: Path) -> dict[str, float]:
    """The Frobenius norm of each changed tensor's difference, by key."""
    changes = {}
    before = load_file(model)
    with safe_open(merged, "pt") as after:
        for key in before:
            norm = (after.get_tensor(key).float() - before[key]).norm().item()
            if norm > 0:
                changes[key] = norm
    return changes


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
