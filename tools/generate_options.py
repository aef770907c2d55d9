"""The options of tools/generate.py, and the images that they ask for."""

from __future__ import annotations

import argparse
import secrets
from dataclasses import replace
from pathlib import Path

from library.common.errors import UserError
from library.data.prompts import PreviewPrompt, read_prompts
from library.flow.samplers import SAMPLERS
from library.options.table import BY_NAME
from tools.lora_files import DTYPES, tool_parser

SIDE_MULTIPLE = 16


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = tool_parser(description)
    model = parser.add_argument_group("models")
    model.add_argument(
        "--ckpt_path",
        "--pretrained_model_name_or_path",
        type=Path,
        required=True,
        metavar="FILE",
        help="the checkpoint",
    )
    for name, what in (("clip_l", "CLIP-L"), ("clip_g", "CLIP-G"), ("t5xxl", "T5-XXL"), ("vae", "the VAE")):
        model.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"{what}, where the checkpoint lacks it")
    model.add_argument("--lora_weights", type=Path, nargs="+", default=[], metavar="FILE", help="LoRA files")
    model.add_argument(
        "--lora_multipliers", type=float, nargs="+", metavar="X", help="the strength of each, in this order; default: 1"
    )
    model.add_argument("--tokenizer_cache_dir", type=Path, metavar="DIR", help="where the tokenizers are or are kept")
    image = parser.add_argument_group("images")
    prompts = image.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="what to show")
    prompts.add_argument("--from_file", type=Path, metavar="FILE", help="a file of prompts, as for --sample_prompts")
    image.add_argument("--output_dir", type=Path, default=Path("images"), metavar="DIR", help="default: images")
    image.add_argument("--images", type=int, default=1, metavar="N", help="images of each prompt; default: 1")
    image.add_argument("--negative_prompt", default="", metavar="TEXT", help="what not to show")
    image.add_argument("--width", type=int, default=1024, help="in pixels, a multiple of 16; default: 1024")
    image.add_argument("--height", type=int, default=1024, help="in pixels, a multiple of 16; default: 1024")
    image.add_argument("--steps", type=int, default=30, help="default: 30")
    image.add_argument("--cfg_scale", type=float, default=5.0, help="how much the prompt counts, 1 is off; default: 5")
    image.add_argument("--seed", type=int, help="of the first image, the next ones count up; default: chosen at random")
    image.add_argument("--flow_shift", type=float, default=3.0, help="the shift of the noise schedule; default: 3")
    image.add_argument("--sampler", choices=sorted(SAMPLERS), default="euler", help="default: euler")
    memory = parser.add_argument_group("precision and memory")
    memory.add_argument("--device", help="cpu, cuda, cuda:1 …; default: cuda if there is one")
    memory.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of the models; default: bf16 on a GPU, float on the CPU"
    )
    memory.add_argument(
        "--t5xxl_dtype", choices=["fp32", "fp16", "bf16", "fp8", "int8", "nf4"], help="of T5; default: --dtype"
    )
    memory.add_argument("--t5xxl_device", help="where T5 works; default: --device")
    memory.add_argument(
        "--fp8_base", action="store_true", help="keep the image model's blocks in float8: half the memory"
    )
    memory.add_argument(
        "--blocks_to_swap", type=int, default=0, metavar="N", help="keep N blocks in the computer's memory"
    )
    memory.add_argument("--no_half_vae", action="store_true", help="the VAE in float32")
    memory.add_argument("--t5xxl_max_token_length", type=int, default=256, metavar="N", help="default: 256")
    memory.add_argument("--apply_lg_attn_mask", action="store_true", help="as in training")
    memory.add_argument("--apply_t5_attn_mask", action="store_true", help="as in training")
    return parser


def prompts_from(chosen: argparse.Namespace) -> list[PreviewPrompt]:
    """Every image to make. UserError where the values can't be."""
    if chosen.images < 1:
        raise UserError(f"--images must be 1 or more, not {chosen.images}.")
    if chosen.from_file is not None:
        prompts = read_prompts(
            chosen.from_file, SAMPLERS, [str(name) for name in BY_NAME["sample_sampler"].choices or ()]
        )
    else:
        problems = []
        for name in ("width", "height"):
            if getattr(chosen, name) < 64 or getattr(chosen, name) % SIDE_MULTIPLE:
                problems.append(
                    f"--{name} {getattr(chosen, name)}: a multiple of {SIDE_MULTIPLE}, 64 or more, is needed."
                )
        if not 1 <= chosen.steps <= 1000:
            problems.append(f"--steps {chosen.steps} is not within 1 to 1000.")
        if not chosen.flow_shift > 0:
            problems.append(f"--flow_shift {chosen.flow_shift:g} must be above 0.")
        if chosen.seed is not None and not 0 <= chosen.seed < 2**63:
            problems.append(f"--seed {chosen.seed} must be 0 or more, and below 2^63.")
        if problems:
            raise UserError(problems)
        prompts = [
            PreviewPrompt(
                chosen.prompt,
                chosen.negative_prompt,
                chosen.width,
                chosen.height,
                chosen.steps,
                chosen.cfg_scale,
                chosen.seed,
                chosen.flow_shift,
            )
        ]
    return [
        replace(prompt, seed=seed + number)
        for prompt in prompts
        for seed in [random_seed() if prompt.seed is None else prompt.seed]
        for number in range(chosen.images)
    ]


def random_seed() -> int:
    return secrets.randbelow(2**32)
