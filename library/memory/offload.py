"""Keep a model in host memory and move it to the device for the moments in which it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def offload_to_cpu(model: nn.Module, device: torch.device) -> None:
    """Move a model from `device` into host memory and release its device memory; do nothing where `device` is the CPU."""
    if device.type == "cpu":
        return
    model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def onload(model: nn.Module, device: torch.device, keep_resident: bool) -> Iterator[None]:
    """Inside, the model is on `device`; afterwards, also after an error, it is back in host memory, unless `keep_resident`."""
    model.to(device)
    try:
        yield
    finally:
        if not keep_resident:
            offload_to_cpu(model, device)
