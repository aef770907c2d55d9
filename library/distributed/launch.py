"""How processes are started and what they shard: accelerate's Accelerator, and what its launcher or --deepspeed asks for.

Sharding is carried out by this program itself, with PyTorch alone. accelerate would take over the loop, the optimizer and the
LoRA's weights, and would quietly shard nothing on a CPU; DeepSpeed would write training states that only itself can read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from library.distributed.fsdp import ShardSettings
from library.options.groups.compatibility import NVME, OFFLOAD_OPTIMIZER

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

USES_FSDP, USES_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"  # would win over what Accelerator is made with
DEEPSPEED_PREFIX = "ACCELERATE_DEEPSPEED_"


# --- processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AcceleratorSettings:
    """What the run's Accelerator is made with."""

    mixed_precision: str  # "no", "fp16" or "bf16": what the device really does
    gradient_accumulation_steps: int = 1
    trackers: tuple[str, ...] = ()
    project_dir: str | Path | None = None  # where trackers write
    timeout_minutes: int | None = None  # how long processes wait for each other; None: torch's own limit


def start_processes(timeout_minutes: int | None = None) -> torch.device:
    """Connect the processes that a launcher started, if any, and return this one's device."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # Accelerator reads it, PartialState alone does not
    with without_accelerate_plugins():
        device: torch.device = PartialState(cpu, **_process_group(timeout_minutes).to_kwargs()).device
        return device


def make_accelerator(settings: AcceleratorSettings) -> Accelerator:
    """The Accelerator of a run. It tells the truth about the run, but prepares nothing: models compute in their own dtypes."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in one process may have another precision
    with without_accelerate_plugins():
        return Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            log_with=list(settings.trackers) or None,
            project_dir=settings.project_dir,
            kwargs_handlers=[_process_group(settings.timeout_minutes)],
        )


