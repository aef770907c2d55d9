"""The learning-rate schedule: named shapes, schedules that watch the loss, and any class by dotted path.

One unit throughout: OPTIMISER steps. The trainer calls `Schedule.step()` once after every optimiser step, on every
process, whatever the accumulation and the number of processes; `total_steps` counts the same.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from library.common.errors import UserError
from library.training.optimizer_args import parse_keyword_args
from library.training.scheduler_settings import (
    TEXT_ARGUMENTS,
    SchedulerSettings,
    nearest,
    no_warmup,
    resolve_steps,
    shape_arguments,
)
from library.training.scheduler_shapes import SHAPES, Factor

__all__ = ["SCHEDULE_NAMES", "Schedule", "SchedulerSettings", "build_schedule", "check_schedule", "resolve_steps"]

logger = logging.getLogger(__name__)

# Schedules that change the rate by what they see of the loss: name -> (module, class).
_LOSS_SCHEDULES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "reduce_lr_on_plateau": ("torch.optim.lr_scheduler", "ReduceLROnPlateau"),
        "greedy": ("transformers.optimization", "GreedyLR"),
    }
)
SCHEDULE_NAMES = (*SHAPES, *_LOSS_SCHEDULES, "adafactor")
_ADAFACTOR_ALONE = "--lr_scheduler=adafactor needs --optimizer_type=Adafactor with relative_step=True."


class Schedule:
    """What the trainer holds: a scheduler, or none (Adafactor's relative step and schedule-free optimizers)."""

    def __init__(self, scheduler: Any | None = None, watches_loss: bool = False) -> None:
        self.scheduler = scheduler
        self.watches_loss = watches_loss

    def step(self) -> None:
        """After every optimiser step."""
        if self.scheduler is not None and not self.watches_loss:
            self.scheduler.step()

    def advance(self, steps: int) -> None:
        """Bring a fresh schedule to where it would be after so many optimiser steps."""
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected call of `lr_scheduler.step"
            )  # there is no optimiser step to wait for
            for _ in range(steps):
                self.step()

    def observe(self, loss: float) -> None:
        """After every validation, or without one after every epoch, with the average loss: the unit of `patience`."""
        if self.scheduler is not None and self.watches_loss:
            self.scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore. Build the schedule on the fresh optimizer first, then load the optimizer's state and this one."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state)


def build_schedule(
    settings: SchedulerSettings, optimizer: Optimizer, is_schedule_free: bool = False, forced: str | None = None
) -> Schedule:
    """Build the schedule on a fresh optimizer; is_schedule_free and forced come from its OptimizerBundle.

    Raises UserError with everything that is wrong with the settings.
    """
    if is_schedule_free or forced:
        if settings.type or settings.name not in ("constant", "adafactor") or settings.warmup:
            logger.warning(
                "This optimizer schedules its own rate: --lr_scheduler and --lr_warmup_steps have no effect. A warm-up is "
                "asked for in --optimizer_args (schedule-free: warmup_steps=N, Adafactor: warmup_init=True)."
            )
        return Schedule()
    if settings.type:
        return _custom(settings, optimizer)
    name = settings.name
    if name.split(":")[0] == "adafactor":
        raise UserError(_ADAFACTOR_ALONE)
    if name in _LOSS_SCHEDULES:
        if settings.warmup:
            raise UserError(no_warmup(name))
        return Schedule(_construct(*_LOSS_SCHEDULES[name], settings, optimizer), watches_loss=True)
    if name not in SHAPES:
        raise UserError(f"--lr_scheduler={name} is not known.{nearest(name, SCHEDULE_NAMES)}")
    bases = [group["lr"] for group in optimizer.param_groups]
    arguments = shape_arguments(name, settings, bases)
    factors: list[Callable[[int], float]] = [partial(_factor, SHAPES[name], base, arguments) for base in bases]
    return Schedule(LambdaLR(optimizer, factors))


def check_schedule(
    settings: SchedulerSettings,
    learning_rate: float,
    optimizer_name: str = "",
    optimizer_args: Sequence[str] | None = None,
) -> list[str]:
    """Say what is wrong with the schedule's options, before anything heavy, by building it on a tiny optimizer."""
    if settings.name.split(":")[0] == "adafactor" and not settings.type:
        is_adafactor = optimizer_name.lower().split(".")[-1] == "adafactor"
        relative = not {"relative_step=False", "relative_step=0"} & set(optimizer_args or ())
        return [] if is_adafactor and relative else [_ADAFACTOR_ALONE]
    try:
        build_schedule(settings, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate))
    except UserError as error:
        return error.problems
    return []


def _factor(shape: Factor, base: float, arguments: dict[str, Any], step: int) -> float:
    return shape(step, base, **arguments)


def _custom(settings: SchedulerSettings, optimizer: Optimizer) -> Schedule:
    """--lr_scheduler_type: a dotted path, or a bare name of torch.optim.lr_scheduler."""
    if settings.warmup:
        logger.warning("--lr_warmup_steps has no effect with --lr_scheduler_type: give it in --lr_scheduler_args.")
    module, _, name = settings.type.rpartition(".")
    scheduler = _construct(module or "torch.optim.lr_scheduler", name, settings, optimizer)
    required = [each for each in inspect.signature(scheduler.step).parameters.values() if each.default is each.empty]
    return Schedule(scheduler, watches_loss=any(each.name == "metrics" for each in required))


def _construct(module: str, name: str, settings: SchedulerSettings, optimizer: Optimizer) -> Any:
    arguments = parse_keyword_args("--lr_scheduler_args", settings.args, text_keys=TEXT_ARGUMENTS)
    try:
        scheduler_class = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
        raise UserError(f"The learning-rate scheduler {module}.{name} cannot be imported: {error}.") from error
    if not isinstance(scheduler_class, type):
        raise UserError(f"The learning-rate scheduler {module}.{name} is no class: name one.")
    try:
        return scheduler_class(optimizer, **arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"--lr_scheduler_args {' '.join(settings.args)}: {name} says: {error}.") from error
