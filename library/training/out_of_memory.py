"""What to say when the device's memory is full: what was being done, how much was used, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.common.errors import UserError

OUT_OF_MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator: can't allocate", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def told_clearly(doing: str, device: torch.device, advice: list[str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a UserError. advice: options that save memory, the cheapest first."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(doing, device, advice)) from error


def is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def _message(doing: str, device: torch.device, advice: list[str]) -> str:
    used = ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        used = f" The peak was {peak:.1f} GiB of {total:.1f} GiB."
    listed = "; ".join(f"{number}. {text}" for number, text in enumerate(advice, 1))
    return f"The memory of {device} was full while {doing}.{used} What would help, the cheapest first: {listed}. What was saved before is whole."
