#!/usr/bin/env python3
"""How far a quantized base model is from the full one: error of the predicted velocity, of the LoRA's gradients, bytes, seconds.

    python -m benchmarks.quantization --scale 0.5 --resolution 256
    python -m benchmarks.quantization --pretrained_model_name_or_path MODEL.safetensors

The reference is the same model in float32. Errors are relative: the norm of the difference to the norm of the reference. Random
weights (without a model) have no outliers; trained ones have some, which rows and blocks with scales of their own keep in bounds.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.devices import wait_for
from benchmarks.job import (
    CLIP_TOKENS,
    Shape,
    add_sizes,
    conditioning_of,
    random_batch,
    random_model,
    sizes,
    training_options,
)
from benchmarks.measuring import Row, add_common_arguments, compare, other_program, report, this_program
from library.memory.apply import MemorySettings, apply_memory_optimizations
from library.memory.quantization import fp8_matmul_problems
from library.preflight.network import make_network
from library.preflight.settings.models import network_settings
from library.sd3.checkpoint import locate_parts
from library.sd3.mmdit import MMDiT
from library.sd3.models import load_mmdit
from library.training.precision import Precision

CPU = torch.device("cpu")
KINDS = {
    "bf16": MemorySettings(),
    "fp8": MemorySettings(quantization="fp8"),
    "fp8, --fp8_matmul": MemorySettings(quantization="fp8", fp8_matmul=True),
    "int8": MemorySettings(quantization="int8"),
    "nf4": MemorySettings(quantization="nf4"),
}
TIMESTEPS = (100.0, 500.0, 900.0)


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    chosen = parser().parse_args(words)
    if chosen.against:
        rows = compare(this_program("benchmarks.quantization", words), other_program(chosen.against), chosen.rounds)
        report("quantization", rows, chosen.json)
        return
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.pretrained_model_name_or_path:
        base = load_mmdit(locate_parts(chosen.pretrained_model_name_or_path).mmdit, CPU, torch.float32)
    else:
        base = random_model(sizes(chosen), torch.float32)
    shape = Shape(len(TIMESTEPS), chosen.resolution, chosen.resolution, CLIP_TOKENS + chosen.t5xxl_max_token_length)
    reference = run(base, MemorySettings(), torch.float32, shape, device)
    rows = []
    for what, settings in KINDS.items():
        if settings.fp8_matmul and fp8_matmul_problems(device):
            continue
        dtype = torch.bfloat16 if what == "bf16" else torch.float32  # for the others, the error of the storage alone
        rows.append(compared(what, run(base, settings, dtype, shape, device), reference))
    report("quantization", rows, chosen.json, device=str(device), resolution=chosen.resolution)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pretrained_model_name_or_path", help="a checkpoint of SD3; none: noise of the sizes below")
    add_sizes(made)
    made.add_argument("--resolution", type=int, default=512, help="the images' side in pixels (512)")
    made.add_argument("--t5xxl_max_token_length", type=int, default=256, help="tokens of T5 (256)")
    made.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    add_common_arguments(made)
    return made


class Outputs:
    """A model's velocity, its gradients, and the bytes of its blocks."""

    def __init__(self, velocity: Tensor, gradients: list[Tensor], block_bytes: int, seconds: float):
        self.velocity, self.gradients = velocity, gradients
        self.block_bytes, self.seconds = block_bytes, seconds


def run(base: MMDiT, settings: MemorySettings, dtype: torch.dtype, shape: Shape, device: torch.device) -> Outputs:
    """Forward and backward of one batch, with a LoRA of fixed noise, on a copy of the model."""
    model = copy.deepcopy(base).to(dtype)
    apply_memory_optimizations(model, settings, device)
    network = attach_noise(model, device)
    batch = random_batch(model.config, shape, Precision(dtype, torch.float32, False), device)
    started = time.perf_counter()
    velocity = model(batch.latents, torch.tensor(TIMESTEPS, device=device), *conditioning_of(batch)).float()
    velocity.square().mean().backward()
    wait_for(device)
    seconds = time.perf_counter() - started
    gradients = [parameter.grad.cpu() for parameter in network.parameters() if parameter.grad is not None]
    tensors = [*model.joint_blocks.parameters(), *model.joint_blocks.buffers()]
    return Outputs(velocity.detach().cpu(), gradients, sum(each.nbytes for each in tensors), seconds)


def attach_noise(model: MMDiT, device: torch.device) -> nn.Module:
    """A LoRA that is not zero: gradients of Down would be."""
    network = make_network(network_settings(training_options([])), [None] * 3, model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    network.to(device).train().attach()
    return network


def compared(what: str, quantized: Outputs, reference: Outputs) -> Row:
    gradients, expected = (
        torch.cat([gradient.flatten() for gradient in outputs.gradients]) for outputs in (quantized, reference)
    )
    return {
        "what": what,
        "velocity_error": relative_error(quantized.velocity, reference.velocity),
        "gradient_error": relative_error(gradients, expected),
        "blocks_mib": quantized.block_bytes / 2**20,
        "blocks_to_float32": quantized.block_bytes / reference.block_bytes,
        "seconds": quantized.seconds,
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
