"""Everything that turns gradients into new weights, built together: reducer, optimizer, schedule, loss scale, moving average."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.distributed.gradients import GradientReducer
from library.training.ema import WeightEma
from library.training.optimizer_names import can_be_sharded
from library.training.optimizers import OptimizerBundle, build_optimizer, build_sharded_optimizer
from library.training.precision import LossScaler
from library.training.schedulers import Schedule, SchedulerSettings, build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizationSettings:
    optimizer_type: str
    learning_rate: float
    optimizer_args: Sequence[str] | None
    scheduler: SchedulerSettings
    ema_decay: float | None = None  # None: no moving average
    shard_optimizer: bool = False  # over the processes
    scale_loss: bool = False  # float16


@dataclass(frozen=True)
class Optimization:
    parameters: list[nn.Parameter]  # all that is trained, in the order of the groups
    group_names: list[str]
    reducer: GradientReducer
    optimizer: OptimizerBundle
    schedule: Schedule
    ema: WeightEma | None
    scaler: LossScaler | None


def build_optimization(
    settings: OptimizationSettings,
    network: nn.Module,
    groups: Sequence[Mapping[str, object]],
    accelerator: Accelerator,
) -> Optimization:
    """groups: the optimizer's ({"params", "lr", "name"}), of the network's parameters, which are on their device."""
    parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    names = [str(group["name"]) for group in groups]
    reducer = GradientReducer(parameters, accelerator.num_processes)
    chosen = (settings.optimizer_type, groups, settings.learning_rate, settings.optimizer_args)
    if settings.shard_optimizer and can_be_sharded(settings.optimizer_type):
        optimizer = build_sharded_optimizer(*chosen, reducer, accelerator.process_index)
    else:
        if settings.shard_optimizer:
            logger.warning(
                "A step of %s may look at all weights at once: every process keeps its whole state.",
                settings.optimizer_type,
            )
        optimizer = build_optimizer(*chosen)
    schedule = build_schedule(
        settings.scheduler, optimizer.optimizer, optimizer.is_schedule_free, optimizer.forced_schedule
    )
    optimizer.train()
    ema = WeightEma(dict(network.named_parameters()), settings.ema_decay) if settings.ema_decay else None
    device: torch.device = parameters[0].device
    scaler = LossScaler(device) if settings.scale_loss else None
    return Optimization(parameters, names, reducer, optimizer, schedule, ema, scaler)
