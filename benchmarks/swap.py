#!/usr/bin/env python3
"""What swapping blocks costs: a step with swapped blocks, one without, and the copies alone.

    python -m benchmarks.swap --preset sd35l --resolution 1024 --blocks_to_swap 20 --mixed_precision bf16 --gradient_checkpointing
    python -m benchmarks.swap --scale 0.25 --resolution 256 --blocks_to_swap 3

Sizes and options are those of benchmarks.step. `overlap` is the share of the copies' time that is hidden behind computing:
(unswapped + copies - swapped) / copies. On a CPU copies are computing, so there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import step
from benchmarks.job import Job, Shape, make_job, sizes, training_options
from benchmarks.measuring import Row, compare, other_program, report, this_program
from library.common.errors import UserError


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    parser = step.parser()
    parser.description = __doc__
    chosen, rest = parser.parse_known_args(words)
    if chosen.against:
        against = other_program(chosen.against, {"resolution": chosen.resolution}, (chosen.steps, 3 * chosen.steps))
        report("swap", compare(this_program("benchmarks.swap", words), against, chosen.rounds), chosen.json)
        return
    try:
        args = training_options(rest)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if not args.blocks_to_swap:
        raise SystemExit("Give --blocks_to_swap a number of blocks.")
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, shape = sizes(chosen), Shape.of(args, chosen.resolution)
    with_swap = swapped_job(make_job(config, args, shape, device), chosen.steps, device)
    args.blocks_to_swap = None
    plain = step.measure_steps(make_job(config, args, shape, device).step, chosen.steps, device)
    swapped, copies = with_swap.steps, with_swap.copies
    hidden = plain.seconds + copies.seconds - swapped.seconds
    rows: list[Row] = [
        {"what": f"{with_swap.blocks} blocks swapped", **swapped.row(shape.batch)},
        {"what": "none swapped", **plain.row(shape.batch)},
        {
            "what": "copies alone",
            "step_seconds": copies.seconds,
            "gib_per_second": with_swap.copied_gib / copies.seconds,
        },
        {
            "what": "swapped / none",
            "step_seconds": swapped.seconds / plain.seconds,
            "step_cpu_seconds": swapped.cpu_seconds / plain.cpu_seconds,
            "step_peak_mib": swapped.peak / plain.peak,
        },
    ]
    if device.type == "cuda":
        rows.append({"what": "overlap", "step_seconds": min(1.0, max(0.0, hidden / copies.seconds))})
    report("swap", rows, chosen.json, device=str(device), copied_gib_a_step=with_swap.copied_gib)


@dataclass(frozen=True)
class Swapped:
    """The measurements of a job with swapped blocks; the job itself and its memory are released."""

    blocks: int
    steps: step.StepTimes
    copies: step.StepTimes
    copied_gib: float  # a step


def swapped_job(job: Job, steps: int, device: torch.device) -> Swapped:
    assert job.swapper is not None
    whole = step.measure_steps(job.step, steps, device)
    copies = step.measure_steps(lambda: copy_as_in_a_step(job), steps, device)
    return Swapped(len(job.swapper.order), whole, copies, copied_bytes(job) / 2**30)


def copy_as_in_a_step(job: Job) -> None:
    """Bring every swapped block to the device, forward and back, with nothing between."""
    assert job.swapper is not None
    for index in job.swapper.order:
        job.swapper.prefetch(index, forward=True)
    for index in reversed(job.swapper.order):
        job.swapper.prefetch(index, forward=False)


def copied_bytes(job: Job) -> int:
    """What `copy_as_in_a_step` copies: blocks that are still there from the forward are not copied again."""
    assert job.swapper is not None
    copy_as_in_a_step(job)
    before = job.swapper.copies
    copy_as_in_a_step(job)
    mean = job.swapper.host_bytes / len(job.swapper.order)
    return int((job.swapper.copies - before) * mean)


if __name__ == "__main__":
    main()
