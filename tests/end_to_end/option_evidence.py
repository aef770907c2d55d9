"""For each option that works: how it is seen to work. `test_options.py` holds the program and this table to one another.

PLANNED: words that change what the run will do, as it is worked out before any weights are read.
RUN: words that change what a short run leaves behind. PEEK: words that change something inside of a short run.
IN_METADATA: the key of the file's metadata that holds the option's words.
ELSEWHERE: the test, as file::function, whose subject the option is.
Words after `|` are given to both runs of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from library.data.command_line import data_options
from library.preflight.settings.monitoring import preview_settings, validation_settings
from sd3_train_network import Sd3NetworkTrainer

PLANNED = {
    "max_train_steps": "--max_train_steps 5",
    "max_train_epochs": "--max_train_epochs 3",
    "gradient_accumulation_steps": "--gradient_accumulation_steps 2",
    "seed": "--seed 8",
    "mixed_precision": "--mixed_precision bf16",
    "full_bf16": "--full_bf16 | --mixed_precision bf16",
    "full_fp16": "--full_fp16 | --mixed_precision fp16",
    "learning_rate": "--learning_rate 0.5",
    "unet_lr": "--unet_lr 0.5",
    "text_encoder_lr": "--text_encoder_lr 0.5 0.25",
    "lr_scheduler": "--lr_scheduler cosine",
    "lr_scheduler_type": "--lr_scheduler_type ConstantLR",
    "lr_scheduler_args": "--lr_scheduler_args factor=0.5 | --lr_scheduler_type ConstantLR",
    "lr_warmup_steps": "--lr_warmup_steps 1 | --lr_scheduler cosine",
    "lr_decay_steps": "--lr_decay_steps 1 | --lr_scheduler warmup_stable_decay",
    "lr_scheduler_num_cycles": "--lr_scheduler_num_cycles 2 | --lr_scheduler cosine_with_restarts",
    "lr_scheduler_power": "--lr_scheduler_power 2 | --lr_scheduler polynomial",
    "lr_scheduler_timescale": "--lr_scheduler_timescale 7 | --lr_scheduler inverse_sqrt",
    "lr_scheduler_min_lr_ratio": "--lr_scheduler_min_lr_ratio 0.2 | --lr_scheduler warmup_stable_decay",
    "weighting_scheme": "--weighting_scheme mode",
    "timestep_sampling": "--timestep_sampling logit_normal",
    "loss_weighting": "--loss_weighting velocity",
    "logit_mean": "--logit_mean 1",
    "logit_std": "--logit_std 2",
    "mode_scale": "--mode_scale 0.5",
    "training_shift": "--training_shift 3",
    "resolution_shift": "--resolution_shift",
    "min_timestep": "--min_timestep 10",
    "max_timestep": "--max_timestep 900",
    "loss_type": "--loss_type huber",
    "huber_schedule": "--huber_schedule constant",
    "huber_c": "--huber_c 0.2",
    "huber_scale": "--huber_scale 2",
    "gradient_checkpointing": "--gradient_checkpointing",
    "gradient_checkpointing_blocks": "--gradient_checkpointing_blocks 1 | --gradient_checkpointing",
    "selective_checkpointing": "--selective_checkpointing | --gradient_checkpointing",
    "cpu_offload_checkpointing": "--cpu_offload_checkpointing | --gradient_checkpointing",
    "initial_step": "--initial_step 1",
    "initial_epoch": "--initial_epoch 2 | --max_train_epochs 3",
    "skip_until_initial_step": "--skip_until_initial_step | --initial_step 1",
    "max_data_loader_n_workers": "--max_data_loader_n_workers 1",
    "persistent_data_loader_workers": "--persistent_data_loader_workers",
    "logging_dir": "--logging_dir {out}/logs",
    "log_prefix": "--log_prefix mine | --logging_dir {out}/logs",
    "log_tracker_name": "--log_tracker_name mine | --logging_dir {out}/logs",
    "log_tracker_config": "--log_tracker_config {toml} | --logging_dir {out}/logs",
    "wandb_run_name": "--wandb_run_name mine | --logging_dir {out}/logs",
    "sample_prompts": "--sample_prompts {prompts}",
    "output_dir": "--output_dir {out}/other",
}

RUN = {
    "output_name": "--output_name other",
    "save_precision": "--save_precision bf16",
    "save_model_as": "--save_model_as pt",
    "save_format": "--save_format both",
    "save_every_n_steps": "--save_every_n_steps 1",
    "save_every_n_epochs": "--save_every_n_epochs 1 | --max_train_epochs 2 {one}",
    "save_n_epoch_ratio": "--save_n_epoch_ratio 2 | --max_train_epochs 2 {one}",
    "save_last_n_steps": "--save_last_n_steps 1 | --save_every_n_steps 1 --max_train_steps 4",
    "save_last_n_epochs": "--save_last_n_epochs 1 | --save_every_n_epochs 1 --max_train_epochs 4 {one}",
    "save_state": "--save_state",
    "save_state_on_train_end": "--save_state_on_train_end",
    "save_last_n_steps_state": "--save_last_n_steps_state 1 | --save_state --save_every_n_steps 1 --max_train_steps 4",
    "save_last_n_epochs_state": "--save_last_n_epochs_state 1 | --save_state --save_every_n_epochs 1 --max_train_epochs 4 {one}",
    "scale_weight_norms": "--scale_weight_norms 0.01",
    "network_dropout": "--network_dropout 0.5 | --learning_rate 1",
    "validate_every_n_steps": "--validate_every_n_steps 1 | --validation_split 0.4",
    "validate_every_n_epochs": "--validate_every_n_epochs 1 | --validation_split 0.4 --validate_every_n_steps 9 --max_train_epochs 1",
    "max_validation_steps": "--max_validation_steps 1 | --validation_split 0.6 --validate_every_n_steps 1",
    "sample_at_first": "--sample_at_first | --sample_prompts {prompts}",
    "sample_every_n_steps": "--sample_every_n_steps 1 | --sample_prompts {prompts}",
    "sample_every_n_epochs": "--sample_every_n_epochs 1 | --sample_prompts {prompts} --max_train_epochs 1",
    "no_report": "--no_report",
    "report": "--report | --no_report",
    "no_metadata": "--no_metadata",
}

# options whose words stand in the file's metadata, and the key there
IN_METADATA = {
    "training_comment": "ss_training_comment",
    **{
        f"metadata_{name}": f"modelspec.{name}"
        for name in (
            *("title", "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase"),
            *("preprocessor", "is_negative_embedding"),
        )
    },
}


def placement(trainer: Sd3NetworkTrainer) -> Any:
    return trainer.encoders.placement


def qkv(trainer: Sd3NetworkTrainer) -> Any:
    return trainer.denoiser.get_submodule("joint_blocks.0.x_block.attn.qkv")


def a_layer(trainer: Sd3NetworkTrainer) -> Any:
    return next(iter(trainer.network.layers.values()))


def optimizer(trainer: Sd3NetworkTrainer) -> Any:
    return trainer.optimization.optimizer.optimizer


Peek = Callable[[Sd3NetworkTrainer], Any]
PEEK: dict[str, tuple[str, Peek]] = {
    "disable_mmap_load_safetensors": ("--disable_mmap_load_safetensors", lambda t: placement(t).mmap),
    "network_module": ("--network_module lycoris.kohya", lambda t: type(a_layer(t))),
    "network_dim": ("--network_dim 7", lambda t: a_layer(t).summary()),
    "network_alpha": ("--network_alpha 3", lambda t: a_layer(t).summary()),
    "network_args": ("--network_args use_dora=True", lambda t: type(a_layer(t))),
    "network_train_unet_only": ("--network_train_unet_only", lambda t: t.network.trained_parts),
    "optimizer_type": ("--optimizer_type SGD", lambda t: type(optimizer(t))),
    "optimizer_args": ("--optimizer_args weight_decay=0.5", lambda t: optimizer(t).param_groups[0]["weight_decay"]),
    "use_8bit_adam": ("--use_8bit_adam", lambda t: type(optimizer(t))),
    "use_lion_optimizer": ("--use_lion_optimizer", lambda t: type(optimizer(t))),
    "cache_latents": ("--cache_latents", lambda t: t.latents.training is None),
    "cache_latents_to_disk": (
        "--cache_latents_to_disk | --cache_latents",
        lambda t: t.latents.training.settings.on_disk,
    ),
    "cache_text_encoder_outputs": ("--cache_text_encoder_outputs", lambda t: t.texts.training is None),
    "cache_text_encoder_outputs_to_disk": (
        "--cache_text_encoder_outputs_to_disk | --cache_text_encoder_outputs",
        lambda t: t.texts.training.settings.on_disk,
    ),
    "text_cache_variants": (
        "--text_cache_variants 2 | --cache_text_encoder_outputs",
        lambda t: t.texts.training.settings.variants,
    ),
    "cache_dir": ("--cache_dir {out}/cache | --cache_latents_to_disk", lambda t: t.latents.training.settings.cache_dir),
    "skip_cache_check": ("--skip_cache_check | --cache_latents", lambda t: t.latents.training.settings.skip_validation),
    "validation_seed": ("--validation_seed 3", lambda t: validation_settings(t.args, t.plan).seed),
    "fp8_base": ("--fp8_base", lambda t: placement(t).t5_quantization),
    "fp8_base_unet": ("--fp8_base_unet", lambda t: type(qkv(t))),
    "lean_activations": ("--lean_activations", lambda t: t.denoiser.run_block.__qualname__),
    "base_quantization": ("--base_quantization nf4", lambda t: type(qkv(t))),
    "fp8_matmul": ("--fp8_matmul | --fp8_base_unet", lambda t: type(qkv(t))),
    "t5xxl_device": ("--t5xxl_device cpu:0", lambda t: placement(t).t5_device),
    "t5xxl_dtype": ("--t5xxl_dtype fp16", lambda t: t.encoders.model("t5xxl").dtype),
    "highvram": ("--highvram", lambda t: placement(t).keep_freed_memory),
    "sample_sampler": (
        "--sample_sampler heun | --sample_prompts {prompts} --sample_at_first",
        lambda t: preview_settings(t.args, t.plan, 0, 1).sampler,
    ),
    "ddp_timeout": ("--ddp_timeout 3", lambda t: t.accelerator.init_handler and t.accelerator.init_handler.timeout),
}

HERE = "tests/end_to_end/test_options.py"
BEHAVIOUR = "tests/end_to_end/test_training_behaviour.py"
TEXT = "tests/end_to_end/test_text_encoder_lora.py"
CONFIG_FILE = "tests/options/test_config_file.py"
PART_WINS = "tests/sd3/test_checkpoint.py::test_a_given_path_wins_over_the_copy_in_the_checkpoint"
HUB = "tests/end_to_end/test_safety.py::test_every_saved_file_is_uploaded_and_the_token_stays_out_of_files"
SHARING = "tests/end_to_end/test_sharing.py::test_deepspeed_options_do_the_same_in_host_memory_without_the_package"
ELSEWHERE = {
    **{
        name: "tests/data/test_config.py::test_every_command_line_value_changes_the_settings"
        for name in data_options()
        if name not in PEEK
    },
    "caption_extention": f"{HERE}::test_the_old_spelling_of_caption_extension_finds_captions",
    "allow_external_links": "tests/data/test_text_links.py::test_a_caption_that_links_elsewhere_is_a_problem",
    "skip_bad_images": "tests/data/test_index.py::test_skip_bad_images_trains_on_the_rest_and_says_what_is_left_out",
    "config_file": f"{CONFIG_FILE}::test_command_line_wins_over_the_file_and_the_file_over_defaults",
    "output_config": f"{CONFIG_FILE}::test_output_config_writes_no_secret_no_default_and_only_once",
    "dry_run": f"{HERE}::test_a_dry_run_and_a_look_at_the_dataset_train_nothing",
    "debug_dataset": f"{HERE}::test_a_dry_run_and_a_look_at_the_dataset_train_nothing",
    "console_log_level": f"{HERE}::test_console_options",
    "console_log_file": f"{HERE}::test_console_options",
    "console_log_simple": f"{HERE}::test_console_options",
    "pretrained_model_name_or_path": f"{TEXT}::test_a_missing_encoder_is_left_out_of_training",
    "dataset_config": f"{BEHAVIOUR}::test_accumulated_batches_are_one_large_batch",
    **dict.fromkeys(("clip_l", "clip_g", "t5xxl", "vae"), PART_WINS),
    "tokenizer_cache_dir": f"{TEXT}::test_a_missing_encoder_is_left_out_of_training",
    "vae_batch_size": f"{HERE}::test_encoders_get_as_many_at_once_as_asked",
    "text_encoder_batch_size": f"{HERE}::test_encoders_get_as_many_at_once_as_asked",
    "lowram": f"{HERE}::test_lowram_reads_the_denoiser_onto_its_device",
    **dict.fromkeys(
        ("memory_plan", "vram"),
        "tests/end_to_end/test_memory_plan.py::test_the_released_models_train_at_1024_on_small_cards",
    ),
    "blocks_to_swap": f"{HERE}::test_blocks_to_swap_changes_where_blocks_are_and_no_loss",
    "network_train_text_encoder_only": f"{TEXT}::test_text_encoders_alone_are_trained_through_the_frozen_denoiser",
    "network_weights": f"{TEXT}::test_network_weights_of_another_shape_are_named",
    "dim_from_weights": f"{TEXT}::test_a_file_decides_ranks_and_alphas_with_dim_from_weights",
    "base_weights": f"{TEXT}::test_base_weights_change_what_the_run_starts_from",
    "base_weights_multiplier": f"{TEXT}::test_base_weights_change_what_the_run_starts_from",
    "max_grad_norm": f"{BEHAVIOUR}::test_the_gradient_is_clipped_to_max_grad_norm_and_zero_turns_it_off",
    "no_half_vae": f"{BEHAVIOUR}::test_number_formats",
    "ema_decay": f"{BEHAVIOUR}::test_averaged_weights_are_saved_beside_or_instead",
    "ema_save": f"{BEHAVIOUR}::test_averaged_weights_are_saved_beside_or_instead",
    "max_nonfinite_steps": "tests/end_to_end/test_safety.py::test_bad_steps_in_a_row_stop_the_run_with_its_last_good_state",
    "t5xxl_max_token_length": f"{BEHAVIOUR}::test_t5_gives_as_many_rows_as_asked",
    "apply_lg_attn_mask": f"{BEHAVIOUR}::test_masks_act_alike_live_and_cached",
    "apply_t5_attn_mask": f"{BEHAVIOUR}::test_masks_act_alike_live_and_cached",
    **{
        f"{name}_dropout_rate": f"{BEHAVIOUR}::test_a_dropout_rate_zeroes_its_own_encoder_in_training_alone"
        for name in ("clip_l", "clip_g", "t5")
    },
    "pos_emb_random_crop_rate": f"{BEHAVIOUR}::test_the_position_table_is_cropped_at_random_in_training_alone",
    "enable_scaled_pos_embed": f"{BEHAVIOUR}::test_the_position_table_is_scaled_to_the_datasets_resolution",
    "torch_compile": f"{BEHAVIOUR}::test_a_compiled_block_trains_the_same",
    "dynamo_backend": f"{BEHAVIOUR}::test_a_compiler_that_is_not_there_is_told",
    "save_every_n_minutes": "tests/end_to_end/test_safety.py::test_save_every_n_minutes_counts_minutes",
    "save_clip": "tests/end_to_end/test_saved_encoders.py::test_saved_encoders_equal_the_base_encoders_with_the_lora_attached",
    "save_t5xxl": "tests/end_to_end/test_saved_encoders.py::test_saved_encoders_equal_the_base_encoders_with_the_lora_attached",
    "resume": "tests/end_to_end/test_resume.py::test_resuming_at_any_step_gives_the_unbroken_runs_weights",
    "log_config": f"{HERE}::test_options_go_to_the_trackers_only_when_asked",
    **dict.fromkeys(IN_METADATA, f"{HERE}::test_what_is_told_of_the_lora_stands_in_its_metadata"),
    "metadata_thumbnail": "tests/end_to_end/test_lora_metadata.py::test_the_thumbnail_is_a_picture_in_a_data_url",
    **dict.fromkeys(("huggingface_repo_id", "save_state_to_huggingface"), HUB),
    **{
        f"huggingface_{name}": f"{HERE}::test_hub_options_reach_the_uploader"
        for name in ("token", "repo_visibility", "path_in_repo", "repo_type")
    },
    "async_upload": f"{HERE}::test_hub_options_reach_the_uploader",
    "resume_from_huggingface": HUB,
    "log_with": f"{HERE}::test_a_tracker_is_the_one_that_is_asked_for",
    **dict.fromkeys(("deepspeed", "zero_stage", "offload_param_device"), SHARING),
    "wandb_api_key": "tests/monitoring/test_trackers.py::test_wandb_gets_values_offline_and_never_the_key",
}
