"""The choice among memory options: what fits is taken, what is given stays, more room is never slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from library.common.transformer import BlockFlops
from library.memory.block_swap import swap_limit
from library.memory.estimator.planner import (
    ALL_BLOCKS,
    MemoryOptions,
    ModelBytes,
    SearchSpace,
    StepMemoryEstimator,
    TrainedBytes,
    choose,
    combinations,
)
from library.memory.estimator.step_memory import BlockCost, PassCost
from library.memory.estimator.table import MemoryPlan, Phase

DEPTH, MB = 8, 2**20
PASSES = {
    "none": PassCost(5 * MB, (BlockCost(120 * MB, 100 * MB, 0, 20 * MB),) * DEPTH, 8 * MB),
    "pointwise": PassCost(5 * MB, (BlockCost(110 * MB, 60 * MB, 0, 60 * MB),) * DEPTH, 8 * MB),
    "selective": PassCost(5 * MB, (BlockCost(80 * MB, 20 * MB, 0, 110 * MB),) * DEPTH, 8 * MB),
    "full": PassCost(5 * MB, (BlockCost(80 * MB, 10 * MB, 0, 120 * MB),) * DEPTH, 8 * MB),
}
MODELS = {
    None: ModelBytes((200 * MB,) * DEPTH, 50 * MB, PASSES),
    "fp8": ModelBytes((100 * MB,) * DEPTH, 50 * MB, PASSES),
}
TRAINED = TrainedBytes(20 * MB, (2 * MB,) * DEPTH, 0, 40 * MB, 0, 0)
ESTIMATOR = StepMemoryEstimator(MODELS, TRAINED, 0, 0, 10 * MB, (BlockFlops(4e11, 1e11),) * DEPTH)
ENOUGH = 2**50


def total(options: MemoryOptions) -> int:
    return ESTIMATOR.step_bytes(options).total


def test_nothing_is_given_up_where_all_fits():
    assert choose(ESTIMATOR, SearchSpace(), ENOUGH, ENOUGH) == (MemoryOptions(), True)


def test_the_peak_without_options_is_all_weights_and_all_activations():
    # the last block's backward starts when all have kept theirs
    assert total(MemoryOptions()) == (50 + 8 * 200 + 60) * MB + (5 + 8 * 100 + 20) * MB
    assert total(MemoryOptions("full", DEPTH)) == (50 + 8 * 200 + 60) * MB + (5 + 8 * 10 + 120) * MB
    assert total(MemoryOptions("full", DEPTH, swap=6)) == total(MemoryOptions("full", DEPTH)) - (6 - 2) * 200 * MB


@settings(max_examples=60, deadline=None)
@given(st.integers(300, 2700), st.integers(0, 1700))
def test_the_choice_fits_and_more_room_is_never_slower(device_mb: int, host_mb: int):
    options, fits = choose(ESTIMATOR, SearchSpace(), device_mb * MB, host_mb * MB)
    if not fits:
        return
    assert total(options) <= device_mb * MB and ESTIMATOR.host_bytes(options) <= host_mb * MB
    assert options.swap <= swap_limit(DEPTH)
    more, _ = choose(ESTIMATOR, SearchSpace(), (device_mb + 100) * MB, host_mb * MB)
    exact = (options.quantization, more.quantization) == (None, None)
    assert not exact or ESTIMATOR.seconds(more) <= ESTIMATOR.seconds(options)


def test_rounded_weights_are_taken_only_where_nothing_exact_fits():
    least = min(total(options) for options in combinations(ESTIMATOR, SearchSpace(), None))
    options, fits = choose(ESTIMATOR, SearchSpace(), least, ENOUGH)
    assert fits and options.quantization is None
    options, fits = choose(ESTIMATOR, SearchSpace(), least - MB, ENOUGH)
    assert fits and options.quantization == "fp8"
    options, fits = choose(ESTIMATOR, SearchSpace(), 1200 * MB, 0)  # without host memory blocks stay on the device
    assert fits and (options.swap, options.quantization) == (0, "fp8")


def test_what_was_given_stays():
    wanted = SearchSpace(
        ("full",), ALL_BLOCKS, (False,), (False,), None, (None,)
    )  # --gradient_checkpointing --blocks_to_swap auto
    room = total(MemoryOptions("full", DEPTH, swap=4))
    assert choose(ESTIMATOR, wanted, room, ENOUGH) == (MemoryOptions("full", DEPTH, swap=4), True)
    assert choose(ESTIMATOR, wanted, ENOUGH, ENOUGH)[0] == MemoryOptions("full", DEPTH)
    assert choose(ESTIMATOR, replace(wanted, swap=32), ENOUGH, ENOUGH)[0].swap == swap_limit(DEPTH)


def test_where_nothing_fits_the_least_is_told():
    options, fits = choose(ESTIMATOR, SearchSpace(), 1, ENOUGH)
    assert not fits and options.quantization == "fp8" and options.swap == swap_limit(DEPTH)


def test_other_moments_of_the_run_count():
    """A preview that needs more than a step makes blocks swap that a step alone would leave."""
    room = total(MemoryOptions()) + MB
    assert choose(ESTIMATOR, SearchSpace(), room, ENOUGH)[0] == MemoryOptions()
    options, fits = choose(
        ESTIMATOR, SearchSpace(), room, ENOUGH, beside=room - ESTIMATOR.base_bytes(MemoryOptions(swap=4))
    )
    assert fits and options.swap >= 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MemoryOptions(), []),
        (MemoryOptions("full", DEPTH), ["--gradient_checkpointing"]),
        (MemoryOptions("full", 3), ["--gradient_checkpointing", "--gradient_checkpointing_blocks 3"]),
        (MemoryOptions("selective", DEPTH), ["--gradient_checkpointing", "--selective_checkpointing"]),
        (MemoryOptions("full", DEPTH, True), ["--gradient_checkpointing", "--cpu_offload_checkpointing"]),
        (
            MemoryOptions("full", 3, recompute_pointwise=True),
            ["--gradient_checkpointing", "--gradient_checkpointing_blocks 3", "--lean_activations"],
        ),
        (MemoryOptions(swap=3, quantization="fp8"), ["--blocks_to_swap 3", "--fp8_base_unet"]),
        (MemoryOptions(quantization="nf4"), ["--base_quantization nf4"]),
    ],
)
def test_a_choice_is_told_in_options(options: MemoryOptions, words: list[str]):
    assert options.flags(DEPTH) == words


def test_the_table_names_every_part_and_the_ways_not_taken():
    phases = [Phase("images encoded", 2 * 2**30)]
    plan = MemoryPlan(
        MemoryOptions("full", DEPTH), False, True, ESTIMATOR, phases, 2 * 2**30, "--vram 2", "batches of 1"
    )
    text = plan.text()
    for part in ("images encoded", "training step", "base weights", "activations", "--vram 2", "does not fit", "fits"):
        assert part in text
    assert plan.peak == 2 * 2**30
    assert "Chosen: --gradient_checkpointing\n" in text
