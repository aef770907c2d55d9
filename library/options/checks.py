"""What is wrong with options as such: conflicts that show without a model, a dataset or a device.

Not here, since the rooms that know the formulas say it: timesteps, loss, schedule, optimizer, learning rates, the dataset.
"""

from __future__ import annotations

import argparse

from library.options.limits import limit_problems
from library.options.option import Kind
from library.options.table import BY_NAME, OPTIONS

REQUIRED = {
    "pretrained_model_name_or_path": "the base model's file",
    "output_dir": "the folder for the results",
    "network_module": "what to train, for example networks.lora_sd3",
}
# option -> the options of which at least one must be given with it
NEEDS = {
    "dim_from_weights": ("network_weights",),
    "base_weights_multiplier": ("base_weights",),
    "sample_every_n_steps": ("sample_prompts",),
    "sample_every_n_epochs": ("sample_prompts",),
    "sample_at_first": ("sample_prompts",),
    "text_cache_variants": ("cache_text_encoder_outputs",),
    "output_config": ("config_file",),
    "resume_from_huggingface": ("resume",),
    "save_state_to_huggingface": ("huggingface_repo_id",),
    "fp8_matmul": ("fp8_base",),
}
# the same, where the option merely does nothing without the others
USELESS_WITHOUT = {
    "vram": ("memory_plan", "blocks_to_swap"),
    "ema_save": ("ema_decay",),
    "conditioning_data_dir": ("masked_loss",),
    "save_last_n_epochs": ("save_every_n_epochs", "save_n_epoch_ratio"),
    "save_last_n_steps": ("save_every_n_steps",),
    "save_last_n_epochs_state": ("save_state",),
    "save_last_n_steps_state": ("save_state",),
    "skip_until_initial_step": ("initial_epoch", "initial_step", "resume"),
    "dynamo_backend": ("torch_compile",),
    "validation_seed": ("validation_split", "dataset_config"),
    "log_config": ("log_with",),
    "log_tracker_name": ("log_with",),
    "log_tracker_config": ("log_with",),
    "log_prefix": ("logging_dir",),
    "wandb_run_name": ("log_with",),
    "wandb_api_key": ("log_with",),
    "huggingface_repo_type": ("huggingface_repo_id", "resume_from_huggingface"),
    "huggingface_path_in_repo": ("huggingface_repo_id",),
    "huggingface_repo_visibility": ("huggingface_repo_id",),
    "async_upload": ("huggingface_repo_id",),
    "zero_stage": ("deepspeed",),
    "offload_param_device": ("deepspeed",),
}
# the same, where another option takes its place
USELESS_WITH = {
    "text_encoder_lr": "network_train_unet_only",
    "unet_lr": "network_train_text_encoder_only",
    "lr_scheduler": "lr_scheduler_type",
    "network_dim": "dim_from_weights",
    "network_alpha": "dim_from_weights",
}
EXCLUDES = (
    ("blocks_to_swap", "cpu_offload_checkpointing", "both keep things in host memory and would wait for each other"),
    ("lean_activations", "torch_compile", "the compiler chooses by itself what to recompute"),
    ("fp8_base", "base_quantization", "both say how the frozen weights are kept"),
    ("full_fp16", "full_bf16", "weights have one number format"),
    ("use_8bit_adam", "use_lion_optimizer", "there is one optimizer"),
    ("initial_epoch", "initial_step", "both say where to start"),
    ("save_every_n_epochs", "save_n_epoch_ratio", "both say how often to save"),
    ("cache_latents", "color_aug", "a cached latent has one colour"),
    ("cache_latents", "random_crop", "a cached latent is one crop"),
)


