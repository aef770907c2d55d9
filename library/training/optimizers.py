"""Optimizers by name: checked before the run, built, switched for evaluation, saved and restored exactly, logged."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.common.errors import UserError
from library.distributed.gradients import GradientReducer
from library.distributed.zero import ShardAssignment, assign_shards
from library.training.optimizer_args import as_text, parse_keyword_args
from library.training.optimizer_names import OptimizerSource, find_optimizer

logger = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch's Adam variants: their weights' shape


@dataclass(frozen=True)
class OptimizerBundle:
    """An optimizer with what the training loop has to know about it.

    name_for_metadata: "module.Class(key=value,…)". is_schedule_free: it averages by itself, takes no schedule, and its
    weights differ between training and evaluation. forced_schedule: the schedule that replaces --lr_scheduler, or None.
    """

    optimizer: Optimizer
    name_for_metadata: str
    is_schedule_free: bool
    forced_schedule: str | None
    shards: ShardAssignment | None = None  # each process holds the state of a part of the parameters

    def train(self) -> None:
        """Put the training weights in place (schedule-free alone). Call it before the first step and after `eval`."""
        if self.is_schedule_free:
            self.optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Put the averaged weights in place, for good: at the end of training, before the last save."""
        if self.is_schedule_free:
            self.optimizer.eval()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Averaged weights inside the block (save, preview, validation), the very same training weights after it.

        `eval()` and `train()` alone would leave the weights changed by rounding.
        """
        if not self.is_schedule_free:
            yield
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        self.eval()
        try:
            yield
        finally:
            self.train()
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters. Where it is sharded, all processes must call it, and rank 0 gets it."""
        state = self.optimizer.state_dict()
        return self.shards.gather_state(state) if self.shards else state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore every state tensor with the dtype that it was saved with, so that a resumed run is exact."""
        load_state(self.optimizer, self.shards.own_state(saved) if self.shards else saved)


def check_optimizer(name: str, optimizer_args: Sequence[str] | None, rates: Sequence[float] = ()) -> list[str]:
    """Say what is wrong with --optimizer_type, --optimizer_args and the groups' learning rates, before anything heavy.

    A catalogued optimizer without arguments costs a look for its package. Otherwise the class is imported and takes one
    step on a tiny parameter, which finds unknown or invalid arguments and optimizers that need a closure or the model.
    """
    problems: list[str] = []
    try:
        arguments = _parse(optimizer_args)
    except UserError as error:
        problems += error.problems
        arguments = None
    try:
        source = find_optimizer(name)
        problems += _check_rates(source, rates)
        if source.adapts_rate and rates and max(rates) <= 0.1:
            logger.warning(
                "%s finds the step size by itself and multiplies it by the learning rate %g: 1.0 is usual.",
                source.name,
                max(rates),
            )
        if arguments is not None and (arguments or not source.catalogued):
            problems += _try_one_step(source, optimizer_args)
    except UserError as error:
        problems += error.problems
    return problems


def build_optimizer(
    name: str,
    param_groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    optimizer_args: Sequence[str] | None = None,
) -> OptimizerBundle:
    """Build the optimizer for `param_groups` ({"params": […], "lr": …} each), which must lie on their device already.

    torch's own take their fused form wherever the device has it, unless the arguments choose another. Raises UserError
    as `check_optimizer` would."""
    arguments = _parse(optimizer_args)
    source = find_optimizer(name)
    groups = [{**group, "params": list(group["params"])} for group in param_groups]
    problems = _check_rates(source, [group.get("lr", learning_rate) for group in groups])
    if problems:
        raise UserError(problems)
    return _build(source, groups, learning_rate, arguments)


def build_sharded_optimizer(
    name: str,
    param_groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    optimizer_args: Sequence[str] | None,
    reducer: GradientReducer,
    rank: int,
) -> OptimizerBundle:
    """As `build_optimizer`, with a part of the state on each process; after its step every process has all new values.

    reducer: of all the groups' parameters, in their order; its buffer carries the values. `can_be_sharded(name)` holds. Where
    some process would have nothing to step, every process keeps the whole state.
    """
    sizes = [parameter.numel() for parameter in reducer.parameters]
    shards = assign_shards(param_groups, sizes, reducer.world_size, rank)
    if shards is None:
        return build_optimizer(name, param_groups, learning_rate, optimizer_args)
    owners = shards.owners
    bundle = build_optimizer(name, shards.own_groups(param_groups), learning_rate, optimizer_args)
    bundle.optimizer.register_step_post_hook(lambda *_: reducer.broadcast_parameters(owners))
    return replace(bundle, shards=shards)


def logged_rates(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """The learning rates under the names that sd-scripts logs: "lr/<name>", and "lr/d*lr/<name>" where d is estimated.

    `names`: one a parameter group. Where an optimizer works its rate out by itself (Adafactor's relative step,
    schedule-free warm-up) that rate is given. Prodigy-plus has "lr/d*lr" of its first group too.
    """
    rates: dict[str, float] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        rate = _rate(optimizer, group)
        if rate is not None:
            rates[f"lr/{name}"] = rate
        if "d" in group and group["lr"] is not None:
            rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    if type(optimizer).__name__ == "ProdigyPlusScheduleFree":
        first = optimizer.param_groups[0]
        rates["lr/d*lr"] = float(first["d"]) * float(first["lr"])
    return rates


def load_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(saved)` that keeps dtypes and paging.

    torch casts every floating state to its parameter's dtype: an optimizer that keeps bf16 statistics of float32
    weights (prodigy-plus), or float32 ones of bf16 weights, would go on from rounded or widened state.
    """
    optimizer.load_state_dict(saved)
    if not {"state", "param_groups"} <= saved.keys():
        return  # a wrapper around another optimizer, with a layout of its own
    is_torchs = type(optimizer).__module__.startswith("torch.optim")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        state = optimizer.state.get(parameter, {})
        for key, value in saved["state"].get(index, {}).items():
            now = state.get(key)
            size = value.numel() if isinstance(value, Tensor) and key in MOMENTS else 1
            if is_torchs and size not in (1, parameter.numel()):  # torch would fail at the first step
                raise UserError(f"its {key} of {size} numbers is not for weights of {list(parameter.shape)}.")
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                state[key] = value.detach().to(now.device)
        if getattr(optimizer, "is_paged", False):  # bitsandbytes restores paged state into ordinary device memory
            for key in {"state1", "state2"} & state.keys():
                buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)  # type: ignore[attr-defined]
                state[key] = buffer.copy_(state[key])


