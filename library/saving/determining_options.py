"""Which options decide what a run computes: a resumed run must have the same ones."""

from __future__ import annotations

import argparse
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.preflight.plan import RunPlan

# Where files go, what is logged and shown, how long the run is, and how memory is saved: the weights do not depend on these.
FREE = frozenset(
    [
        "output_dir",
        "output_name",
        "output_config",
        "config_file",
        "resume",
        "resume_from_huggingface",
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_n_epoch_ratio",
        "save_last_n_epochs",
        "save_last_n_epochs_state",
        "save_last_n_steps",
        "save_last_n_steps_state",
        "save_state",
        "save_state_on_train_end",
        "save_every_n_minutes",
        "save_precision",
        "save_model_as",
        "save_format",
        "save_state_to_huggingface",
        "sample_every_n_steps",
        "sample_at_first",
        "sample_every_n_epochs",
        "sample_prompts",
        "sample_sampler",
        "logging_dir",
        "log_with",
        "log_prefix",
        "log_tracker_name",
        "wandb_run_name",
        "log_tracker_config",
        "wandb_api_key",
        "log_config",
        "console_log_level",
        "console_log_file",
        "console_log_simple",
        "huggingface_repo_id",
        "huggingface_repo_type",
        "huggingface_path_in_repo",
        "huggingface_token",
        "huggingface_repo_visibility",
        "async_upload",
        "max_train_epochs",
        "max_data_loader_n_workers",
        "persistent_data_loader_workers",
        "cache_dir",
        "cache_info",
        "skip_cache_check",
        "dry_run",
        "debug_dataset",
        "report",
        "no_report",
        "ema_save",
        "training_comment",
        "no_metadata",
        "validate_every_n_steps",
        "validate_every_n_epochs",
        "max_validation_steps",
        "vae_batch_size",
        "text_encoder_batch_size",
        "disable_mmap_load_safetensors",
        "lowram",
        "highvram",
        "gradient_checkpointing",
        "gradient_checkpointing_blocks",
        "selective_checkpointing",
        "lean_activations",
        "cpu_offload_checkpointing",
        "blocks_to_swap",
        "memory_plan",
        "vram",
        "torch_compile",
        "dynamo_backend",
        "ddp_timeout",
        "deepspeed",
        "zero_stage",
        "offload_param_device",
        "zero3_init_flag",
        "zero3_save_16bit_model",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "max_nonfinite_steps",
        "initial_step",
        "initial_epoch",
        "skip_until_initial_step",
        "tokenizer_cache_dir",
        "dataset_config",
        "train_data_dir",
        "reg_data_dir",
        "in_json",
        "max_train_steps",
        "pretrained_model_name_or_path",
        "clip_l",
        "clip_g",
        "t5xxl",
        "vae",
        "network_weights",
        "base_weights",
        "seed",
    ]
)


def options_that_shape(args: argparse.Namespace, plan: RunPlan) -> dict[str, Any]:
    """The options that decide the weights, with the seed in force and a fingerprint of what is trained on."""
    chosen = {
        name: value for name, value in vars(args).items() if name not in FREE and not name.startswith("metadata_")
    }
    return {**chosen, "seed": plan.seed, "dataset": dataset_fingerprint(plan)}


def dataset_fingerprint(plan: RunPlan) -> str:
    """Changes with the images, their captions, buckets and repeats, and with the settings of their subsets."""
    digest = hashlib.blake2b(digest_size=12)
    for dataset in plan.index.training:
        digest.update(repr(dataset.settings.batch_size).encode())
        for subset in dataset.settings.subsets:
            digest.update(repr(subset).encode())
        for record in dataset.records:
            facts = (record.path, record.file_size, record.caption, record.bucket, record.repeats)
            digest.update(repr(facts).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
