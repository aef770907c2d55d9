"""What runs between steps, and when."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from library.flow.samplers import SAMPLERS
from library.flow.timesteps import validation_timesteps
from library.options.values import (
    again_command,
    resume_command,
    secret_values,
    shared_options,
    split_options,
)
from library.preflight.inspector import Files
from library.preflight.plan import RunPlan
from library.preflight.settings import path_or_none
from library.preflight.settings.training import flow_settings
from library.training.callback_settings import (
    CallbackSettings,
    MetricsSettings,
    PreviewSchedule,
    PreviewSettings,
    ReportSettings,
    TrackingSettings,
    ValidationSettings,
    chosen_trackers,
    log_folder,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


def tracking_settings(args: argparse.Namespace) -> TrackingSettings:
    """Which trackers log what, and where."""
    return TrackingSettings(
        chosen_trackers(args.log_with, args.logging_dir),
        log_folder(args.logging_dir, args.log_prefix),
        args.log_tracker_name or "network_train",
        args.wandb_run_name,
        path_or_none(args.log_tracker_config),
        args.wandb_api_key,
        secret_values(args),
    )


def metrics_settings(args: argparse.Namespace, plan: RunPlan[Files], tracking: TrackingSettings) -> MetricsSettings:
    return MetricsSettings(
        file=Path(args.output_dir) / f"{args.output_name or 'last'}.metrics.jsonl",
        max_steps=plan.length.max_steps,
        tracking=tracking,
        steps_per_epoch=plan.length.steps_per_epoch,
        max_nonfinite_steps=args.max_nonfinite_steps,
        has_validation=plan.validation is not None,
        config=shared_options(args) if args.log_config else None,
    )


def validation_settings(args: argparse.Namespace, plan: RunPlan[Files]) -> ValidationSettings:
    return ValidationSettings(
        timesteps=validation_timesteps(flow_settings(args)),
        seed=plan.seed if args.validation_seed is None else args.validation_seed,
        batches=0 if plan.validation is None else plan.validation.batches_per_epoch,
        max_batches=args.max_validation_steps,
        every_steps=args.validate_every_n_steps,
        every_epochs=args.validate_every_n_epochs,
    )


def preview_settings(args: argparse.Namespace, plan: RunPlan[Files], rank: int, world_size: int) -> PreviewSettings:
    sampler = SAMPLERS.get(args.sample_sampler, "euler")
    return PreviewSettings(
        Path(args.output_dir), args.output_name or "", sampler, rank, world_size, plan.batch_pixels()
    )


def preview_schedule(args: argparse.Namespace) -> PreviewSchedule | None:
    """When previews are drawn; None where never."""
    if not (args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs):
        return None
    return PreviewSchedule(
        sheet=Path(args.output_dir) / f"{args.output_name or 'last'}_contact_sheet.png",
        at_first=args.sample_at_first,
        every_steps=args.sample_every_n_steps,
        every_epochs=args.sample_every_n_epochs,
    )


def report_settings(args: argparse.Namespace, processes: int) -> ReportSettings | None:
    """None where there is no report."""
    if not args.report:
        return None
    changed, defaults = split_options(args)
    return ReportSettings(
        path=Path(args.output_dir) / "report.html",
        title=args.output_name or "LoRA training",
        network=args.network_module,
        changed=changed,
        defaults=defaults,
        resume_command=resume_command(args, processes),
        again_command=again_command(args, processes),
        states=f"{glob.escape(args.output_name or '')}*-state",
    )


def callback_settings(
    args: argparse.Namespace, plan: RunPlan[Files], tracking: TrackingSettings, accelerator: Accelerator
) -> CallbackSettings:
    return CallbackSettings(
        accumulation=args.gradient_accumulation_steps,
        max_steps=plan.length.max_steps,
        epochs=plan.length.epochs,
        metrics=metrics_settings(args, plan, tracking),
        validation=validation_settings(args, plan),
        previews=preview_settings(args, plan, accelerator.process_index, accelerator.num_processes),
        preview_schedule=preview_schedule(args),
        report=report_settings(args, accelerator.num_processes),
    )
