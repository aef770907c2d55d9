"""A stand-in for a GPU's synchronisation on a CPU: counts what would make the host wait for the device.

On a GPU a number that Python reads, an operation whose result's size depends on values, and a tensor made from Python's numbers on
the device all wait for the work that is under way. On a CPU the same calls are made, and nothing waits; so they are counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READING_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
SIZE_DEPENDS_ON_VALUES = (
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)
READING_OPERATORS = ("_local_scalar_dense", "is_nonzero", "equal", *SIZE_DEPENDS_ON_VALUES)
ROOT = Path(__file__).resolve().parent.parent


class ReadCounter(TorchDispatchMode):
    """Collects, while it is entered and not paused, where in our code each read was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in READING_OPERATORS or by_mask or (name == "repeat_interleave" and isinstance(args[0], Tensor)):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if self.paused:
            return
        frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and Path(f.filename) != Path(__file__)]
        last = ours[-1] if ours else frames[-1]
        self.reads.append(f"{what} at {Path(last.filename).name}:{last.lineno}: {last.line}")

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @contextmanager
    def watching(self, monkeypatch: Any) -> Iterator[ReadCounter]:
        """Everything that is done inside is counted, Python's own reads too."""
        with monkeypatch.context() as patch, self:
            for name in READING_METHODS:
                patch.setattr(Tensor, name, self._told(getattr(Tensor, name), f"Tensor.{name}"))
            for name in ("tensor", "as_tensor"):
                patch.setattr(torch, name, self._told_on_device(getattr(torch, name), f"torch.{name}"))
            yield self

    def _told(self, method: Any, name: str) -> Any:
        def called(*args: Any, **more: Any) -> Any:
            self.note(name)
            return method(*args, **more)

        return called

    def _told_on_device(self, function: Any, name: str) -> Any:
        """A tensor of Python's numbers that is made for a device: its copy waits."""

        def called(*args: Any, **more: Any) -> Any:
            if more.get("device") is not None:
                self.note(f"{name}(device=…)")
            return function(*args, **more)

        return called
