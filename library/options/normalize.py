"""Values that other values imply, so that the rest of the program looks at one option for one thing."""

from __future__ import annotations

import argparse

from library.options.groups.monitoring import WORKING_SAMPLERS
from library.options.table import OPTIONS


def normalize_options(args: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """A new Namespace with what the options imply filled in, and what the user is to be told of it. `args` is left alone."""
    args = argparse.Namespace(**vars(args))
    _drop_empty(args)
    if args.caption_extention is not None:
        args.caption_extension = args.caption_extention
    if args.caption_extension:
        args.caption_extension = "." + args.caption_extension.removeprefix(".")
    args.cache_latents = args.cache_latents or args.cache_latents_to_disk
    args.cache_text_encoder_outputs = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    args.fp8_base = args.fp8_base or args.fp8_base_unet
    args.optimizer_type = args.optimizer_type or _legacy_optimizer(args)
    if args.log_with is None and args.logging_dir:
        args.log_with = "tensorboard"
    return args, [*_network_module(args), *_sampler(args), *_never(args)]


def _drop_empty(args: argparse.Namespace) -> None:
    """An empty text or list means not given, wherever None does."""
    for option in OPTIONS:
        if option.default is None and getattr(args, option.dest) in ("", []):
            setattr(args, option.dest, None)


def _legacy_optimizer(args: argparse.Namespace) -> str:
    if args.use_8bit_adam:
        return "AdamW8bit"
    return "Lion" if args.use_lion_optimizer else "AdamW"


def _network_module(args: argparse.Namespace) -> list[str]:
    if args.network_module != "networks.lora":
        return []
    args.network_module = "networks.lora_sd3"
    return ["--network_module networks.lora is networks.lora_sd3 for Stable Diffusion 3; that one is used."]


def _sampler(args: argparse.Namespace) -> list[str]:
    """The default, ddim, means Euler without a word; so do the other names of older models, with one."""
    name = args.sample_sampler
    if name in WORKING_SAMPLERS:
        return []
    args.sample_sampler = "euler"
    if name == "ddim":
        return []
    return [
        f"--sample_sampler {name} is for older models; previews use euler. The others that work are heun and dpmsolver++."
    ]


def _never(args: argparse.Namespace) -> list[str]:
    """0 or less turns an interval off, as in sd-scripts."""
    notes = []
    for option in OPTIONS:
        interval = getattr(args, option.dest)
        if option.zero_is_off and interval is not None and interval <= 0:
            setattr(args, option.dest, None)
            notes.append(f"--{option.dest} {interval} turns it off: intervals count from 1.")
    return notes
