"""The optimizer's state shared out over processes: each steps a part of the parameters and hands on their new values.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.1. Gradients are
whole on every process, as they are after a backward pass. Saved states have the layout of an optimizer that is not shared
out, so a run may go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from library.distributed.gradients import GradientReducer
from library.training.optimizer_names import find_optimizer
from library.training.optimizers import OptimizerBundle, build_optimizer, load_state

# whose optimizers step every tensor by itself, so that it does not matter who else is stepped with it
PACKAGES = frozenset(["torch.optim", "bitsandbytes.optim", "lion_pytorch"])


def can_be_shared(name: str) -> bool:
    """Whether each parameter's step of --optimizer_type `name` is known to depend on that parameter alone."""
    return find_optimizer(name).module in PACKAGES


def owners_of(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process steps each parameter: neighbours together, in shares of about equal size.

    >>> owners_of([4, 4, 4, 4], 2)
    [0, 0, 1, 1]
    """
    total, before, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append(min(processes - 1, (2 * before + size) * processes // (2 * total)))  # by its middle
        before += size
    return owners


@dataclass(frozen=True)
class Shares:
    """groups: how many parameters each of the optimizer's groups has; owners: of all parameters, in order."""

    groups: list[int]
    owners: list[int]
    rank: int
    channel: Any  # a group of processes that exchanges host memory

    def own(self) -> list[int]:
        """The numbers of this process's parameters."""
        return [number for number, owner in enumerate(self.owners) if owner == self.rank]

    def members(self) -> list[range]:
        """The numbers of each group's parameters."""
        starts = [sum(self.groups[:place]) for place in range(len(self.groups))]
        return [range(start, start + count) for start, count in zip(starts, self.groups)]


@dataclass(frozen=True)
class SharedOptimizerBundle(OptimizerBundle):
    shares: Shares

    def state_dict(self) -> dict[str, Any]:
        """On the first process the state of all parameters, in host memory; the others send theirs. All must call it."""
        mine = self.optimizer.state_dict()
        numbers = self.shares.own()
        named = {numbers[local]: _in_host_memory(state) for local, state in mine["state"].items()}
        first = self.shares.rank == 0
        found: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(named, found, dst=0, group=self.shares.channel)
        if found is None:
            return {}
        groups = [{**group, "params": list(all)} for group, all in zip(mine["param_groups"], self.shares.members())]
        return {"state": {number: each[number] for each in found for number in sorted(each)}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this process's part of a whole state."""
        local = {number: place for place, number in enumerate(self.shares.own())}
        state = {local[number]: each for number, each in saved["state"].items() if number in local}
        groups = [
            {**group, "params": [local[number] for number in group["params"] if number in local]}
            for group in saved["param_groups"]
        ]
        load_state(self.optimizer, {**saved, "state": state, "param_groups": groups})


def build_shared_optimizer(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    optimizer_args: Sequence[str] | None,
    reducer: GradientReducer,
    rank: int,
) -> OptimizerBundle:
    """As `build_optimizer`, for this process's share; after its step every process has all new values.

    reducer: of all the groups' parameters, in their order; its buffer carries the values. `can_be_shared(name)` holds.
    Where some process would have nothing to step, every process keeps the whole state.
    """
    owners = owners_of([parameter.numel() for parameter in reducer.parameters], reducer.world_size)
    if len(set(owners)) < reducer.world_size:
        return build_optimizer(name, groups, learning_rate, optimizer_args)
    shares = Shares([len(group["params"]) for group in groups], owners, rank, dist.new_group(backend="gloo"))
    mine = [
        {**group, "params": [each for number, each in zip(members, group["params"]) if owners[number] == rank]}
        for members, group in zip(shares.members(), groups)
    ]
    bundle = build_optimizer(name, mine, learning_rate, optimizer_args)
    bundle.optimizer.register_step_post_hook(lambda *_: reducer.broadcast_parameters(owners))
    return SharedOptimizerBundle(
        bundle.optimizer, bundle.name_for_metadata, bundle.is_schedule_free, bundle.forced_schedule, shares
    )


def _in_host_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
