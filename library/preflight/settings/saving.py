"""Files, and what they say about the run."""

from __future__ import annotations

import argparse
import glob
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.dataset import IndexedDataset
from library.options.values import (
    metadata_options,
    modelspec_options,
)
from library.preflight.inspector import Files, ModelInspector
from library.preflight.plan import RunPlan
from library.preflight.run_length import initial_progress
from library.preflight.settings import path_or_none
from library.preflight.settings.monitoring import preview_schedule
from library.preflight.settings.plan import length_settings, state_options
from library.saving.checkpoints import SavingSettings
from library.saving.dataset_facts import facts_of_datasets
from library.saving.finished import FinalOutputs
from library.saving.lora_files import SAVE_DTYPES, LoraFileSettings
from library.saving.metadata import FamilyFacts, RunFacts
from library.saving.modelspec import ModelSpec, thumbnail_url
from library.saving.names import OutputNames, SaveSchedule, epochs_between_saves
from library.saving.restore import StartSettings
from library.saving.run_facts import NetworkFacts, TrainingFacts, model_spec, training_facts
from library.saving.state import SavedState
from library.saving.text_encoders import encoders_to_save
from library.training.callback_settings import step_tag
from library.training.optimization import Optimization
from networks.network import Network
from networks.network_layer import NetworkLayer

if TYPE_CHECKING:
    from accelerate import Accelerator


def lora_file_settings(args: argparse.Namespace) -> LoraFileSettings:
    return LoraFileSettings(
        dtype=SAVE_DTYPES.get(args.save_precision or ""),
        format=args.save_format,
        cache_dir=path_or_none(args.cache_dir),
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


def final_outputs(args: argparse.Namespace, plan: RunPlan[Files], encoders: Sequence[str]) -> FinalOutputs:
    """What the run leaves at its end. encoders: those that the files of the model hold."""
    saving, length = saving_settings(args, plan.length.epochs), plan.length
    final = saving.names.final()
    schedule, ends_epoch = preview_schedule(args), length.max_steps == length.epochs * length.steps_per_epoch
    tag = None
    if schedule is not None and ends_epoch and schedule.epoch_is_due(length.epochs):
        tag = step_tag(length.max_steps, length.epochs)
    elif schedule is not None and schedule.step_is_due(length.max_steps):
        tag = step_tag(length.max_steps, None)
    name = f"{args.output_name}_" if args.output_name else ""
    saved = encoders_to_save(args.save_clip, args.save_t5xxl)
    return FinalOutputs(
        names=saving.names,
        max_steps=length.max_steps,
        lora_files=lora_file_settings(args).names_of(final, bool(args.ema_decay)),
        other_files=[
            final.with_name(f"{final.stem}_{encoder}.safetensors") for encoder in encoders if encoder in saved
        ],
        saves_state=saving.saves_final_state,
        previews=[f"sample/{glob.escape(name)}{tag}_{index:02d}_*.png" for index in range(len(plan.prompts))]
        if tag
        else (),
    )


def finished_lora(
    args: argparse.Namespace,
    plan: RunPlan[Files],
    state: SavedState | None,
    inspector: ModelInspector[Files],
    accelerator: Accelerator,
) -> Path | None:
    """The LoRA of a run that has nothing left to do: --resume of a finished one. None where there is something."""
    if state is None or length_settings(args).sets_start:
        return None
    return final_outputs(args, plan, inspector.present_encoders(plan.files)).finished_lora(state, accelerator)


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
