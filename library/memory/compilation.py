"""torch.compile for a transformer's blocks, and whether a backend for it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from library.common.transformer import BlockRunner, TransformerBlock

MAX_GRAPHS = 256  # of all kinds and shapes

Backend = str | Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., object]]
"""A backend of torch.compile: its name, or a function that takes a graph and example inputs."""


# backends that torch lists whether or not their package is installed
PACKAGES = {"tvm": "tvm", "onnxrt": "onnxruntime"}


def compiled(backend: Backend, dynamic: bool) -> BlockRunner:
    """A block runner that compiles the block, once for all blocks of one kind (layers, LoRA, gradients needed or not).

    dynamic: once for all shapes too, else once for each. It is one or the other, never a fixed shape first: with two graphs that
    fit a shape, activation checkpointing could compute again by another one than it had computed by.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_GRAPHS)  # beyond it torch runs uncompiled without a word

    @torch.compile(backend=backend, dynamic=dynamic)
    def forward(block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        return block(*inputs)

    def compiled_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        return forward(block, *inputs)

    return compiled_run


def backend_problems(backend: str) -> list[str]:
    """What keeps `--torch_compile --dynamo_backend` from working, a sentence; empty where it is there. Imports torch's compiler."""
    from torch._dynamo import list_backends

    if backend not in list_backends(exclude_tags=()):
        known = list_backends()
        return [
            f"--dynamo_backend {backend}: this PyTorch has no such backend. It has {', '.join(known)}; inductor is the usual one."
        ]
    package = PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        return [f"--dynamo_backend {backend} needs the package {package}, which is not installed."]
    return []
