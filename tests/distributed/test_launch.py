"""What launchers and options ask to be shared out, and what can't be combined with it."""

from __future__ import annotations

import argparse

import pytest

from library.distributed.fsdp import ShardSettings
from library.distributed.launch import (
    ShardingConfig,
    ShardingOptions,
    check_resume_consistency,
    requested_sharding,
    sharding_problems,
    sharding_warnings,
    without_accelerate_plugins,
)
from library.options.resolve import resolve_options
from library.preflight.settings.models import memory_advice
from library.preflight.settings.training import sharding_options
from library.training.train_progress import TrainProgress

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE, PARAM, OPTIMIZER, FILE = (
    f"ACCELERATE_DEEPSPEED_{name}"
    for name in ("ZERO_STAGE", "OFFLOAD_PARAM_DEVICE", "OFFLOAD_OPTIMIZER_DEVICE", "CONFIG_FILE")
)


def arguments(*words: str) -> argparse.Namespace:
    return resolve_options(["--network_module", "networks.lora_sd3", *words]).args


def options(*words: str) -> ShardingOptions:
    return sharding_options(arguments(*words))


@pytest.mark.parametrize(
    ("environment", "sharding"),
    [
        ({}, ShardingConfig()),
        (FSDP, ShardingConfig(ShardSettings())),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, ShardingConfig(ShardSettings(offload=True))),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, ShardingConfig(ShardSettings(reshard_after_forward=False))),
        (DEEPSPEED, ShardingConfig(optimizer=True)),
        ({**DEEPSPEED, STAGE: "0"}, ShardingConfig()),
        ({**DEEPSPEED, STAGE: "3", PARAM: "none"}, ShardingConfig(ShardSettings(), optimizer=True)),
        ({**DEEPSPEED, STAGE: "3", PARAM: "cpu"}, ShardingConfig(ShardSettings(offload=True), optimizer=True)),
    ],
)
def test_what_accelerates_launcher_asks_for(environment: dict[str, str], sharding: ShardingConfig):
    request = requested_sharding(options(), environment)
    assert request.sharding == sharding and sharding_problems(request, options(), 2) == []


@pytest.mark.parametrize(
    ("words", "sharding"),
    [
        ("", ShardingConfig()),
        ("--zero_stage 3", ShardingConfig()),
        ("--deepspeed", ShardingConfig(optimizer=True)),
        ("--deepspeed --zero_stage 0", ShardingConfig()),
        ("--deepspeed --zero_stage 1", ShardingConfig(optimizer=True)),
        ("--deepspeed --zero_stage 3", ShardingConfig(ShardSettings(), optimizer=True)),
        (
            "--deepspeed --zero_stage 3 --offload_param_device cpu",
            ShardingConfig(ShardSettings(offload=True), optimizer=True),
        ),
    ],
)
def test_what_the_options_ask_for(words: str, sharding: ShardingConfig):
    request = requested_sharding(options(*words.split()), {})
    assert request.sharding == sharding and not request.problems


def test_options_win_over_a_deepspeed_configuration():
    request = requested_sharding(options("--deepspeed", "--zero_stage", "1"), {**DEEPSPEED, STAGE: "3"})
    assert request.sharding == ShardingConfig(optimizer=True)


@pytest.mark.parametrize(
    ("environment", "words", "told"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "", "fsdp_version: 2"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "--gradient_checkpointing"),
        (FSDP, "--deepspeed", "both say what is shared out"),
        (FSDP, "--blocks_to_swap 1", "--blocks_to_swap"),
        (FSDP, "--blocks_to_swap auto", "--blocks_to_swap"),
        (FSDP, "--memory_plan auto", "--memory_plan"),
        (FSDP, "--torch_compile", "--torch_compile"),
        (FSDP, "--scale_weight_norms 1 --network_module lycoris.kohya", "--scale_weight_norms"),
        ({**DEEPSPEED, FILE: "ds.json"}, "", "deepspeed_config_file is not read"),
        ({**DEEPSPEED, OPTIMIZER: "cpu"}, "", "PagedAdamW8bit"),
        ({}, "--deepspeed --zero_stage 3 --offload_param_device nvme", "nvme is refused"),
        ({}, "--deepspeed --offload_param_device cpu", "needs ZeRO stage 3, but the stage is 2"),
        ({}, "--deepspeed --zero_stage 3 --blocks_to_swap 1", "--blocks_to_swap"),
    ],
)
def test_what_cannot_be_done_is_told_once(environment: dict[str, str], words: str, told: str):
    chosen = options(*words.split())
    problems = sharding_problems(requested_sharding(chosen, environment), chosen, 2)
    assert len(problems) == 1 and told in problems[0]


def test_one_process_shares_nothing_and_is_told():
    plain, offloaded = (requested_sharding(options(), {**FSDP, "FSDP_OFFLOAD_PARAMS": o}) for o in ("false", "true"))
    assert sharding_problems(plain, options(), 1) == []
    assert "nothing is shared out" in sharding_warnings(plain, 1)[0] and sharding_warnings(plain, 2) == []
    assert "--blocks_to_swap" in sharding_problems(offloaded, options(), 1)[0]
    assert sharding_warnings(requested_sharding(options(), {}), 1) == []


def test_accelerate_is_not_told_what_its_launcher_was():
    environment = {**FSDP, **DEEPSPEED, "ACCELERATE_USE_CPU": "true", ACCUMULATION: "4"}
    with without_accelerate_plugins(environment):
        assert environment == {"FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
    assert environment == {**FSDP, **DEEPSPEED, "ACCELERATE_USE_CPU": "true", ACCUMULATION: "4"}


def test_machines_that_found_different_states_are_told_to_copy_one():
    three, five = TrainProgress(step=3), TrainProgress(step=5)
    assert (
        check_resume_consistency([None, None], "auto")
        == check_resume_consistency([three, TrainProgress(step=3)], "auto")
        == []
    )
    (told,) = check_resume_consistency([three, None, five], "auto")
    assert "no state, one at step 3, one at step 5" in told and "--resume auto" in told


def test_a_full_memory_with_several_whole_models_is_told_of_sharing():
    assert not any("fsdp2.yaml" in advice for advice in memory_advice(arguments()))
    assert any("fsdp2.yaml" in advice for advice in memory_advice(arguments(), whole_copies=True))
