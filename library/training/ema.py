"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from library.common.errors import UserError


class WeightEma:
    """average <- d * average + (1 - d) * weights after every optimiser step, kept in float32 on the weights' device.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update, so that a short run's average is not held back by its start
    (the warm-up of TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """weights: the live parameters by name; they are read at every update. decay in 0..1 (0.999 or so)."""
        if not 0 <= decay < 1:
            raise UserError(f"--ema_decay={decay}: it must be at least 0 and below 1 (0.999, say).")
        self.live = dict(weights)
        self.decay = decay
        self.updates = 0
        self.averages = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now. Call it once after every optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [weight.detach().float() for weight in self.live.values()]
        torch._foreach_lerp_(list(self.averages.values()), now, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages stand in the live parameters inside the block (save, preview, validation); after it the very
        same weights as before are back."""
        live = list(self.live.values())
        kept = [weight.detach().clone() for weight in live]
        with torch.no_grad():
            torch._foreach_copy_(live, list(self.averages.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int, "averages": {name: float32 tensor}}; decay is an option and not saved."""
        return {"updates": self.updates, "averages": {name: each.clone() for name, each in self.averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore exactly. Raises UserError when the state is of another network."""
        saved: dict[str, Tensor] = state["averages"]
        shapes = {name: tuple(each.shape) for name, each in self.averages.items()}
        if {name: tuple(each.shape) for name, each in saved.items()} != shapes:
            raise UserError(
                "The saved EMA belongs to a network with other layers or ranks: resume with the same --network_… options."
            )
        for name, average in self.averages.items():
            average.copy_(saved[name])
        self.updates = state["updates"]
