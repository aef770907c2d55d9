"""Files, and what they say about the run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.dataset import IndexedDataset
from library.options.values import (
    metadata_options,
    modelspec_options,
)
from library.preflight.inspector import Files
from library.preflight.plan import RunPlan
from library.preflight.run_length import initial_progress
from library.preflight.settings.plan import length_settings, state_options
from library.saving.checkpoints import SavingSettings
from library.saving.dataset_facts import facts_of_datasets
from library.saving.lora_files import SAVE_DTYPES, LoraFileSettings
from library.saving.metadata import FamilyFacts, RunFacts
from library.saving.modelspec import ModelSpec, thumbnail_url
from library.saving.names import OutputNames, SaveSchedule, epochs_between_saves
from library.saving.restore import StartSettings
from library.saving.run_facts import NetworkFacts, TrainingFacts, model_spec, training_facts
from library.saving.state import SavedState
from library.training.optimization import Optimization
from networks.network import Network
from networks.network_layer import NetworkLayer

if TYPE_CHECKING:
    from accelerate import Accelerator


def lora_file_settings(args: argparse.Namespace) -> LoraFileSettings:
    return LoraFileSettings(
        dtype=SAVE_DTYPES.get(args.save_precision or ""),
        format=args.save_format,
        ema_beside=args.ema_save == "beside",
    )


def saving_settings(args: argparse.Namespace, epochs: int) -> SavingSettings:
    """When and what a run of so many epochs saves."""
    every_epochs = epochs_between_saves(args.save_every_n_epochs, args.save_n_epoch_ratio, epochs)
    return SavingSettings(
        names=OutputNames(Path(args.output_dir), args.output_name, args.save_model_as or "safetensors"),
        schedule=SaveSchedule(every_epochs, args.save_every_n_steps, args.save_every_n_minutes),
        epochs=epochs,
        save_state=args.save_state,
        save_state_at_end=args.save_state_on_train_end,
        keep_epochs=args.save_last_n_epochs,
        keep_epoch_states=args.save_last_n_epochs_state,
        keep_steps=args.save_last_n_steps,
        keep_step_states=args.save_last_n_steps_state,
    )


def network_facts(args: argparse.Namespace, layers: Mapping[str, NetworkLayer]) -> NetworkFacts:
    """Rank and alpha for the metadata."""
    arguments = args.network_args or []
    if args.dim_from_weights:
        return NetworkFacts.of_layers(layers, arguments)
    return NetworkFacts.of_options(args.network_dim, args.network_alpha, arguments)


def spec_settings(args: argparse.Namespace, kind: str, datasets: Sequence[IndexedDataset]) -> ModelSpec:
    """The facts of the modelspec keys. kind: the base model's."""
    timesteps = None
    if args.min_timestep is not None or args.max_timestep is not None:
        timesteps = args.min_timestep or 0, 1000 if args.max_timestep is None else args.max_timestep
    extra = {
        "thumbnail": thumbnail_url(args.metadata_thumbnail) if args.metadata_thumbnail else None,
        **modelspec_options(args),
    }
    return model_spec(kind, args.metadata_title or args.output_name or "LoRA", datasets, timesteps, extra)


def run_facts(
    args: argparse.Namespace,
    plan: RunPlan[Files],
    family: FamilyFacts,
    network: Network,
    optimization: Optimization,
    accelerator: Accelerator,
) -> RunFacts:
    """What the metadata of LoRA files says about the run."""
    optimizer = optimization.optimizer
    schedule = optimizer.forced_schedule or args.lr_scheduler_type or args.lr_scheduler
    training = TrainingFacts(
        unet_lr=plan.rates.unet or None,
        text_encoder_lr=list(plan.rates.text_encoders) if any(plan.rates.text_encoders) else None,
        num_batches_per_epoch=plan.training.batches_per_epoch,
        num_epochs=plan.length.epochs,
        max_train_steps=plan.length.max_steps,
        lr_scheduler=None if optimizer.is_schedule_free else schedule,
        optimizer=optimizer.name_for_metadata,
        mixed_precision=accelerator.mixed_precision,
        seed=plan.seed,
        num_processes=accelerator.num_processes,
        base_weights=[Path(path).name for path in args.base_weights or ()] or None,
        base_weights_multiplier=args.base_weights_multiplier,
    )
    batches_per_step = None if args.dataset_config else accelerator.num_processes * args.gradient_accumulation_steps
    datasets = facts_of_datasets(plan.index, batches_per_step)
    layers = network_facts(args, network.layers)
    facts = training_facts(metadata_options(args), family, layers, training, datasets, time.time())
    return RunFacts(facts, spec_settings(args, family.kind, plan.index.training), family, args.no_metadata)


def start_settings(args: argparse.Namespace, plan: RunPlan[Files], state: SavedState | None) -> StartSettings:
    length = length_settings(args)
    return StartSettings(
        state=state,
        start=initial_progress(length, plan.length),
        max_steps=None if length.sets_start else plan.length.max_steps,
        options=state_options(args, plan),
        resume=args.resume,
        folder=args.output_dir,
    )
