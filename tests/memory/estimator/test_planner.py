"""The choice among memory options: what fits is taken, what is given stays, more room is never slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.memory.block_swap import swap_limit
from library.memory.estimator.planner import (
    EVERY,
    Levers,
    ModelBytes,
    StepReckoner,
    TrainedBytes,
    Wanted,
    choose,
    combinations,
)
from library.memory.estimator.step_memory import BlockCost, BlockWork, PassCost
from library.memory.estimator.table import MemoryPlan, Phase

DEPTH, MB = 8, 2**20
PASSES = {
    "none": PassCost(5 * MB, (BlockCost(120 * MB, 100 * MB, 0, 20 * MB),) * DEPTH, 8 * MB),
    "lean": PassCost(5 * MB, (BlockCost(110 * MB, 60 * MB, 0, 60 * MB),) * DEPTH, 8 * MB),
    "selective": PassCost(5 * MB, (BlockCost(80 * MB, 20 * MB, 0, 110 * MB),) * DEPTH, 8 * MB),
    "full": PassCost(5 * MB, (BlockCost(80 * MB, 10 * MB, 0, 120 * MB),) * DEPTH, 8 * MB),
}
MODELS = {
    None: ModelBytes((200 * MB,) * DEPTH, 50 * MB, PASSES),
    "fp8": ModelBytes((100 * MB,) * DEPTH, 50 * MB, PASSES),
}
TRAINED = TrainedBytes(20 * MB, (2 * MB,) * DEPTH, 0, 40 * MB, 0, 0)
RECKONER = StepReckoner(MODELS, TRAINED, 0, 0, 10 * MB, (BlockWork(4e11, 1e11),) * DEPTH)
ENOUGH = 2**50


def total(levers: Levers) -> int:
    return RECKONER.step_bytes(levers).total


def test_nothing_is_given_up_where_all_fits():
    assert choose(RECKONER, Wanted(), ENOUGH, ENOUGH) == (Levers(), True)


def test_the_peak_without_options_is_all_weights_and_all_activations():
    # the last block's backward starts when all have kept theirs
    assert total(Levers()) == (50 + 8 * 200 + 60) * MB + (5 + 8 * 100 + 20) * MB
    assert total(Levers("full", DEPTH)) == (50 + 8 * 200 + 60) * MB + (5 + 8 * 10 + 120) * MB
    assert total(Levers("full", DEPTH, swap=6)) == total(Levers("full", DEPTH)) - (6 - 2) * 200 * MB


@settings(max_examples=60, deadline=None)
@given(st.integers(300, 2700), st.integers(0, 1700))
def test_the_choice_fits_and_more_room_is_never_slower(device_mb: int, host_mb: int):
    levers, fits = choose(RECKONER, Wanted(), device_mb * MB, host_mb * MB)
    if not fits:
        return
    assert total(levers) <= device_mb * MB and RECKONER.host_bytes(levers) <= host_mb * MB
    assert levers.swap <= swap_limit(DEPTH)
    more, _ = choose(RECKONER, Wanted(), (device_mb + 100) * MB, host_mb * MB)
    exact = (levers.quantisation, more.quantisation) == (None, None)
    assert not exact or RECKONER.seconds(more) <= RECKONER.seconds(levers)


def test_rounded_weights_are_taken_only_where_nothing_exact_fits():
    least = min(total(levers) for levers in combinations(RECKONER, Wanted(), None))
    levers, fits = choose(RECKONER, Wanted(), least, ENOUGH)
    assert fits and levers.quantisation is None
    levers, fits = choose(RECKONER, Wanted(), least - MB, ENOUGH)
    assert fits and levers.quantisation == "fp8"
    levers, fits = choose(RECKONER, Wanted(), 1200 * MB, 0)  # without host memory blocks stay on the device
    assert fits and (levers.swap, levers.quantisation) == (0, "fp8")


def test_what_was_given_stays():
    wanted = Wanted(
        ("full",), EVERY, (False,), (False,), None, (None,)
    )  # --gradient_checkpointing --blocks_to_swap auto
    room = total(Levers("full", DEPTH, swap=4))
    assert choose(RECKONER, wanted, room, ENOUGH) == (Levers("full", DEPTH, swap=4), True)
    assert choose(RECKONER, wanted, ENOUGH, ENOUGH)[0] == Levers("full", DEPTH)
    assert choose(RECKONER, replace(wanted, swap=32), ENOUGH, ENOUGH)[0].swap == swap_limit(DEPTH)


def test_where_nothing_fits_the_least_is_told():
    levers, fits = choose(RECKONER, Wanted(), 1, ENOUGH)
    assert not fits and levers.quantisation == "fp8" and levers.swap == swap_limit(DEPTH)


def test_other_moments_of_the_run_count():
    """A preview that needs more than a step makes blocks swap that a step alone would leave."""
    room = total(Levers()) + MB
    assert choose(RECKONER, Wanted(), room, ENOUGH)[0] == Levers()
    levers, fits = choose(RECKONER, Wanted(), room, ENOUGH, beside=room - RECKONER.base_bytes(Levers(swap=4)))
    assert fits and levers.swap >= 4


@pytest.mark.parametrize(
    ("levers", "words"),
    [
        (Levers(), []),
        (Levers("full", DEPTH), ["--gradient_checkpointing"]),
        (Levers("full", 3), ["--gradient_checkpointing", "--gradient_checkpointing_blocks 3"]),
        (Levers("selective", DEPTH), ["--gradient_checkpointing", "--selective_checkpointing"]),
        (Levers("full", DEPTH, True), ["--gradient_checkpointing", "--cpu_offload_checkpointing"]),
        (
            Levers("full", 3, lean=True),
            ["--gradient_checkpointing", "--gradient_checkpointing_blocks 3", "--lean_activations"],
        ),
        (Levers(swap=3, quantisation="fp8"), ["--blocks_to_swap 3", "--fp8_base_unet"]),
        (Levers(quantisation="nf4"), ["--base_quantization nf4"]),
    ],
)
def test_a_choice_is_told_in_options(levers: Levers, words: list[str]):
    assert levers.options(DEPTH) == words


def test_the_table_names_every_part_and_the_ways_not_taken():
    phases = [Phase("images encoded", 2 * 2**30)]
    plan = MemoryPlan(Levers("full", DEPTH), False, True, RECKONER, phases, 2 * 2**30, "--vram 2", "batches of 1")
    text = plan.text()
    for part in ("images encoded", "training step", "base weights", "activations", "--vram 2", "does not fit", "fits"):
        assert part in text
    assert plan.peak == 2 * 2**30
    assert "Chosen: --gradient_checkpointing\n" in text
