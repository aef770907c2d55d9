"""A swapped run computes what an unswapped one computes, to the bit, with few device buffers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from library.common.transformer import call_block
from library.memory.block_swap import BlockSwapper, evenly_spaced, move_resident, swap_limit
from library.sd3.mmdit import MMDiT
from tests.sd3.diffusers_models import randomised
from tests.sd3.test_mmdit import inputs, tiny_config

DEPTH = 6
CPU = torch.device("cpu")


def model_with_adapter() -> tuple[MMDiT, torch.nn.Parameter]:
    """A frozen model and one trained vector that enters at the first block."""
    model = randomised(MMDiT(tiny_config(depth=DEPTH, hidden_size=64, mlp_hidden_size=128, dual_attention_blocks=(1,))))
    adapter = torch.nn.Parameter(torch.full((64,), 0.1))
    model.x_embedder.register_forward_hook(lambda module, args, out: out + adapter)
    return model, adapter


def checkpointed(index, block, context, x, c):
    return checkpoint(call_block, index, block, context, x, c, use_reentrant=False)


def swap(model: MMDiT, swapped: list[int], run=call_block) -> BlockSwapper:
    move_resident(model, model.joint_blocks, swapped, CPU)
    swapper = BlockSwapper(model.joint_blocks, swapped, CPU)
    model.run_block = swapper.runner(run)
    return swapper


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("run", [call_block, checkpointed], ids=["plain", "checkpointed"])
def test_outputs_and_gradients_equal_the_unswapped_run(count: int, run):
    plain, plain_adapter = model_with_adapter()
    swapped, swapped_adapter = model_with_adapter()
    swap(swapped, evenly_spaced(DEPTH, count), run)
    given = inputs(plain.config, 8, 8)
    for _ in range(2):  # two steps with accumulation
        plain(**given).square().mean().backward()
        swapped(**given).square().mean().backward()
        with torch.no_grad():  # a preview between steps
            assert torch.equal(plain(**given), swapped(**given))
    assert torch.equal(plain_adapter.grad, swapped_adapter.grad)
    assert plain_adapter.grad.abs().max() > 0


def test_two_buffers_serve_all_blocks_and_weights_are_kept():
    model, _ = model_with_adapter()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swapper = swap(model, [0, 2, 3, 5])
    model(**inputs(model.config, 8, 8)).sum().backward()
    assert len(swapper.slots) == 2
    assert swapper.device_bytes == 2 * max(packed.host.numel() for packed in swapper.packed.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_each_block_is_copied_once_a_pass_and_the_turn_at_the_end_costs_none():
    model, _ = model_with_adapter()
    swapper = swap(model, [0, 1, 2, 3])
    given = inputs(model.config, 8, 8)
    model(**given).sum().backward()
    assert swapper.copies == 4 + 2  # forward; in backward blocks 3 and 2 are still there
    model(**given).sum().backward()
    assert swapper.copies == 6 + 2 + 2  # forward starts with blocks 0 and 1 in place


def test_swapped_blocks_are_spread_and_leave_two():
    assert evenly_spaced(24, 12) == list(range(1, 24, 2))
    assert len(set(evenly_spaced(38, 36))) == 36
    assert swap_limit(24) == 22
    assert swap_limit(1) == 0
