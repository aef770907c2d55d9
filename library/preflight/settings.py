"""From the command line's Namespace to the small frozen settings that the rooms below take. `args` goes no further."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from library.flow.loss import LossSettings
from library.flow.timesteps import FlowSettings
from library.memory.apply import MemorySettings
from library.memory.checkpointing import CheckpointSettings
from library.monitoring.trackers import TrackingSettings, chosen_trackers, log_folder
from library.options.table import OPTIONS
from library.saving.hub import HubSettings
from library.training.schedulers import SchedulerSettings
from library.training.train_progress import TrainProgress


def path_or_none(text: str | None) -> Path | None:
    return Path(text) if text else None


def flow_settings(args: argparse.Namespace) -> FlowSettings:
    return FlowSettings(
        weighting_scheme=args.weighting_scheme,
        timestep_sampling=args.timestep_sampling,
        loss_weighting=args.loss_weighting,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
        training_shift=args.training_shift,
        resolution_shift=args.resolution_shift,
        min_timestep=args.min_timestep or 0,
        max_timestep=1000 if args.max_timestep is None else args.max_timestep,
    )


def loss_settings(args: argparse.Namespace) -> LossSettings:
    return LossSettings(args.loss_type, args.huber_schedule, args.huber_c, args.huber_scale)


def hub_settings(args: argparse.Namespace) -> HubSettings | None:
    """Where saved files are uploaded to; None where nowhere."""
    if not args.huggingface_repo_id:
        return None
    return HubSettings(
        repo_id=args.huggingface_repo_id,
        repo_type=args.huggingface_repo_type or "model",
        path_in_repo=args.huggingface_path_in_repo or "",
        private=args.huggingface_repo_visibility != "public",
        token=args.huggingface_token,
        in_background=args.async_upload,
    )


def base_weight_files(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The paths of --base_weights with their strengths: 1.0 for those that have none."""
    paths, strengths = args.base_weights or [], args.base_weights_multiplier or []
    return [(path, strengths[place] if place < len(strengths) else 1.0) for place, path in enumerate(paths)]


def checkpoint_settings(args: argparse.Namespace) -> CheckpointSettings | None:
    blocks = args.gradient_checkpointing_blocks
    if not (args.gradient_checkpointing or args.cpu_offload_checkpointing or args.selective_checkpointing or blocks):
        return None
    return CheckpointSettings(blocks, args.selective_checkpointing, args.cpu_offload_checkpointing)


def memory_settings(
    args: argparse.Namespace, blocks_to_swap: int, stays: bool = False, several_sizes: bool = False
) -> MemorySettings:
    """How the denoiser is to spare memory. blocks_to_swap: as many as the model has to give. several_sizes: of images, in the run."""
    return MemorySettings(
        blocks_to_swap=blocks_to_swap,
        checkpointing=checkpoint_settings(args),
        compile_backend=args.dynamo_backend if args.torch_compile else None,
        dynamic_shapes=several_sizes,
        quantisation="fp8" if args.fp8_base else args.base_quantization,
        fp8_products=args.fp8_matmul,
        lean=args.lean_activations,
        stays=stays,
    )


def scheduler_settings(args: argparse.Namespace, total_steps: int) -> SchedulerSettings:
    return SchedulerSettings(
        total_steps,
        args.lr_scheduler,
        args.lr_scheduler_type or "",
        tuple(args.lr_scheduler_args or ()),
        args.lr_warmup_steps,
        args.lr_decay_steps,
        args.lr_scheduler_num_cycles,
        args.lr_scheduler_power,
        args.lr_scheduler_timescale,
        args.lr_scheduler_min_lr_ratio,
    )


@dataclass(frozen=True)
class RunLength:
    """How long the run is, in optimizer steps."""

    steps_per_epoch: int
    max_steps: int
    epochs: int


def run_length(
    batches_per_epoch: int, accumulation: int, max_train_steps: int, max_train_epochs: int | None
) -> RunLength:
    """batches_per_epoch: micro-batches of one process. An epoch's last optimizer step may be made of fewer of them."""
    steps_per_epoch = math.ceil(batches_per_epoch / accumulation)
    max_steps = max_train_epochs * steps_per_epoch if max_train_epochs else max_train_steps
    return RunLength(steps_per_epoch, max_steps, math.ceil(max_steps / steps_per_epoch))


def given_start(args: argparse.Namespace, length: RunLength) -> TrainProgress | None:
    """Where --initial_step or --initial_epoch (counted from 1) put the first step; None where neither is given.

    The epoch that the step lies in begins with its first batch, or with --skip_until_initial_step at that step's own.
    """
    if args.initial_step is None and args.initial_epoch is None:
        return None
    first_of_epoch = ((args.initial_epoch or 1) - 1) * length.steps_per_epoch
    step = first_of_epoch if args.initial_step is None else args.initial_step
    epoch, steps_in_epoch = divmod(step, length.steps_per_epoch)
    batch = steps_in_epoch * args.gradient_accumulation_steps if args.skip_until_initial_step else 0
    return TrainProgress(epoch, batch, step)


def start_problems(args: argparse.Namespace, length: RunLength) -> list[str]:
    """A start that lies at the end or beyond it."""
    start = given_start(args, length)
    if start is None or start.step < length.max_steps:
        return []
    name = "initial_epoch" if args.initial_step is None else "initial_step"
    return [
        f"--{name} {getattr(args, name)} starts at step {start.step}, but the run ends at step {length.max_steps}. "
        "Lower it, or raise --max_train_steps or --max_train_epochs."
    ]


def memory_advice(args: argparse.Namespace, whole_copies: bool = False) -> list[str]:
    """Options that the run does not use yet and that lower its peak, in order of what they cost.

    whole_copies: there are several processes, each with the whole model.
    """
    steps = [
        (args.memory_plan is None, "--memory_plan auto (chooses among the options below what fits)"),
        (
            not args.cache_text_encoder_outputs and args.network_train_unet_only,
            "--cache_text_encoder_outputs (frees the text encoders)",
        ),
        (not args.cache_latents, "--cache_latents (frees the VAE)"),
        (args.mixed_precision == "no", "--mixed_precision bf16"),
        (not args.gradient_checkpointing, "--gradient_checkpointing (a third to a half slower)"),
        (
            (args.train_batch_size or 1) > 1,
            "a smaller batch_size, with --gradient_accumulation_steps to make up for it",
        ),
        (not args.blocks_to_swap, "--blocks_to_swap 12, or as many more as it takes"),
        (not args.fp8_base and not args.base_quantization, "--fp8_base_unet (base weights in eight bits)"),
        (args.optimizer_type == "AdamW", "--optimizer_type AdamW8bit"),
        (not args.cpu_offload_checkpointing and not args.blocks_to_swap, "--cpu_offload_checkpointing"),
        (whole_copies, "docs/configs/fsdp2.yaml for accelerate launch (shares the model out over the devices)"),
        (True, "a lower resolution"),
    ]
    return [text for useful, text in steps if useful]


def tracking_settings(args: argparse.Namespace) -> TrackingSettings:
    secrets = [getattr(args, option.dest, None) for option in OPTIONS if option.secret]
    return TrackingSettings(
        chosen_trackers(args.log_with, args.logging_dir),
        log_folder(args.logging_dir, args.log_prefix),
        args.log_tracker_name or "network_train",
        args.wandb_run_name,
        Path(args.log_tracker_config) if args.log_tracker_config else None,
        args.wandb_api_key,
        tuple(secret for secret in secrets if secret),
    )
