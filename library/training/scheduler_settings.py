"""The options of the learning-rate schedule, and what they come to as arguments of a shape."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from library.common.errors import Problems, UserError
from library.training.optimizer_args import parse_keyword_args
from library.training.scheduler_shapes import CURVES, SHAPES, parse_step_rules

logger = logging.getLogger(__name__)

TEXT_ARGUMENTS = ("step_rules", "warmup_type", "decay_type", "mode", "threshold_mode", "anneal_strategy")
_POLYNOMIAL_END = 1e-7
_RULES_EXAMPLE = "--lr_scheduler_args step_rules=1:100,0.1:200,0.01 is 1 before step 100, 0.1 before 200, then 0.01"


@dataclass(frozen=True)
class SchedulerSettings:
    """--lr_scheduler and its options.

    total_steps: optimiser steps of the whole training. warmup_steps, decay_steps: see `resolve_steps`.
    type: dotted path of a class that replaces the name. args: key=value pairs for it, or for the named shape.
    """

    total_steps: int
    name: str = "constant"
    type: str = ""
    args: tuple[str, ...] = ()
    warmup_steps: int | float | str = 0
    decay_steps: int | float | str = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None

    @property
    def warmup(self) -> int:
        """The warm-up in optimiser steps. Raises UserError."""
        return self._steps("--lr_warmup_steps", self.warmup_steps)

    @property
    def decay(self) -> int:
        """The decay in optimiser steps. Raises UserError."""
        return self._steps("--lr_decay_steps", self.decay_steps)

    def _steps(self, option: str, value: int | float | str) -> int:
        try:
            return resolve_steps(value, self.total_steps)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None


def resolve_steps(value: int | float | str, total: int) -> int:
    """Steps from a count, a share of `total` (below 1, or the 1.0 that "100%" parses to), or text: "100", "0.1", "10%".

    Raises UserError for anything else (negative, above 100 %, 1.5).
    """
    number = _number(value) if isinstance(value, str) else value
    whole = isinstance(number, int) or (number > 1 and number.is_integer())
    if not (number >= 0 and (whole or number <= 1)) or (isinstance(value, str) and "%" in value and number > 1):
        raise _not_steps(value)
    return int(number) if whole else int(number * total)


def shape_arguments(name: str, settings: SchedulerSettings, base_rates: Iterable[float]) -> dict[str, Any]:
    """The keyword arguments of the shape `name`, from the options and --lr_scheduler_args.

    Raises UserError with everything that is wrong; warns of options that the shape does not read.
    """
    problems = Problems()
    parameters = inspect.signature(SHAPES[name]).parameters.values()
    accepted = {each.name for each in parameters if each.kind == each.KEYWORD_ONLY}
    from_options: dict[str, Any] = {
        "warmup": settings.warmup,
        "decay": settings.decay,
        "total": settings.total_steps,
        "power": settings.power,
        "timescale": settings.timescale,
        "min_lr_rate": settings.min_lr_ratio,
        "min_lr_ratio": settings.min_lr_ratio or 0.0,
        # --lr_scheduler_num_cycles counts restarts, or full waves; plain cosine keeps its half wave, as it always has
        "num_cycles": {"cosine_with_restarts": settings.num_cycles, "cosine": 0.5}.get(name, settings.num_cycles / 2),
    }
    if settings.warmup and "warmup" not in accepted:
        problems.add(no_warmup(name))
    chosen = {key: value for key, value in from_options.items() if key in accepted}
    given = parse_keyword_args("--lr_scheduler_args", settings.args, text_keys=TEXT_ARGUMENTS)
    own = sorted(accepted - {"warmup", "total", "decay"})
    for key in sorted(given.keys() - set(own)):
        problems.add(f"--lr_scheduler_args: {name} has no argument {key}.{nearest(key, own)}")
    chosen.update(given)
    _check(name, chosen, min(base_rates), accepted, problems)
    problems.raise_if_any()
    _warn_of_unused(name, settings, accepted)
    return chosen


def no_warmup(name: str) -> str:
    """The problem of a warm-up asked of a schedule that has none."""
    remedy = "use --lr_scheduler=constant_with_warmup" if name == "constant" else "use another schedule"
    return f"--lr_scheduler={name} has no warm-up: set --lr_warmup_steps=0, or {remedy}."


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known ones, or all of them."""
    choices = list(known)
    near = difflib.get_close_matches(word, choices, n=2)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Known: {', '.join(choices)}." if choices else " It takes none."


def _check(name: str, chosen: dict[str, Any], lowest_rate: float, accepted: set[str], problems: Problems) -> None:
    if {"min_lr", "min_lr_rate"} <= accepted:
        floors = [key for key in ("min_lr", "min_lr_rate") if chosen.get(key) is not None]
        if len(floors) != 1:
            problems.add(
                f"--lr_scheduler={name} needs --lr_scheduler_min_lr_ratio (0.1, say) or min_lr in --lr_scheduler_args"
                f"{', and not both' if floors else ''}."
            )
    if name == "polynomial" and chosen.get("lr_end", _POLYNOMIAL_END) >= lowest_rate:
        end = chosen.get("lr_end", _POLYNOMIAL_END)
        problems.add(f"--lr_scheduler=polynomial ends at lr_end={end:g}, which must be below every learning rate.")
    if name == "warmup_stable_decay" and chosen["warmup"] + chosen["decay"] > chosen["total"]:
        problems.add(
            f"--lr_warmup_steps ({chosen['warmup']}) and --lr_decay_steps ({chosen['decay']}) are together longer than "
            f"the training ({chosen['total']} steps)."
        )
    for key in sorted({"warmup_type", "decay_type"} & chosen.keys()):
        if chosen[key] not in CURVES:
            problems.add(f"--lr_scheduler_args: {key}={chosen[key]} is not known: choose one of {', '.join(CURVES)}.")
    if name == "piecewise_constant":
        try:
            chosen["step_rules"] = str(chosen["step_rules"])  # "0.3" alone was read as a number
            parse_step_rules(chosen["step_rules"])
        except KeyError:
            problems.add(f"--lr_scheduler=piecewise_constant needs its rules: {_RULES_EXAMPLE}.")
        except ValueError:
            problems.add(f"--lr_scheduler_args: step_rules={chosen['step_rules']} cannot be read: {_RULES_EXAMPLE}.")


def _warn_of_unused(name: str, settings: SchedulerSettings, accepted: set[str]) -> None:
    read_by = {
        "decay_steps": ("--lr_decay_steps", {"decay"}),
        "num_cycles": ("--lr_scheduler_num_cycles", {"num_cycles"} if name != "cosine" else set()),
        "power": ("--lr_scheduler_power", {"power"}),
        "timescale": ("--lr_scheduler_timescale", {"timescale"}),
        "min_lr_ratio": ("--lr_scheduler_min_lr_ratio", {"min_lr_rate", "min_lr_ratio"}),
    }
    defaults = {each.name: each.default for each in fields(settings)}
    for setting, (option, keys) in read_by.items():
        if getattr(settings, setting) != defaults[setting] and not keys & accepted:
            logger.warning("%s has no effect with --lr_scheduler=%s.", option, name)


def _number(text: str) -> int | float:
    text = text.strip()
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise _not_steps(text) from None


def _not_steps(value: object) -> UserError:
    return UserError(f"{value!r} is neither a number of steps (100) nor a share of all steps (0.1 or 10%).")
