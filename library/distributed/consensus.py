"""What all processes must do together, such as stopping: they agree on it one step later, so that nobody waits.

A signal or a clock may be noticed by one process a step before another. If each acted at once, one would save while the
other waits for its gradients, for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Answers questions of yes or no alike on every process: yes where any of them says yes."""

    def __init__(self, world_size: int):
        """torch.distributed must be running on all processes where there are several; all of them make one together."""
        # Answers travel between hosts: read from a GPU, they would wait for the step that it is still computing.
        self._channel = dist.new_group(backend="gloo") if world_size > 1 else None
        self.world_size = world_size
        self._asked: tuple[Tensor, dist.Work] | None = None

    def ask(self, answers: Sequence[bool]) -> list[bool]:
        """Every process calls it after every step. With one process the answers come back; with several, those that were
        agreed on at the call before come back (all no at the first), while these are on their way.
        """
        if self.world_size == 1:
            return list(answers)
        before = self._asked
        said = torch.tensor([float(answer) for answer in answers])
        work = dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._channel, async_op=True)
        assert work is not None
        self._asked = said, work
        if before is None:
            return [False] * len(answers)
        agreed, done = before
        done.wait()
        return [value > 0 for value in agreed.tolist()]
