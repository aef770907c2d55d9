#!/usr/bin/env python3
"""Make images from a checkpoint and any number of LoRA files, as the trainer's previews are made.

    python tools/generate.py --ckpt_path sd3.5_medium.safetensors --lora_weights my_lora.safetensors --prompt "a zorp on a beach" --output_dir images
    python tools/generate.py --ckpt_path sd3.5_medium.safetensors --from_file prompts.txt --output_dir images

A file of prompts has the form of --sample_prompts (.txt, .toml or .json), each prompt with its own size, seed and so on; the options here
are for --prompt. The text encoders are loaded one after another and freed before the image model is loaded. The LoRAs are merged
into the weights, LyCORIS and diffusers files too. The PNG files hold the prompt and its settings. The same seed gives the
same image as a preview.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from library.data.prompts import PreviewPrompt
from library.flow.samplers import SAMPLERS
from library.memory.apply import MemorySettings, apply_memory_optimizations
from library.memory.block_swap import swap_limit
from library.memory.quantization import quantize
from library.monitoring.previews import Previewer, PreviewSettings
from library.sd3.checkpoint import ModelFiles, locate_parts
from library.sd3.conditioning import ContextSizes, TextEncoding, TextSettings, missing_encoder_notes, to_context
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.models import load_mmdit, load_vae, mmdit_problems, shapes_of, vae_problems
from library.sd3.pos_embed import LATENT_AND_PATCH
from library.sd3.text_encoder_manager import (
    ENCODERS,
    EncoderPlacement,
    TextEncoderManager,
    WeightChange,
    parse_t5_dtype,
)
from library.sd3.tokenizers import load_tokenizers
from library.sd3.vae import denormalize
from networks.lora_file import LoraFile, read_lora
from networks.lora_sd3 import TEXT_ENCODER_PREFIXES, layers_by_name
from networks.merging import merge_layers
from networks.parameter_groups import parts_of
from networks.weight_files import listed
from tools.generate_options import make_parser, prompts_from
from tools.lora_files import DTYPES, run_tool
from tools.low_rank import device_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    dtype: torch.dtype
    t5_device: torch.device
    t5_dtype: str | None = None  # as --t5xxl_dtype
    fp8: bool = False
    blocks_to_swap: int = 0
    float32_vae: bool = False


def main(arguments: list[str] | None = None) -> int:
    chosen = make_parser(__doc__).parse_args(arguments)

    def work() -> int:
        logging.getLogger("library.monitoring.previews").setLevel("WARNING")  # it names files before they are moved
        multipliers = chosen.lora_multipliers or [1.0] * len(chosen.lora_weights)
        if len(multipliers) != len(chosen.lora_weights):
            raise UserError(
                f"--lora_multipliers has {len(multipliers)} values for {len(chosen.lora_weights)} files in --lora_weights."
            )
        device = device_from(chosen.device)
        machine = Machine(
            device,
            DTYPES[chosen.dtype] if chosen.dtype else torch.float32 if device.type == "cpu" else torch.bfloat16,
            device_from(chosen.t5xxl_device) if chosen.t5xxl_device else device,
            chosen.t5xxl_dtype,
            chosen.fp8_base,
            chosen.blocks_to_swap,
            chosen.no_half_vae,
        )
        files = locate_parts(chosen.ckpt_path, chosen.clip_l, chosen.clip_g, chosen.t5xxl, chosen.vae)
        prompts = prompts_from(chosen)
        check_models(files, prompts, machine.blocks_to_swap)
        loras = [(read_lora(path), multiplier) for path, multiplier in zip(chosen.lora_weights, multipliers)]
        check_loras(loras, files)
        text = TextSettings(chosen.t5xxl_max_token_length, chosen.apply_lg_attn_mask, chosen.apply_t5_attn_mask)
        rows = encode_texts(files, loras, prompts, text, machine, chosen.tokenizer_cache_dir)
        make_images(files, loras, prompts, rows, text, machine, chosen.output_dir, SAMPLERS[chosen.sampler])
        return 0

    return run_tool(work)


# --- checks ------------------------------------------------------------------------------------------------------------


def check_models(files: ModelFiles, prompts: Sequence[PreviewPrompt], blocks_to_swap: int) -> None:
    """UserError where parts are missing or damaged, or an image or the blocks to swap are more than the model has."""
    problems = mmdit_problems(files.mmdit)
    if files.vae is None:
        problems.append(f"{files.mmdit.path} holds no VAE. Give one with --vae.")
    else:
        problems += vae_problems(files.vae)
    if not problems:
        config = MMDiTConfig.from_shapes(shapes_of(files.mmdit))
        most, table = swap_limit(config.depth), config.pos_embed_max_size * LATENT_AND_PATCH
        if not 0 <= blocks_to_swap <= most:
            problems.append(f"--blocks_to_swap {blocks_to_swap} is not within 0 to {most}, which this model can swap.")
        large = sorted({f"{p.width}x{p.height}" for p in prompts if max(p.width, p.height) > table})
        if large:
            problems.append(f"Images of {', '.join(large)} are larger than the model can place, {table} pixels a side.")
    if problems:
        raise UserError(problems)
    for note in missing_encoder_notes(files):
        logger.warning(note)


def check_loras(loras: Sequence[tuple[LoraFile, float]], files: ModelFiles) -> None:
    """UserError for a LoRA of no part of SD3; a warning for that of an encoder that is missing."""
    present = {prefix for prefix, part in zip(TEXT_ENCODER_PREFIXES, files.encoders().values()) if part is not None}
    for lora, _ in loras:
        strange = [name for name in lora.layers if not name.startswith(("lora_unet_", *TEXT_ENCODER_PREFIXES))]
        if strange:
            raise UserError(f"{lora.path} has LoRAs for parts that SD3 lacks: {listed(strange)}.")
        for prefix in sorted(parts_of(lora.layers) - present - {"lora_unet_"}):
            logger.warning(
                "%s has a LoRA for the text encoder %s, which is missing: it is left out.", lora.path, prefix
            )


# --- the work ----------------------------------------------------------------------------------------------------------


def merge_loras(
    loras: Sequence[tuple[LoraFile, float]], encoders: Sequence[nn.Module | None], mmdit: MMDiT | None
) -> None:
    """Merge each file's layers into those models that have them."""
    layers = layers_by_name(encoders, mmdit)
    present = tuple(parts_of(layers))
    for lora, multiplier in loras:
        mine = {name: tensors for name, tensors in lora.layers.items() if name.startswith(present)}
        merge_layers(mine, layers, multiplier, str(lora.path))


