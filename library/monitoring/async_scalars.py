"""Reads numbers from the device asynchronously, so that no step waits for them.

A step's numbers are copied to pinned host memory on the device's own stream, with an event behind the copy. Once the event
has passed, usually while the next step is being launched, they go to a callback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Deliver = Callable[[list[float]], None]
MAX_PENDING = 16  # steps; beyond them the oldest is waited for


@dataclass(frozen=True)
class _Pending:
    values: Tensor | None  # on the host, float32; None: there is nothing to wait for
    copied: torch.cuda.Event | None
    deliver: Deliver


class AsyncScalars:
    """A queue of numbers on their way to the host. They are delivered in the order in which they were pushed."""

    def __init__(self, device: torch.device, lockstep: bool = False):
        """lockstep: deliver at the same step on every rank, so all but the newest are waited for."""
        self.device = device
        self.max_pending = 1 if lockstep else MAX_PENDING
        self.lockstep = lockstep
        self._pending: deque[_Pending] = deque()

    def push(self, values: Tensor | None, deliver: Deliver) -> None:
        """Call `deliver` with the numbers of `values` [n] once they have arrived; with None, in its turn, with []."""
        if values is None or values.device.type != "cuda":
            copied, host = None, None if values is None else values.detach().float()
        else:
            host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(values.detach().float(), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
        self._pending.append(_Pending(host, copied, deliver))

    def poll(self) -> None:
        """Deliver what has arrived, without waiting; in lockstep, all but the newest."""
        while self._pending and (self._has_arrived(self._pending[0]) or len(self._pending) > self.max_pending):
            self._deliver_first()

    def flush(self) -> None:
        """Wait for everything that was pushed, and deliver it."""
        while self._pending:
            self._deliver_first()

    def _deliver_first(self) -> None:
        first = self._pending.popleft()
        if first.copied is not None:
            first.copied.synchronize()
        first.deliver([] if first.values is None else first.values.tolist())

    def _has_arrived(self, pending: _Pending) -> bool:
        return not self.lockstep and (pending.copied is None or pending.copied.query())
