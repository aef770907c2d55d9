"""The optimizer's state sharded over processes: each process steps a part of the parameters and broadcasts their new values.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.1. Gradients are
whole on every process, as they are after a backward pass. Saved states have the layout of an unsharded optimizer, so a run may
resume with another number of processes. docs/architecture.md says why torch's ZeroRedundancyOptimizer does not do this here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

State = dict[str, Any]  # what torch.optim.Optimizer.state_dict returns


def partition_parameters(sizes: Sequence[int], processes: int) -> list[int]:
    """The process that steps each parameter: neighbours together, in parts of about equal size.

    >>> partition_parameters([4, 4, 4, 4], 2)
    [0, 0, 1, 1]
    """
    total, before, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append(min(processes - 1, (2 * before + size) * processes // (2 * total)))  # by its middle
        before += size
    return owners


@dataclass(frozen=True)
class ShardAssignment:
    """Which process steps which parameter, and the states that follow from it."""

    group_sizes: list[int]  # parameters of each of the optimizer's groups
    owners: list[int]  # of all parameters, in order
    rank: int
    process_group: dist.ProcessGroup  # exchanges host memory

    def own(self) -> list[int]:
        """The indices of this process's parameters."""
        return [index for index, owner in enumerate(self.owners) if owner == self.rank]

    def members(self) -> list[range]:
        """The indices of each group's parameters."""
        starts = [sum(self.group_sizes[:number]) for number in range(len(self.group_sizes))]
        return [range(start, start + size) for start, size in zip(starts, self.group_sizes)]

    def own_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The parameter groups with this process's parameters alone."""
        return [
            {
                **group,
                "params": [each for index, each in zip(members, group["params"]) if self.owners[index] == self.rank],
            }
            for members, group in zip(self.members(), groups)
        ]

    def gather_state(self, own: State) -> State:
        """On rank 0 the state of all parameters, in host memory; {} on the others. All ranks must call it."""
        indices = self.own()
        named = {indices[local]: _in_host_memory(state) for local, state in own["state"].items()}
        gathered: list[dict[int, State]] | None = [{}] * len(set(self.owners)) if self.rank == 0 else None
        dist.gather_object(named, gathered, dst=0, group=self.process_group)
        if gathered is None:
            return {}
        groups = [{**group, "params": list(all)} for group, all in zip(own["param_groups"], self.members())]
        return {"state": {index: each[index] for each in gathered for index in sorted(each)}, "param_groups": groups}

    def own_state(self, whole: State) -> State:
        """This process's part of the state of all parameters."""
        local = {index: position for position, index in enumerate(self.own())}
        state = {local[index]: each for index, each in whole["state"].items() if index in local}
        groups = [
            {**group, "params": [local[index] for index in group["params"] if index in local]}
            for group in whole["param_groups"]
        ]
        return {**whole, "state": state, "param_groups": groups}


def assign_shards(
    groups: Sequence[Mapping[str, Any]], sizes: Sequence[int], world_size: int, rank: int
) -> ShardAssignment | None:
    """The assignment of the groups' parameters, of `sizes` elements each; None where some process would have nothing to step."""
    owners = partition_parameters(sizes, world_size)
    if len(set(owners)) < world_size:
        return None
    return ShardAssignment([len(group["params"]) for group in groups], owners, rank, dist.new_group(backend="gloo"))


def _in_host_memory(state: Mapping[str, Any]) -> State:
    return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
