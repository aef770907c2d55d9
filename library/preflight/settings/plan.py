"""What is worked out before any weight is read: the plan of the run, its caches, the choice of memory options.

`planned_options` is the only way in which options change after parsing, and it returns a copy."""

from __future__ import annotations

import argparse

from library.caching.latents import LatentCacheSettings
from library.caching.text import TextCacheSettings
from library.data.command_line import CommandLineData
from library.data.dataset import dataset_fingerprint
from library.memory.estimator.table import MemoryPlan
from library.options.values import (
    determining_options,
)
from library.preflight.dataset import DataSettings
from library.preflight.disk_space import OptimizerSettings, OutputSettings
from library.preflight.inspector import Files
from library.preflight.memory import PlannerSettings
from library.preflight.memory_profile import ProfileSettings
from library.preflight.plan import PlanSettings, RateSettings, ResumeCheck, RunPlan
from library.preflight.prepare import PrepareSettings
from library.preflight.run_length import LengthSettings
from library.preflight.settings import path_or_none, tuple_or_none as _tuple
from library.preflight.settings.models import checkpoint_settings, network_settings
from library.preflight.settings.training import flow_settings, loss_settings, scheduler_settings
from library.saving.hub import HubSettings
from library.saving.resume import ResumeSettings

LEFT_TO_THE_PLANNER = ("fp8_base", "fp8_base_unet", "t5xxl_device")  # --memory_plan chooses them


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
        is_only_shown=is_only_shown(args),
    )


def is_only_shown(args: argparse.Namespace) -> bool:
    """Whether the run is shown and not done: it writes nothing, but for the sheets of --debug_dataset."""
    return bool(args.dry_run or args.debug_dataset)


def data_settings(args: argparse.Namespace) -> DataSettings:
    return DataSettings(
        dataset_config=args.dataset_config,
        command_line=CommandLineData.from_options(vars(args)),
        cache_dir=path_or_none(args.cache_dir),
        saves_index=not is_only_shown(args),
        skip_bad_images=args.skip_bad_images,
        allow_external_links=args.allow_external_links,
        masked_loss=args.masked_loss,
        caches_latents=args.cache_latents,
        caches_text=args.cache_text_encoder_outputs,
        text_cache_variants=args.text_cache_variants,
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
        skip_validation=args.skip_cache_check,
        bytes_each=bytes_each,
    )


def latent_cache_settings(args: argparse.Namespace, fingerprint: str = "") -> LatentCacheSettings:
    """fingerprint: of the VAE."""
    return LatentCacheSettings(
        fingerprint=fingerprint,
        on_disk=args.cache_latents_to_disk,
        cache_dir=path_or_none(args.cache_dir),
        skip_validation=args.skip_cache_check,
        skip_bad_images=args.skip_bad_images,
    )


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


def resume_settings(args: argparse.Namespace) -> ResumeSettings:
    return ResumeSettings(
        args.resume,
        bool(args.resume_from_huggingface),
        args.output_dir,
        args.output_name,
        args.huggingface_token,
        is_only_shown(args),
    )


def state_options(args: argparse.Namespace, plan: RunPlan[Files]) -> dict[str, object]:
    """What a state records, and a resumed run must have alike: the options that determine the weights, the seed, the dataset."""
    return {**determining_options(args), "seed": plan.seed, "dataset": dataset_fingerprint(plan.index.training)}


def prepare_settings(args: argparse.Namespace) -> PrepareSettings:
    """All that preflight takes of the options."""
    return PrepareSettings(
        plan=plan_settings(args),
        planner=planner_settings(args),
        resume=resume_settings(args),
        uploads=None if is_only_shown(args) else hub_settings(args),
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
