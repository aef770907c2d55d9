"""From the command line's Namespace to the frozen settings of the packages below. `args` goes no further.

One function for each settings class, in the order of the layers; `planned_options` is the only way in which options change
after parsing, and it returns a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from library.caching.latents import LatentCacheSettings
from library.caching.text import TextCacheSettings
from library.data.command_line import CommandLineData
from library.data.records import IndexedDataset, dataset_fingerprint
from library.distributed.launch import AcceleratorSettings, ShardingOptions
from library.flow.loss import LossSettings
from library.flow.timesteps import FlowSettings
from library.memory.apply import MemorySettings
from library.memory.checkpointing import CheckpointSettings
from library.memory.estimator.table import MemoryPlan
from library.options.values import determining_options, modelspec_options
from library.preflight.dataset import DataSettings
from library.preflight.disk_space import OptimizerSettings, OutputSettings
from library.preflight.inspector import Files
from library.preflight.memory import PlannerSettings
from library.preflight.memory_profile import ProfileSettings
from library.preflight.network import NetworkSettings
from library.preflight.plan import PlanSettings, RateSettings, ResumeCheck, RunPlan
from library.preflight.run_length import LengthSettings
from library.preflight.sd3_inspector import Sd3Settings
from library.saving.checkpoints import SavingSettings
from library.saving.hub import HubSettings
from library.saving.lora_files import SAVE_DTYPES, LoraFileSettings
from library.saving.modelspec import ModelSpec, thumbnail_url
from library.saving.names import OutputNames, SaveSchedule, epochs_between_saves
from library.saving.resume import ResumeSettings
from library.saving.run_facts import NetworkFacts, model_spec
from library.saving.text_encoders import encoders_to_save
from library.training.precision import Precision
from library.training.schedulers import SchedulerSettings
from networks.network_layer import NetworkLayer

LEFT_TO_THE_PLANNER = ("fp8_base", "fp8_base_unet", "t5xxl_device")  # --memory_plan chooses them


Item = TypeVar("Item")


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


def accelerator_settings(
    args: argparse.Namespace, precision: Precision, trackers: tuple[str, ...], log_folder: Path | None
) -> AcceleratorSettings:
    return AcceleratorSettings(
        mixed_precision=precision.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        trackers=trackers,
        project_dir=log_folder,
        timeout_minutes=args.ddp_timeout,
    )


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
    return [(path, strengths[index] if index < len(strengths) else 1.0) for index, path in enumerate(paths)]


def checkpoint_settings(args: argparse.Namespace) -> CheckpointSettings | None:
    blocks = args.gradient_checkpointing_blocks
    if not (args.gradient_checkpointing or args.cpu_offload_checkpointing or args.selective_checkpointing or blocks):
        return None
    return CheckpointSettings(blocks, args.selective_checkpointing, args.cpu_offload_checkpointing)


def memory_settings(
    args: argparse.Namespace, blocks_to_swap: int, sharded: bool = False, several_sizes: bool = False
) -> MemorySettings:
    """How the denoiser is to spare memory. blocks_to_swap: as many as the model has to give. several_sizes: of images, in the run."""
    return MemorySettings(
        blocks_to_swap=blocks_to_swap,
        checkpointing=checkpoint_settings(args),
        compile_backend=args.dynamo_backend if args.torch_compile else None,
        dynamic_shapes=several_sizes,
        quantization="fp8" if args.fp8_base else args.base_quantization,
        fp8_matmul=args.fp8_matmul,
        recompute_pointwise=args.lean_activations,
        sharded=sharded,
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


# --- the plan of a run -------------------------------------------------------------------------------------------


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """All that `plan_run` takes of the options."""
    return PlanSettings(
        data=data_settings(args),
        network=network_settings(args),
        rates=rate_settings(args),
        optimizer=optimizer_settings(args),
        scheduler=scheduler_settings(args, total_steps=0),
        length=length_settings(args),
        output=output_settings(args),
        flow=flow_settings(args),
        loss=loss_settings(args),
        has_model=bool(args.pretrained_model_name_or_path),
        number_bytes=2 if args.full_fp16 or args.full_bf16 else 4,
        latents=latent_cache_settings(args) if args.cache_latents else None,
        texts=text_cache_settings(args) if args.cache_text_encoder_outputs else None,
        sample_prompts=args.sample_prompts,
        thumbnail=args.metadata_thumbnail,
        seed=args.seed,
        resume=ResumeCheck(
            determining_options(args), LEFT_TO_THE_PLANNER if args.memory_plan else (), not args.resume_from_huggingface
        ),
    )


def data_settings(args: argparse.Namespace) -> DataSettings:
    return DataSettings(
        dataset_config=args.dataset_config,
        command_line=CommandLineData.from_options(vars(args)),
        cache_dir=path_or_none(args.cache_dir),
        skip_bad_images=args.skip_bad_images,
        masked_loss=args.masked_loss,
        caches_latents=args.cache_latents,
        caches_text=args.cache_text_encoder_outputs,
        text_cache_variants=args.text_cache_variants,
    )


def network_settings(args: argparse.Namespace) -> NetworkSettings:
    return NetworkSettings(
        module=args.network_module,
        args=_tuple(args.network_args),
        dim=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout,
        weights=args.network_weights,
        dim_from_weights=args.dim_from_weights,
        save_format=args.save_format,
    )


def rate_settings(args: argparse.Namespace) -> RateSettings:
    return RateSettings(
        args.learning_rate,
        args.unet_lr,
        _tuple(args.text_encoder_lr),
        args.network_train_unet_only,
        args.network_train_text_encoder_only,
    )


def optimizer_settings(args: argparse.Namespace) -> OptimizerSettings:
    return OptimizerSettings(args.optimizer_type, args.learning_rate, _tuple(args.optimizer_args))


def length_settings(args: argparse.Namespace) -> LengthSettings:
    return LengthSettings(
        accumulation=args.gradient_accumulation_steps,
        max_train_steps=args.max_train_steps,
        max_train_epochs=args.max_train_epochs,
        initial_step=args.initial_step,
        initial_epoch=args.initial_epoch,
        skip_until_initial_step=args.skip_until_initial_step,
    )


def output_settings(args: argparse.Namespace) -> OutputSettings:
    return OutputSettings(
        output_dir=args.output_dir,
        save_format=args.save_format,
        save_precision=args.save_precision,
        every_n_epochs=args.save_every_n_epochs,
        epoch_ratio=args.save_n_epoch_ratio,
        every_n_steps=args.save_every_n_steps,
        every_n_minutes=args.save_every_n_minutes,
        last_n_epochs=args.save_last_n_epochs,
        last_n_steps=args.save_last_n_steps,
        last_n_epochs_state=args.save_last_n_epochs_state,
        last_n_steps_state=args.save_last_n_steps_state,
        saves_states=bool(args.save_state),
        saves_final_state=bool(args.save_state_on_train_end),
        keeps_average=bool(args.ema_decay),
        saves_average_beside=args.ema_save == "beside",
    )


def sd3_settings(args: argparse.Namespace) -> Sd3Settings:
    return Sd3Settings(
        checkpoint=args.pretrained_model_name_or_path,
        clip_l=args.clip_l,
        clip_g=args.clip_g,
        t5xxl=args.t5xxl,
        vae=args.vae,
        tokenizer_cache_dir=args.tokenizer_cache_dir,
        t5_tokens=args.t5xxl_max_token_length,
        t5_device=args.t5xxl_device,
        t5_dtype=args.t5xxl_dtype,
        fp8_t5=args.fp8_base and not args.fp8_base_unet,
        whole_vae=args.no_half_vae,
        scaled_pos_embed=args.enable_scaled_pos_embed,
        compile_backend=args.dynamo_backend if args.torch_compile else None,
        fp8_matmul=args.fp8_matmul,
        train_unet_only=args.network_train_unet_only,
        scale_weight_norms=args.scale_weight_norms,
        base_weights=tuple(args.base_weights or ()),
        saved_encoders=tuple(encoders_to_save(args.save_clip, args.save_t5xxl)),
    )


# --- caches ------------------------------------------------------------------------------------------------------


def text_cache_settings(
    args: argparse.Namespace, fingerprint: str = "", seed: int = 0, bytes_each: int = 0
) -> TextCacheSettings:
    """fingerprint: of the encoders. bytes_each: of the outputs for one caption."""
    return TextCacheSettings(
        fingerprint=fingerprint,
        variants=args.text_cache_variants,
        seed=seed,
        on_disk=args.cache_text_encoder_outputs_to_disk,
        cache_dir=path_or_none(args.cache_dir),
        trust=args.skip_cache_check,
        bytes_each=bytes_each,
    )


def latent_cache_settings(args: argparse.Namespace, fingerprint: str = "") -> LatentCacheSettings:
    """fingerprint: of the VAE."""
    return LatentCacheSettings(
        fingerprint=fingerprint,
        on_disk=args.cache_latents_to_disk,
        cache_dir=path_or_none(args.cache_dir),
        trust=args.skip_cache_check,
        skip_bad_images=args.skip_bad_images,
    )


# --- the memory planner ------------------------------------------------------------------------------------------


def planner_settings(args: argparse.Namespace) -> PlannerSettings:
    number = args.blocks_to_swap if args.blocks_to_swap != "auto" else None
    return PlannerSettings(
        profile=profile_settings(args),
        plans_all=args.memory_plan == "auto",
        plans_swap=args.blocks_to_swap == "auto",
        blocks_to_swap=number,
        checkpointing=checkpoint_settings(args),
        lean_activations=args.lean_activations,
        compiles=args.torch_compile,
        quantization="fp8" if args.fp8_base else args.base_quantization,
        vram=args.vram,
    )


def profile_settings(args: argparse.Namespace) -> ProfileSettings:
    return ProfileSettings(
        network=network_settings(args),
        optimizer=optimizer_settings(args),
        caches_latents=args.cache_latents,
        caches_text=args.cache_text_encoder_outputs,
        keeps_average=bool(args.ema_decay),
        checkpoints_encoders=args.gradient_checkpointing,
        highvram=args.highvram,
        vae_batch_size=args.vae_batch_size,
        text_encoder_batch_size=args.text_encoder_batch_size or 1,
        for_gpu=args.vram is not None,
    )


def planned_options(args: argparse.Namespace, plan: MemoryPlan) -> argparse.Namespace:
    """A copy of the options with the planner's choice in them, as if it had been on the command line."""
    chosen, values = plan.options, dict(vars(args))
    values["blocks_to_swap"] = chosen.swap or None
    values["gradient_checkpointing"] = chosen.policy != "none"
    values["gradient_checkpointing_blocks"] = chosen.checkpointed if 0 < chosen.checkpointed < plan.depth else None
    values["selective_checkpointing"] = chosen.policy == "selective"
    values["cpu_offload_checkpointing"] = chosen.offload
    values["lean_activations"] = chosen.recompute_pointwise
    if chosen.quantization == "fp8" and not args.fp8_base:
        values["fp8_base"] = values["fp8_base_unet"] = True
    if plan.t5_on_cpu:
        values["t5xxl_device"] = "cpu"
    return argparse.Namespace(**values)


# --- saving and resuming -----------------------------------------------------------------------------------------


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


def resume_settings(args: argparse.Namespace) -> ResumeSettings:
    return ResumeSettings(
        args.resume, bool(args.resume_from_huggingface), args.output_dir, args.output_name, args.huggingface_token
    )


def state_options(args: argparse.Namespace, plan: RunPlan[Files]) -> dict[str, object]:
    """What a state records, and a resumed run must have alike: the options that determine the weights, the seed, the dataset."""
    return {**determining_options(args), "seed": plan.seed, "dataset": dataset_fingerprint(plan.index.training)}


def _tuple(values: Iterable[Item] | None) -> tuple[Item, ...] | None:
    return None if values is None else tuple(values)
