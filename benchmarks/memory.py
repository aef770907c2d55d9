#!/usr/bin/env python3
"""What a training step takes, and what `--memory_plan auto` would choose on cards of several sizes: estimated from shapes, not measured.

    python -m benchmarks.memory
    python -m benchmarks.memory --preset sd35l --resolution 768 --train_batch_size 2 --network_dim 32 --vram 8 12 24

Batches, rank and optimizer are the trainer's own options. tests/memory/estimator/test_step_memory.py holds these numbers to those of
torch's allocator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.job import PRESETS, Shape, training_options
from benchmarks.measuring import Row, report
from library.common.transformer import StepShape
from library.memory.estimator.planner import (
    MemoryOptions,
    ModelBytes,
    SearchSpace,
    StepMemoryEstimator,
    TrainedBytes,
    choose,
)
from library.memory.estimator.step_memory import (
    POLICIES,
    TrainingStep,
    measure_pass,
    weight_bytes,
)
from library.preflight.memory import GAPS, GIB, OWN_SHARE
from library.preflight.network import make_network
from library.preflight.optimizer_memory import optimizer_cost
from library.preflight.settings.models import network_settings
from library.sd3.mmdit import MMDiT
from library.sd3.step_inputs import block_flops, block_of, meta_inputs, stream_tokens
from library.training.precision import choose_precision

EXACT = SearchSpace(quantizations=(None,))
ENDLESS = 2**60  # bytes


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="*", choices=list(PRESETS), default=list(PRESETS), help="whose sizes (all)")
    parser.add_argument("--resolution", type=int, default=1024, help="the images' side in pixels (1024)")
    parser.add_argument("--vram", nargs="*", type=float, default=[4, 8, 12, 16, 24], help="cards in GiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed to this file too, as JSON")
    chosen, more = parser.parse_known_args(words)
    args = training_options(["--mixed_precision", "bf16", "--network_dim", "16", *more])
    rows = []
    for preset in chosen.preset:
        rows += rows_of(preset, step_estimator(preset, args, Shape.of(args, chosen.resolution)), chosen.vram)
    report(
        "memory", rows, chosen.json, resolution=chosen.resolution, batch=args.train_batch_size, rank=args.network_dim
    )


def step_estimator(preset: str, args: argparse.Namespace, shape: Shape) -> StepMemoryEstimator:
    """A released model with its LoRA, on the meta device. Text and latents are cached."""
    precision = choose_precision(args.mixed_precision, args.full_fp16, args.full_bf16, torch.device("meta"))
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset]).to(precision.dtype).requires_grad_(False)
    network = make_network(network_settings(args), [None] * 3, model).to("meta", precision.trained_dtype).train()
    network.attach()
    batch = StepShape(shape.batch, shape.height, shape.width, shape.text_tokens)
    blocks = tuple(weight_bytes(block) for block in model.blocks)
    step = TrainingStep(model, network, lambda: meta_inputs(model.config, precision.dtype, batch), block_of)
    passes = {policy: measure_pass(step, policy, "cuda") for policy in POLICIES}
    gradients = step.trained_bytes()
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    cost = optimizer_cost(args.optimizer_type, args.learning_rate, args.optimizer_args, precision.trained_dtype)
    trained = TrainedBytes(
        weight_bytes(network), tuple(gradients), size - sum(gradients), int(cost.kept * size), 0, int(cost.step * size)
    )
    streams = stream_tokens(batch) * model.config.hidden_size * precision.dtype.itemsize
    models: dict[str | None, ModelBytes] = {None: ModelBytes(blocks, weight_bytes(model) - sum(blocks), passes)}
    return StepMemoryEstimator(models, trained, 0, 0, streams, tuple(block_flops(model, batch)), rounds_pinned=True)


def rows_of(preset: str, estimator: StepMemoryEstimator, cards: list[float]) -> list[Row]:
    """With each saver alone, with all of them, and as the plan chooses for each card."""
    depth = estimator.depth
    options = {
        "no option": MemoryOptions(),
        "--lean_activations": MemoryOptions(recompute_pointwise=True),
        "--gradient_checkpointing": MemoryOptions("full", depth),
        "the least": choose(estimator, EXACT, 0, ENDLESS)[0],
    }
    for card in cards:
        affordable, fits = choose(estimator, EXACT, int((card * GIB - OWN_SHARE) * (1 - GAPS)), ENDLESS)
        if fits:
            options[f"a card of {card:g} GiB"] = affordable
    return [row(preset, name, estimator, chosen) for name, chosen in options.items()]


def row(preset: str, name: str, estimator: StepMemoryEstimator, options: MemoryOptions) -> Row:
    step = estimator.step_bytes(options)
    return {
        "what": f"{preset}: {name}",
        "GiB": round(step.total / GIB, 2),
        "weights": round(step.base / GIB, 2),
        "activations": round(step.activations / GIB, 2),
        "host GiB": round(estimator.host_bytes(options) / GIB, 1),
        "options": " ".join(options.flags(estimator.depth)),
    }


if __name__ == "__main__":
    main()
