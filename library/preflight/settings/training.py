"""The loop and what drives it."""

from __future__ import annotations

import argparse
import os

import torch

from library.data.loader import LoaderSettings, preserves
from library.distributed.launch import ShardingOptions
from library.flow.loss import LossSettings
from library.flow.timesteps import FlowSettings
from library.preflight.inspector import Files
from library.preflight.plan import RunPlan
from library.training.callback_settings import (
    TrackingSettings,
)
from library.training.optimization import OptimizationSettings
from library.training.precision import Precision
from library.training.runtime import RuntimeSettings
from library.training.schedulers import SchedulerSettings
from library.training.step import StepSettings


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


def sharding_options(args: argparse.Namespace) -> ShardingOptions:
    return ShardingOptions(
        deepspeed=args.deepspeed,
        zero_stage=args.zero_stage,
        offload_param_device=args.offload_param_device,
        blocks_to_swap=args.blocks_to_swap,
        memory_plan=args.memory_plan,
        torch_compile=args.torch_compile,
        scale_weight_norms=args.scale_weight_norms,
        network_module=args.network_module,
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


def optimization_settings(
    args: argparse.Namespace, plan: RunPlan[Files], shard_optimizer: bool, precision: Precision
) -> OptimizationSettings:
    return OptimizationSettings(
        optimizer_type=args.optimizer_type,
        learning_rate=args.learning_rate,
        optimizer_args=args.optimizer_args,
        scheduler=scheduler_settings(args, plan.length.max_steps),
        ema_decay=args.ema_decay or None,
        shard_optimizer=shard_optimizer,
        scale_loss=precision.scale_loss,
    )


def step_settings(
    args: argparse.Namespace, plan: RunPlan[Files], trains_conditioning: bool, is_sharded: bool
) -> StepSettings:
    """trains_conditioning: text encoders have adapters. is_sharded: the processes share the denoiser's weights."""
    datasets = (*plan.index.training, *plan.index.validation)
    any_preserved = any(preserves(subset) for dataset in datasets for subset in dataset.settings.subsets)
    return StepSettings(
        accumulation=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        seed=plan.seed,
        flow=flow_settings(args),
        loss=loss_settings(args),
        trains_conditioning=trains_conditioning,
        base_on_all_ranks=is_sharded and any_preserved,
    )


def loader_settings(args: argparse.Namespace, plan: RunPlan[Files], rank: int, device: torch.device) -> LoaderSettings:
    return LoaderSettings(
        seed=plan.seed,
        steps_per_epoch=plan.length.steps_per_epoch,
        accumulation=args.gradient_accumulation_steps,
        max_train_steps=plan.length.max_steps,
        rank=rank,
        workers=min(args.max_data_loader_n_workers, (os.cpu_count() or 1) - 1),
        pin_memory=device.type == "cuda",
        persistent=args.persistent_data_loader_workers,
        skip_bad_images=args.skip_bad_images,
    )


def runtime_settings(args: argparse.Namespace, tracking: TrackingSettings) -> RuntimeSettings:
    return RuntimeSettings(
        mixed_precision=args.mixed_precision,
        full_fp16=args.full_fp16,
        full_bf16=args.full_bf16,
        accumulation=args.gradient_accumulation_steps,
        timeout_minutes=args.ddp_timeout,
        trackers=tracking.names,
        log_folder=tracking.folder,
        sharding=sharding_options(args),
    )