@contextmanager
def without_accelerate_plugins(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Hide from accelerate the plugins and the accumulation that its launcher was configured with."""
    names = (USES_FSDP, USES_DEEPSPEED, ACCUMULATION)
    hidden = {name: environment.pop(name) for name in names if name in environment}
    try:
        yield
    finally:
        environment.update(hidden)


class _Progress(Protocol):
    @property
    def step(self) -> int: ...


def check_resume_consistency(starts: Sequence[_Progress | None], resume: str | None) -> list[str]:
    """The problem of processes that resume from different states, as machines with disks of their own may have them."""
    if len(set(starts)) == 1:
        return []
    states = sorted({"no state" if start is None else f"one at step {start.step}" for start in starts})
    return [
        f"--resume {resume}: the processes found different states: {', '.join(states)}. Copy the first machine's state to the same "
        "path on each machine."
    ]


def _process_group(timeout_minutes: int | None) -> InitProcessGroupKwargs:
    from accelerate.utils import InitProcessGroupKwargs

    return (
        InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))
        if timeout_minutes
        else InitProcessGroupKwargs()
    )


# --- sharding --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardingConfig:
    """What is sharded over the processes. The default is nothing: every process has all weights, and averages gradients."""

    base: ShardSettings | None = None  # the frozen denoiser
    optimizer: bool = False  # the optimizer's state


@dataclass(frozen=True)
class ShardingRequest:
    """What the user asked for, where, and what is wrong with it."""

    sharding: ShardingConfig
    where: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardingOptions:
    """The options that ask for sharding, and those that can't be combined with it, as on the command line."""

    deepspeed: bool = False
    zero_stage: int = 2
    offload_param_device: str | None = None
    blocks_to_swap: int | str | None = None
    memory_plan: str | None = None
    torch_compile: bool = False
    scale_weight_norms: float | None = None
    network_module: str | None = None


def requested_sharding(options: ShardingOptions, environment: Mapping[str, str]) -> ShardingRequest:
    """environment: what accelerate's launcher set for this process. --deepspeed wins over a DeepSpeed configuration."""
    fsdp, deepspeed = (environment.get(name, "").lower() == "true" for name in (USES_FSDP, USES_DEEPSPEED))
    if fsdp and options.deepspeed:
        both = "--deepspeed and accelerate's FSDP configuration both say what is shared out. Leave one out."
        return ShardingRequest(ShardingConfig(), "--deepspeed", (both,))
    if fsdp:
        return _from_fsdp(environment)
    if options.deepspeed:
        return _from_zero(options.zero_stage, options.offload_param_device, None, "--deepspeed")
    if deepspeed:
        return _from_accelerate_deepspeed(environment)
    return ShardingRequest(ShardingConfig(), "")


def sharding_problems(request: ShardingRequest, options: ShardingOptions, processes: int) -> list[str]:
    """What keeps the request from being carried out, a sentence or two each."""
    problems, base, where = list(request.problems), request.sharding.base, request.where
    if base is None:
        return problems
    if processes == 1 and base.offload:
        problems.append(
            f"{where}: with one process, weights in host memory are the matter of --blocks_to_swap, which copies ahead. "
            "Give that, or start several processes."
        )
    if options.blocks_to_swap:
        problems.append(
            f"--blocks_to_swap can't be combined with {where}: both say where the denoiser's weights are. Leave it out, "
            "or turn on offload_params (FSDP) or --offload_param_device cpu (ZeRO-3) to keep the shares in host memory."
        )
    if options.memory_plan:
        problems.append(
            f"--memory_plan can't be combined with {where}: it reckons with whole weights on the device. Leave one out."
        )
    if options.torch_compile:
        problems.append(
            f"--torch_compile can't be combined with {where}: compiled blocks would leave out the hooks that gather their "
            "weights. Leave one out."
        )
    if options.scale_weight_norms and options.network_module != "networks.lora_sd3":
        problems.append(
            f"--scale_weight_norms with {options.network_module} needs whole weights between the steps and can't be combined "
            f"with {where}. Leave one out."
        )
    return problems


def sharding_warnings(request: ShardingRequest, processes: int) -> list[str]:
    if request.where and processes == 1:
        return [f"{request.where}: there is one process, so nothing is shared out."]
    return []


def _from_fsdp(environment: Mapping[str, str]) -> ShardingRequest:
    def is_on(name: str, default: str) -> bool:
        return environment.get(name, default).lower() == "true"

    where, problems = "accelerate's FSDP configuration", []
    if environment.get("FSDP_VERSION", "1") != "2":
        problems.append(f"{where} is for FSDP1. Write fsdp_version: 2 in it; docs/configs/fsdp2.yaml is an example.")
    if is_on("FSDP_ACTIVATION_CHECKPOINTING", "false"):
        problems.append(f"{where}: write fsdp_activation_checkpointing: false and give --gradient_checkpointing.")
    settings = ShardSettings(
        offload=is_on("FSDP_OFFLOAD_PARAMS", "false"),
        reshard_after_forward=is_on("FSDP_RESHARD_AFTER_FORWARD", "true"),
    )
    return ShardingRequest(ShardingConfig(base=settings), where, tuple(problems))


def _from_accelerate_deepspeed(environment: Mapping[str, str]) -> ShardingRequest:
    where = "accelerate's DeepSpeed configuration"
    if environment.get(f"{DEEPSPEED_PREFIX}CONFIG_FILE", "none").lower() != "none":
        why = f"{where}: deepspeed_config_file is not read. Write zero_stage into accelerate's own file; docs/configs/zero3.yaml is an example."
        return ShardingRequest(ShardingConfig(), where, (why,))
    stage = int(environment.get(f"{DEEPSPEED_PREFIX}ZERO_STAGE", "2"))
    param, optimizer = (
        environment.get(f"{DEEPSPEED_PREFIX}OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")
    )
    return _from_zero(stage, param, optimizer, where)


def _from_zero(stage: int, param_device: str | None, optimizer_device: str | None, where: str) -> ShardingRequest:
    """Rajbhandari et al. 2020, "ZeRO", section 5: stages 1 and 2 shard the optimizer's state and the gradients, 3 the weights too."""
    problems = []
    if optimizer_device not in (None, "none"):
        problems.append(f"{where}: offload_optimizer_device {optimizer_device} is refused: {OFFLOAD_OPTIMIZER}.")
    if param_device == "nvme":
        problems.append(f"{where}: offload_param_device nvme is refused: {NVME}. Give cpu.")
    if param_device == "cpu" and stage < 3:
        problems.append(f"{where}: offload_param_device needs ZeRO stage 3, but the stage is {stage}.")
    base = ShardSettings(offload=param_device == "cpu") if stage == 3 else None
    return ShardingRequest(ShardingConfig(base, stage > 0), where if stage > 0 else "", tuple(problems))
