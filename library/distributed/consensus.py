"""What all processes must do together, such as stopping: they agree on it one step later, so that nobody waits.

A signal or a clock may be noticed by one process a step before another. If each acted at once, one would save while the
other waits for its gradients, for ever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Agreement:
    """Reduces flags over the processes: True on every process where any of them says so."""

    def __init__(self, world_size: int):
        """torch.distributed must be running on all processes where there are several; all of them make one together."""
        # Flags travel between hosts: read from a GPU, they would wait for the step that it is still computing.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self.world_size = world_size
        self._pending: tuple[Tensor, dist.Work] | None = None

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags any process has set. Every process calls it after every step.

        One process gets its own flags back. Several get those of the call before (all False at the first), while these are on
        their way.
        """
        if self.world_size == 1:
            return list(flags)
        previous = self._pending
        values = torch.tensor([float(flag) for flag in flags])
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = values, work
        if previous is None:
            return [False] * len(flags)
        reduced, pending = previous
        pending.wait()
        return [value > 0 for value in reduced.tolist()]


PEER_LOST = re.compile(
    "closed by peer|reset by peer|Broken pipe|Timed out waiting|remote process exited|connection (?:was )?(?:closed|aborted|refused)|ncclRemoteError",
    re.IGNORECASE,
)


def has_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended or no longer answers."""
    return isinstance(error, dist.DistError) or PEER_LOST.search(str(error)) is not None


def gather(accelerator: Accelerator, items: list[T]) -> list[T]:
    """The items of all processes, on all processes, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))
