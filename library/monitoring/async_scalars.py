"""Reading numbers from the device late, so that nothing waits for them.

A step's numbers are copied to pinned host memory on the device's own queue, with an event behind the copy. They are told
once the event has passed, usually while the next step is being issued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tell = Callable[[list[float]], None]
WAITING_AT_MOST = 16  # steps; beyond them the oldest is waited for


@dataclass(frozen=True)
class _Waiting:
    values: Tensor | None  # on the host, float32; None: there is nothing to wait for
    copied: torch.cuda.Event | None
    tell: Tell


class LateValues:
    """A queue of numbers on their way to the host. What is told keeps the order in which it was sent."""

    def __init__(self, device: torch.device, together: bool = False):
        """together: several processes must be told at the same step, so all but the newest are waited for."""
        self.device = device
        self.most = 1 if together else WAITING_AT_MOST
        self.together = together
        self._waiting: deque[_Waiting] = deque()

    def send(self, values: Tensor | None, tell: Tell) -> None:
        """Have `tell` called with the numbers of `values` [n] once they have arrived; with None, in its turn, with []."""
        if values is None or values.device.type != "cuda":
            copied, host = None, None if values is None else values.detach().float()
        else:
            host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(values.detach().float(), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
        self._waiting.append(_Waiting(host, copied, tell))

    def tell_arrived(self) -> None:
        """Tell what has arrived, without waiting; of several processes, all but the newest."""
        while self._waiting and (self._has_arrived(self._waiting[0]) or len(self._waiting) > self.most):
            self._tell_first()

    def tell_all(self) -> None:
        """Wait for everything that was sent, and tell it."""
        while self._waiting:
            self._tell_first()

    def _tell_first(self) -> None:
        first = self._waiting.popleft()
        if first.copied is not None:
            first.copied.synchronize()
        first.tell([] if first.values is None else first.values.tolist())

    def _has_arrived(self, waiting: _Waiting) -> bool:
        return not self.together and (waiting.copied is None or waiting.copied.query())
