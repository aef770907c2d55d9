#!/usr/bin/env python3
"""Time and peak memory of a training step: forward, backward, optimizer, on random weights of real or smaller sizes.

    python -m benchmarks.step --preset sd35m --resolution 1024 --mixed_precision bf16 --gradient_checkpointing
    python -m benchmarks.step --preset sd3m --scale 0.25 --resolution 256 --blocks_to_swap 4
    python -m benchmarks.step --scale 0.25 --resolution 256 --against 'python -m benchmarks.peft_step --scale 0.25 --resolution 256'

All other options are the trainer's own (--blocks_to_swap, --gradient_checkpointing, --fp8_base_unet, --torch_compile, --network_dim,
--train_batch_size, --optimizer_type …). It prints a table and JSON: seconds, images a second, peak memory (of the
GPU's tensors; on a CPU of this process), the model's operations (TFLOP), and their share of what the device could do.

--against takes another program's command. Where it holds {steps} it is run with two numbers of steps, and seconds a step are the
difference, so that its start-up does not count; where it prints JSON as this program does, that is read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.devices import device_peak, wait_for
from benchmarks.job import Shape, add_sizes, make_job, model_flops, sizes, training_options
from benchmarks.measuring import Row, add_common_arguments, compare, other_program, report, this_program
from benchmarks.process_monitor import own_peak_bytes, reset_high_water
from library.common.errors import UserError
from library.training.precision import choose_precision

MIB = 2**20


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    chosen, rest = parser().parse_known_args(words)
    if chosen.against:
        few, many = chosen.steps, 3 * chosen.steps
        against = other_program(chosen.against, {"resolution": chosen.resolution}, (few, many))
        report("step", compare(this_program("benchmarks.step", words), against, chosen.rounds), chosen.json)
        return
    try:
        args = training_options(rest)
    except UserError as error:
        raise SystemExit(str(error)) from None
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, shape = sizes(chosen), Shape.of(args, chosen.resolution)
    flops = model_flops(config, args, shape)
    dtype = choose_precision(args.mixed_precision, args.full_fp16, args.full_bf16, device).dtype
    peak, peak_source = device_peak(device, dtype)
    job = make_job(config, args, shape, device)
    measured = measure_steps(job.step, chosen.steps, device)
    speed = flops / 1e12 / measured.seconds
    row = {
        "what": " ".join(rest) or "no options",
        **measured.row(shape.batch * args.gradient_accumulation_steps),
        "tflop_a_step": flops / 1e12,
        "tflop_per_second": speed,
        "share_of_peak": speed / peak,
    }
    facts = {"peak_tflops": peak, "peak_from": peak_source, "model": chosen.preset, "depth": config.depth}
    facts |= {"hidden_size": config.hidden_size, "resolution": chosen.resolution}
    report("step", [row], chosen.json, **facts, dtype=str(dtype), device=str(device))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sizes(made)
    made.add_argument("--resolution", type=int, default=1024, help="the images' side in pixels (1024)")
    made.add_argument("--steps", type=int, default=5, help="steps that are timed, after a first one (5)")
    made.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    add_common_arguments(made, "{steps} and {resolution} are replaced.")
    return made


@dataclass(frozen=True)
class StepTimes:
    """Time and memory of the steps after the first one."""

    first: float  # seconds of the first step, compilation and allocation included
    seconds: float  # of a step: the median, on a GPU the mean
    cpu_seconds: float  # of all cores, for a step: unlike `seconds`, other programs on the machine do not change it
    peak: int  # bytes: the GPU's tensors, or this process

    def row(self, images: int) -> Row:
        """images: in a step."""
        return {
            "first_step_seconds": self.first,
            "step_seconds": self.seconds,
            "step_cpu_seconds": self.cpu_seconds,
            "images_per_second": images / self.seconds,
            "step_peak_mib": self.peak / MIB,
        }


def measure_steps(step: Callable[[], Any], count: int, device: torch.device) -> StepTimes:
    """Make a step, then `count` more; on a GPU without synchronization between these."""
    first = seconds_of(step, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset_high_water()
    worked = time.process_time()
    if device.type == "cuda":
        seconds = seconds_of(lambda: [step() for _ in range(count)], device) / count
    else:
        seconds = statistics.median(seconds_of(step, device) for _ in range(count))
    worked = (time.process_time() - worked) / count
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else own_peak_bytes()
    return StepTimes(first, seconds, worked, peak)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