def encode_texts(
    files: ModelFiles,
    loras: Sequence[tuple[LoraFile, float]],
    prompts: Sequence[PreviewPrompt],
    settings: TextSettings,
    machine: Machine,
    tokenizer_cache: Path | None,
) -> dict[str, dict[str, Tensor]]:
    """What the encoders say about each text. One encoder is in memory at a time, and none at the end."""
    present = [name for name, part in files.encoders().items() if part is not None]
    t5_dtype, t5_format = parse_t5_dtype(machine.t5_dtype, machine.dtype)
    placement = EncoderPlacement(
        machine.device,
        machine.dtype,
        machine.t5_device,
        t5_dtype,
        t5_format,
        quantize=partial(quantize, within=lambda path: True),
        change={name: _encoder_change(index, loras) for index, name in enumerate(ENCODERS)} if loras else {},
    )
    stage = TextEncoderManager(files, load_tokenizers(tokenizer_cache, files.mmdit.path, present), settings, placement)
    texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)))
    return dict(zip(texts, stage.precompute(texts, present, batch_size=1)))


def _encoder_change(index: int, loras: Sequence[tuple[LoraFile, float]]) -> WeightChange:
    def apply(model: nn.Module) -> None:
        merge_loras(loras, [model if other == index else None for other in range(len(ENCODERS))], None)

    return WeightChange(apply, "")


def load_denoiser(files: ModelFiles, loras: Sequence[tuple[LoraFile, float]], machine: Machine) -> MMDiT:
    swapped = machine.blocks_to_swap > 0
    first = torch.device("cpu") if swapped or machine.fp8 else machine.device
    logger.info("Loading the MMDiT from %s", files.mmdit.path)
    model = load_mmdit(files.mmdit, first, machine.dtype)
    merge_loras(loras, [], model)
    quantization = "fp8" if machine.fp8 else None
    apply_memory_optimizations(model, MemorySettings(machine.blocks_to_swap, quantization=quantization), machine.device)
    return model


def make_images(
    files: ModelFiles,
    loras: Sequence[tuple[LoraFile, float]],
    prompts: Sequence[PreviewPrompt],
    rows: Mapping[str, Mapping[str, Tensor]],
    text: TextSettings,
    machine: Machine,
    folder: Path,
    sampler: str,
) -> list[Path]:
    """Write the images to `folder`, numbered on from those that are there, and return their paths."""
    assert files.vae is not None
    model = load_denoiser(files, loras, machine)
    vae = load_vae(files.vae, machine.device, torch.float32 if machine.float32_vae else machine.dtype)
    sizes = ContextSizes.from_files(files, text.t5_tokens)

    def conditioned(prompt: PreviewPrompt, words: str) -> tuple[Tensor, Tensor]:
        return to_context(TextEncoding.stack([rows[words]]), sizes, machine.device, machine.dtype)

    def predict(x: Tensor, timesteps: Tensor, conditioning: tuple[Tensor, Tensor]) -> Tensor:
        return model(x, timesteps, *conditioning)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(denormalize(latents))

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, prompt in enumerate(prompts, 1):
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as temporary:
            settings = PreviewSettings(Path(temporary), "image", sampler)
            maker = Previewer([prompt], settings, conditioned, predict, decode, machine.device)
            made = maker.make("", [model])
            if not made:
                raise UserError(f"{folder}: the image cannot be written. Is the disk full?")
            path = free_path(folder)
            os.replace(made[0].path, path)
        paths.append(path)
        print(f"{path} ({number} of {len(prompts)})", flush=True)
    return paths


def free_path(folder: Path) -> Path:
    """The next number that no image in the folder has."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    return folder / f"{max(numbers, default=0) + 1:05d}.png"


if __name__ == "__main__":
    sys.exit(main())
