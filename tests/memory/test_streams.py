"""On a GPU copies run beside the computation: nothing is read before it has arrived, nothing overwritten while it is used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.common.transformer import call_block
from library.memory.block_swap import BlockSwapper
from library.memory.checkpointing import ActivationOffloader, CheckpointSettings, checkpointed
from tests.memory.streams import ActedStreams, SideStream
from tests.memory.test_block_swap import CPU, DEPTH, model_with_adapter
from tests.sd3.test_mmdit import inputs

GPU = torch.device("cuda")  # of which nothing is asked but its name


def recomputed(index, block, context, x, c):
    return checkpoint(call_block, index, block, context, x, c, use_reentrant=False)


@pytest.mark.parametrize("swapped", [[2], [0, 3], [0, 2, 3, 5], list(range(DEPTH))], ids=len)
@pytest.mark.parametrize("run", [call_block, recomputed], ids=["plain", "checkpointed"])
def test_block_swap_waits_for_what_it_reads_and_for_what_it_overwrites(monkeypatch, swapped: list[int], run):
    plain, plain_adapter = model_with_adapter()
    given = inputs(plain.config, 8, 8)
    model, adapter = model_with_adapter()
    used: dict[int, int] = {}  # when a buffer was used last, in the compute stream's time

    def not_in_use(stream: SideStream, target: Tensor) -> None:
        before = used.get(target.data_ptr(), 1)  # or what its memory was before
        assert stream.seen >= before, "a buffer is overwritten before its last use was waited for"

    streams = ActedStreams(monkeypatch, not_in_use)
    swapper = BlockSwapper(model.joint_blocks, swapped, GPU)
    assert {slot.buffer.data_ptr() for slot in swapper.slots} == streams.side.kept
    for slot in swapper.slots:
        slot.buffer.fill_(255)  # NaN where weights are missing
    prefetch = swapper.prefetch

    def noted_prefetch(index: int, forward: bool) -> None:
        for slot in swapper.slots:  # all that was issued until now has used what is in use
            if slot.in_use:
                used[slot.buffer.data_ptr()] = streams.compute.time + 1
        prefetch(index, forward)

    swapper.prefetch = noted_prefetch
    model.run_block = swapper.runner(run)
    for _ in range(2):
        plain(**given).square().mean().backward()
        model(**given).square().mean().backward()
        with torch.no_grad():
            assert torch.equal(plain(**given), model(**given))
    assert torch.equal(plain_adapter.grad, adapter.grad)
    assert swapper.copies


def offloaded(monkeypatch) -> tuple[torch.nn.Module, torch.nn.Parameter, ActivationOffloader, ActedStreams]:
    model, adapter = model_with_adapter()
    offloader = ActivationOffloader(CPU)
    streams = ActedStreams(monkeypatch)
    offloader.streams, offloader.stream = True, streams.side
    model.run_block = checkpointed(call_block, CheckpointSettings(offload=True), offloader)
    return model, adapter, offloader, streams


def test_offloaded_inputs_are_waited_for_and_their_memory_is_kept(monkeypatch):
    plain, plain_adapter = model_with_adapter()
    given = inputs(plain.config, 8, 8)
    for _ in range(2):
        plain(**given).square().mean().backward()
    model, adapter, offloader, streams = offloaded(monkeypatch)
    sent: set[int] = set()
    pack = offloader._pack

    def noted_pack(index: int, tensor: Tensor):
        kept = pack(index, tensor)
        if not isinstance(kept, Tensor):
            sent.add(tensor.untyped_storage().data_ptr())
        return kept

    offloader._pack = noted_pack
    for _ in range(2):  # the second step fills the host buffers of the first again
        model(**given).square().mean().backward()
    torch.testing.assert_close(adapter.grad, plain_adapter.grad, rtol=1e-6, atol=1e-7)
    assert sent and sent <= streams.side.kept


def test_what_is_fetched_ahead_is_not_waited_for(monkeypatch):
    """A block's recomputation starts when its own inputs are there: those of the block before arrive meanwhile."""
    model, _, _, streams = offloaded(monkeypatch)
    out = model(**inputs(model.config, 8, 8)).square().mean()
    under_way: dict[int, int] = {}  # copies that a block's recomputation did not wait for

    for index, block in enumerate(model.joint_blocks):
        block.register_forward_pre_hook(
            lambda module, args, index=index: under_way.update({index: len(streams.side.waiting)})
        )
    out.backward()
    assert [under_way[index] for index in range(DEPTH)] == [0, *[2] * (DEPTH - 1)]  # context and x of the block before
