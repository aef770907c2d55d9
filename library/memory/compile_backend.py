"""Whether a backend of torch.compile is there, before a model waits for it."""

from __future__ import annotations

import importlib.util

# backends that torch lists whether or not their package is installed
PACKAGES = {"tvm": "tvm", "onnxrt": "onnxruntime"}


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
