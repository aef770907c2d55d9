"""Random draws as a function of the seed and the place in training.

Every draw of a micro-batch comes from generators seeded by (seed, epoch, number of the batch over all processes). So a resumed run draws what the
unbroken one drew, whatever previews and validation did in between, and nothing has to be replayed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mix_seed(*parts: int | str) -> int:
    """A well-spread 63-bit seed out of any parts; the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's global generators (CPU and every device): LoRA dropout and optimizers draw from them."""
    random.seed(seed)
    torch.manual_seed(seed)


class DrawGenerators:
    """The generators of one micro-batch: on the CPU for timesteps and conditioning dropout, on the device for noise."""

    def __init__(self, device: torch.device):
        self.cpu = torch.Generator()
        self.device = self.cpu if device.type == "cpu" else torch.Generator(device)

    def place(self, seed: int) -> None:
        """Seed them, and the global generators, for the micro-batch that `seed` stands for."""
        seed_everything(seed)
        self.cpu.manual_seed(mix_seed(seed, "cpu"))
        if self.device is not self.cpu:
            self.device.manual_seed(mix_seed(seed, "device"))

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """What is drawn inside, from these generators on the CPU or from Python's, is drawn again after it."""
        states = self.cpu.get_state(), random.getstate()
        yield
        self.cpu.set_state(states[0])
        random.setstate(states[1])
