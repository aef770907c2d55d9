"""The MMDiT computes what it computed at commit ee928c8: outputs and all gradients of three variants, to the bit.

Bits depend on the CPU's kernels and on torch's version. Where either differs from those of the recording, rounding is allowed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.sd3.mmdit import MMDiT
from tests.sd3.tiny import fill_with_noise, tiny_mmdit_config

FOLDER = Path(__file__).parent.parent / "data_files" / "mmdit"
KINDS = ("medium", "5-medium", "5-large")
SAMPLES = 256  # numbers that are kept of each large gradient, evenly spaced


def run(kind: str) -> dict[str, Tensor]:
    """Velocity, and gradients of inputs and weights, in float32."""
    model = MMDiT(tiny_mmdit_config(kind, depth=3))
    fill_with_noise(model, 3)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 16, 10, 12, generator=generator).requires_grad_()
    context = torch.randn(2, 9, 192, generator=generator).requires_grad_()
    pooled = torch.randn(2, 192, generator=generator).requires_grad_()
    weights = torch.randn(2, 16, 10, 12, generator=generator)
    velocity = model(x, torch.tensor([17.0, 803.0]), context, pooled)
    (velocity * weights).sum().backward()
    tensors = {"velocity": velocity, "x": x.grad, "context": context.grad, "pooled": pooled.grad}
    tensors |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def sampled(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step].contiguous()


def environment() -> dict[str, str]:
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_recording(kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as recorded: the order of sums depends on it
    try:
        tensors = run(kind)
    finally:
        torch.set_num_threads(threads)
    with safe_open(FOLDER / f"{kind}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert recorded.keys() == tensors.keys()
    same_machine = {key: metadata[key] for key in environment()} == environment()
    for name, expected in recorded.items():
        actual = sampled(tensors[name])
        if same_machine:
            assert torch.equal(actual, expected), name
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)