def check_options(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Problems and warnings of normalised options, one or two sentences each."""
    problems = [
        *_required(args),
        *_refused(args),
        *_needs(args),
        *_excludes(args),
        *_precision(args),
        *_names(args),
        *limit_problems(args),
    ]
    return problems, [*_without_effect(args), *_useless(args)]


def is_given(args: argparse.Namespace, dest: str) -> bool:
    """Whether the option's value differs from its default."""
    return bool(getattr(args, dest) != BY_NAME[dest].default)


def _required(args: argparse.Namespace) -> list[str]:
    return [f"--{dest} is missing: {what}." for dest, what in REQUIRED.items() if not getattr(args, dest)]


def _refused(args: argparse.Namespace) -> list[str]:
    refused = [option for option in OPTIONS if option.kind is Kind.REFUSED and is_given(args, option.dest)]
    return [f"{option.flag} is refused: {option.reason}." for option in refused]


def _without_effect(args: argparse.Namespace) -> list[str]:
    given = [option for option in OPTIONS if option.kind is Kind.NO_EFFECT and is_given(args, option.dest)]
    return [f"{option.flag} changes nothing: {option.reason}." for option in given]


def _needs(args: argparse.Namespace) -> list[str]:
    return [
        f"--{dest} needs {_either(others)}."
        for dest, others in NEEDS.items()
        if is_given(args, dest) and not any(is_given(args, other) for other in others)
    ]


def _useless(args: argparse.Namespace) -> list[str]:
    lacking = [
        f"--{dest} changes nothing without {_either(others)}."
        for dest, others in USELESS_WITHOUT.items()
        if is_given(args, dest) and not any(is_given(args, other) for other in others)
    ]
    replaced = [
        f"--{dest} changes nothing with --{other}."
        for dest, other in USELESS_WITH.items()
        if is_given(args, dest) and is_given(args, other)
    ]
    return lacking + replaced + _nothing_left_to_be_lean(args)


def _nothing_left_to_be_lean(args: argparse.Namespace) -> list[str]:
    checkpointed = args.gradient_checkpointing or args.selective_checkpointing or args.cpu_offload_checkpointing
    if not args.lean_activations or not checkpointed or args.gradient_checkpointing_blocks or args.memory_plan:
        return []
    return [
        "--lean_activations changes nothing where all blocks are checkpointed: --gradient_checkpointing_blocks leaves some to it."
    ]


def _either(dests: tuple[str, ...]) -> str:
    return " or ".join(f"--{dest}" for dest in dests)


def _excludes(args: argparse.Namespace) -> list[str]:
    return [
        f"--{one} and --{other} can't be combined: {reason}. Leave one out."
        for one, other, reason in EXCLUDES
        if is_given(args, one) and is_given(args, other)
    ]


def _precision(args: argparse.Namespace) -> list[str]:
    return [
        f"--full_{name} needs --mixed_precision {name}, but that is {args.mixed_precision}."
        for name in ("fp16", "bf16")
        if getattr(args, f"full_{name}") and args.mixed_precision != name
    ]


def _names(args: argparse.Namespace) -> list[str]:
    """Options that would contradict a name, a count or a folder given elsewhere."""
    problems = []
    for legacy, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        both = args.use_8bit_adam and args.use_lion_optimizer  # told by EXCLUDES
        if not both and getattr(args, legacy) and args.optimizer_type.lower() != name.lower():
            problems.append(f"--{legacy} means {name}, but --optimizer_type is {args.optimizer_type}. Leave one out.")
    if args.log_with in ("tensorboard", "all") and not args.logging_dir:
        problems.append(f"--log_with {args.log_with} needs --logging_dir, the folder for the logs.")
    merged, strengths = len(args.base_weights or ()), len(args.base_weights_multiplier or ())
    if 0 < merged < strengths:
        problems.append(f"--base_weights_multiplier has {strengths} values for {merged} --base_weights.")
    if args.resume_from_huggingface and args.resume == "auto":
        problems.append("--resume auto looks in --output_dir; with --resume_from_huggingface name the state.")
    if args.output_name and {"/", "\\"} & set(args.output_name):
        problems.append(f"--output_name {args.output_name} must be a name without folders; those go to --output_dir.")
    return problems
