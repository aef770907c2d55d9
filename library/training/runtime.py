"""Where and how a run computes: its processes, its device, its number formats, what is sharded; what to do when memory is full."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.common.errors import UserError
from library.distributed.launch import (
    AcceleratorSettings,
    ShardingConfig,
    ShardingOptions,
    make_accelerator,
    requested_sharding,
    sharding_problems,
    sharding_warnings,
    start_processes,
)
from library.training.precision import Precision, choose_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
OOM_MESSAGES = ("out of memory", "DefaultCPUAllocator: can't allocate", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class RuntimeSettings:
    mixed_precision: str  # "no", "fp16" or "bf16"
    full_fp16: bool
    full_bf16: bool
    accumulation: int
    timeout_minutes: int | None  # how long processes wait for each other; None: torch's own limit
    trackers: tuple[str, ...]
    log_folder: Path | None
    sharding: ShardingOptions


@dataclass(frozen=True)
class Runtime:
    accelerator: Accelerator
    device: torch.device
    precision: Precision
    sharding: ShardingConfig
    problems: list[str]  # what keeps the request for sharding from being carried out


def start_runtime(settings: RuntimeSettings) -> Runtime:
    """Connect the processes and choose the number formats that the device can do."""
    device = start_processes(settings.timeout_minutes)
    precision = choose_precision(settings.mixed_precision, settings.full_fp16, settings.full_bf16, device)
    accelerator = make_accelerator(
        AcceleratorSettings(
            mixed_precision=precision.mixed_precision,
            gradient_accumulation_steps=settings.accumulation,
            trackers=settings.trackers,
            project_dir=settings.log_folder,
            timeout_minutes=settings.timeout_minutes,
        )
    )
    processes = accelerator.num_processes
    request = requested_sharding(settings.sharding, os.environ)
    for warning in (*sharding_warnings(request, processes), *precision.warnings):
        logger.warning(warning)
    return Runtime(
        accelerator,
        accelerator.device,
        precision,
        request.sharding if processes > 1 else ShardingConfig(),
        sharding_problems(request, settings.sharding, processes),
    )


@contextmanager
def translate_oom(doing: str, device: torch.device, advice: list[str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError. advice: options that save memory, the cheapest first."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        raise UserError(_oom_message(doing, device, advice)) from error


def is_oom(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(text in str(error) for text in OOM_MESSAGES)


def _oom_message(doing: str, device: torch.device, advice: list[str]) -> str:
    used = ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        used = f" The peak was {peak:.1f} GiB of {total:.1f} GiB."
    listed = "; ".join(f"{number}. {text}" for number, text in enumerate(advice, 1))
    return f"The memory of {device} was full while {doing}.{used} What would help, the cheapest first: {listed}. What was saved before is whole."