# --- inside ----------------------------------------------------------------------------------------------------


def _parse(optimizer_args: Sequence[str] | None) -> dict[str, Any]:
    return parse_keyword_args("--optimizer_args", optimizer_args, reserved=("lr", "params"))


def _check_rates(source: OptimizerSource, rates: Sequence[float]) -> list[str]:
    distinct = sorted({rate for rate in rates if rate})
    if source.adapts_rate and len(distinct) > 1:
        listed = ", ".join(f"{rate:g}" for rate in distinct)
        return [
            f"--optimizer_type={source.name} takes one learning rate for everything, not {listed}: give --learning_rate "
            "alone, or equal --unet_lr and --text_encoder_lr, and no LoRA+ ratio."
        ]
    return []


def _try_one_step(source: OptimizerSource, optimizer_args: Sequence[str] | None) -> list[str]:
    parameter = torch.nn.Parameter(torch.full((8, 4), 0.1))
    parameter.grad = torch.ones_like(parameter)
    source.load()
    try:
        # Some print while they are built, some draw random numbers: neither belongs into a check.
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            bundle = _build(source, [{"params": [parameter]}], 1.0, _parse(optimizer_args), quiet=True)
            bundle.train()
            bundle.optimizer.step()
    except (Exception, SystemExit) as error:
        given = f" with --optimizer_args {' '.join(optimizer_args)}" if optimizer_args else ""
        return [f"--optimizer_type={source.name}{given} cannot be used: {type(error).__name__}: {error}"]
    return []


def _build(
    source: OptimizerSource, groups: list[dict[str, Any]], rate: float, given: dict[str, Any], quiet: bool = False
) -> OptimizerBundle:
    optimizer_class = source.load()
    arguments = {**source.defaults, **given}
    forced_schedule = None
    shown_rate: float | None = rate
    if optimizer_class.__name__ == "Adafactor" and optimizer_class.__module__.startswith("transformers."):
        arguments["relative_step"] = arguments.get("relative_step", True) or arguments.get("warmup_init", False)
        if arguments["relative_step"]:
            forced_schedule, shown_rate = f"adafactor:{rate}", None
            for group in groups:
                group.pop("lr", None)
            if not quiet:
                logger.warning(
                    "Adafactor works out its own step size (relative_step=True): --learning_rate, --unet_lr, "
                    "--text_encoder_lr and --lr_scheduler do not act. relative_step=False gives them back."
                )
    optimizer = _construct(optimizer_class, groups, shown_rate, arguments)
    path = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return OptimizerBundle(optimizer, path + as_text(arguments), _is_schedule_free(optimizer), forced_schedule)


def _construct(
    optimizer_class: type, groups: list[dict[str, Any]], rate: float | None, arguments: dict[str, Any]
) -> Optimizer:
    accepted = inspect.signature(optimizer_class).parameters
    if "lr" in accepted or any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        arguments = {"lr": rate, **arguments}
    other_forms = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    if optimizer_class.__module__.startswith("torch.optim.") and "fused" in accepted and not other_forms:
        arguments = {**arguments, "fused": _has_fused_form(optimizer_class, groups) or None}
    optimizer: Optimizer = optimizer_class(groups, **arguments)
    return optimizer


def _has_fused_form(optimizer_class: type, groups: list[dict[str, Any]]) -> bool:
    """Whether the fused kernel exists, and is right, for every device and dtype among the parameters.

    Found by one step on some numbers, enough for a CPU's vectors: torch 2.13's SGD leaves those of half precision as they were.
    """
    kinds = {(parameter.device, parameter.dtype) for group in groups for parameter in group["params"]}
    try:
        ends = [(_one_step(optimizer_class, kind, True), _one_step(optimizer_class, kind, False)) for kind in kinds]
        return all(torch.allclose(fused, plain, rtol=0.02) for fused, plain in ends)
    except (RuntimeError, NotImplementedError):
        return False


def _one_step(optimizer_class: type, kind: tuple[torch.device, torch.dtype], fused: bool) -> Tensor:
    """Where 256 ones are after a step of 0.5 against a gradient of 1."""
    device, dtype = kind
    probe = torch.nn.Parameter(torch.ones(256, device=device, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    optimizer_class([probe], lr=0.5, fused=fused).step()
    return probe.detach().float()


def _is_schedule_free(optimizer: Optimizer) -> bool:
    switchable = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return switchable and all(group.get("use_schedulefree", True) for group in optimizer.param_groups)


def _rate(optimizer: Optimizer, group: dict[str, Any]) -> float | None:
    if group.get("relative_step"):
        state = next((optimizer.state[each] for each in group["params"] if optimizer.state.get(each)), None)
        # None before the first step. _get_lr is what transformers' own AdafactorSchedule reads.
        return float(optimizer._get_lr(group, state)) if state else None  # type: ignore[attr-defined]
    if group.get("scheduled_lr"):
        return float(group["scheduled_lr"])
    return float(group["lr"])
