"""A model that is needed on the device now and then, and waits in host memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def send_home(model: nn.Module, device: torch.device) -> None:
    """Move a model from `device` into host memory and give its device memory back to all; nothing where `device` is the CPU."""
    if device.type == "cpu":
        return
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def visiting(model: nn.Module, device: torch.device, stays: bool) -> Iterator[None]:
    """Inside, the model is on `device`; afterwards, also after an error, it is back in host memory unless it `stays`."""
    model.to(device)
    try:
        yield
    finally:
        if not stays:
            send_home(model, device)
