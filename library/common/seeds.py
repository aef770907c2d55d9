"""Random numbers as a function of the seed and of the progress of training.

Every random number of a micro-batch comes from generators seeded by (seed, epoch, number of the batch over all processes). A resumed run
therefore draws what the unbroken one drew, whatever previews and validation drew in between, and nothing has to be replayed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def fold_seed(*parts: int | str) -> int:
    """A well-spread 63-bit seed out of any parts; the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (CPU and every device): LoRA dropout and optimizers draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # some optimizers draw from it (kron)
    torch.manual_seed(seed)


class StepGenerators:
    """The generators of one micro-batch: on the CPU for timesteps and conditioning dropout, on the device for noise."""

    def __init__(self, device: torch.device):
        self.cpu = torch.Generator()
        self.device = self.cpu if device.type == "cpu" else torch.Generator(device)

    def seed(self, seed: int) -> None:
        """Seed them, Python's and torch's global generators for the micro-batch of `seed` (see `fold_seed`)."""
        seed_everything(seed)
        self.cpu.manual_seed(fold_seed(seed, "cpu"))
        if self.device is not self.cpu:
            self.device.manual_seed(fold_seed(seed, "device"))

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Restore the CPU generator and Python's at the end of the block, so that what follows draws the same numbers."""
        states = self.cpu.get_state(), random.getstate()
        yield
        self.cpu.set_state(states[0])
        random.setstate(states[1])


@contextmanager
def preserve_rng_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in eval mode and no gradient inside; afterwards modes and random states are as before."""
    modes = [[(module, module.training) for module in each.modules()] for each in modules]
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module_modes in modes:
            for module, training in module_modes:
                module.training = training
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
