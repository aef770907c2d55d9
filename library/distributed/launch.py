"""What a run shares out over its processes: asked for by accelerate's launcher (FSDP, DeepSpeed) or by --deepspeed.

Both are carried out by this program itself, with PyTorch alone. accelerate would take over the loop, the optimizer and the
LoRA's weights, and would quietly share out nothing on a CPU; DeepSpeed would write training states that only itself can read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from library.distributed.fsdp import ShardSettings
from library.options.groups.compatibility import NVME, OFFLOAD_OPTIMIZER
from library.training.train_progress import TrainProgress

USES_FSDP, USES_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
DEEPSPEED_PREFIX = "ACCELERATE_DEEPSPEED_"


@dataclass(frozen=True)
class Sharing:
    """What is shared out. The default is nothing: every process has all weights, and averages gradients."""

    base: ShardSettings | None = None  # the frozen denoiser
    optimizer: bool = False  # the optimizer's state


@dataclass(frozen=True)
class Request:
    """What the user asked for, where, and what is wrong with it."""

    sharing: Sharing
    where: str
    problems: tuple[str, ...] = ()


def requested_sharing(args: argparse.Namespace, environment: Mapping[str, str]) -> Request:
    """environment: what accelerate's launcher told this process. --deepspeed wins over a DeepSpeed configuration."""
    fsdp, deepspeed = (environment.get(name, "").lower() == "true" for name in (USES_FSDP, USES_DEEPSPEED))
    if fsdp and args.deepspeed:
        both = "--deepspeed and accelerate's FSDP configuration both say what is shared out. Leave one out."
        return Request(Sharing(), "--deepspeed", (both,))
    if fsdp:
        return _of_fsdp(environment)
    if args.deepspeed:
        return _of_zero(args.zero_stage, args.offload_param_device, None, "--deepspeed")
    if deepspeed:
        return _of_accelerate_deepspeed(environment)
    return Request(Sharing(), "")


def sharing_problems(request: Request, args: argparse.Namespace, processes: int) -> list[str]:
    """What keeps the request from being carried out, a sentence or two each."""
    problems, base, where = list(request.problems), request.sharing.base, request.where
    if base is None:
        return problems
    if processes == 1 and base.offload:
        problems.append(
            f"{where}: with one process, weights in host memory are the matter of --blocks_to_swap, which copies ahead. "
            "Give that, or start several processes."
        )
    if args.blocks_to_swap:
        problems.append(
            f"--blocks_to_swap can't be combined with {where}: both say where the denoiser's weights are. Leave it out, "
            "or turn on offload_params (FSDP) or --offload_param_device cpu (ZeRO-3) to keep the shares in host memory."
        )
    if args.memory_plan:
        problems.append(
            f"--memory_plan can't be combined with {where}: it reckons with whole weights on the device. Leave one out."
        )
    if args.torch_compile:
        problems.append(
            f"--torch_compile can't be combined with {where}: compiled blocks would leave out the hooks that gather their "
            "weights. Leave one out."
        )
    if args.scale_weight_norms and args.network_module != "networks.lora_sd3":
        problems.append(
            f"--scale_weight_norms with {args.network_module} needs whole weights between the steps and can't be combined "
            f"with {where}. Leave one out."
        )
    return problems


def sharing_warnings(request: Request, processes: int) -> list[str]:
    if request.where and processes == 1:
        return [f"{request.where}: there is one process, so nothing is shared out."]
    return []


def unlike_starts(starts: Sequence[TrainProgress | None], resume: str | None) -> list[str]:
    """Processes that found different states to go on from, as machines with disks of their own may."""
    if len(set(starts)) == 1:
        return []
    found = sorted({"no state" if start is None else f"one at step {start.step}" for start in starts})
    return [
        f"--resume {resume}: the processes found different states: {', '.join(found)}. Copy the first machine's state to the same "
        "path on each machine."
    ]


@contextmanager
def plain_launch(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Inside it accelerate sees plain processes, whatever its launcher was told."""
    taken = {name: environment.pop(name) for name in (USES_FSDP, USES_DEEPSPEED) if name in environment}
    try:
        yield
    finally:
        environment.update(taken)


# --- inside ----------------------------------------------------------------------------------------------------


def _of_fsdp(environment: Mapping[str, str]) -> Request:
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
    return Request(Sharing(base=settings), where, tuple(problems))


def _of_accelerate_deepspeed(environment: Mapping[str, str]) -> Request:
    where = "accelerate's DeepSpeed configuration"
    if environment.get(f"{DEEPSPEED_PREFIX}CONFIG_FILE", "none").lower() != "none":
        why = f"{where}: deepspeed_config_file is not read. Write zero_stage into accelerate's own file; docs/configs/zero3.yaml is an example."
        return Request(Sharing(), where, (why,))
    stage = int(environment.get(f"{DEEPSPEED_PREFIX}ZERO_STAGE", "2"))
    param, optimizer = (
        environment.get(f"{DEEPSPEED_PREFIX}OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")
    )
    return _of_zero(stage, param, optimizer, where)


def _of_zero(stage: int, param_device: str | None, optimizer_device: str | None, where: str) -> Request:
    """Rajbhandari et al. 2020, "ZeRO", section 5: stages 1 and 2 share out the optimizer's state and the gradients, 3 the weights too."""
    problems = []
    if optimizer_device not in (None, "none"):
        problems.append(f"{where}: offload_optimizer_device {optimizer_device} is refused: {OFFLOAD_OPTIMIZER}.")
    if param_device == "nvme":
        problems.append(f"{where}: offload_param_device nvme is refused: {NVME}. Give cpu.")
    if param_device == "cpu" and stage < 3:
        problems.append(f"{where}: offload_param_device needs ZeRO stage 3, but the stage is {stage}.")
    base = ShardSettings(offload=param_device == "cpu") if stage == 3 else None
    return Request(Sharing(base, stage > 0), where if stage > 0 else "", tuple(problems))
