"""The flat all-reduce over two real processes."""

import torch
import torch.distributed as dist
from torch import nn

from library.distributed.gradients import GradientReducer
from tests.warm_processes import run_ranks

SHAPES = ((4, 7), (5,), (2, 3, 2))


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for each in made:
        each.grad = torch.randn(each.shape, generator=generator).to(dtype)
    return made


def _reduce_on(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        made = parameters(dtype, seed=rank)
        made[1].grad = None if rank == 0 else made[1].grad
        made[2].grad = None
        reducer = GradientReducer(made, 2)
        storage = reducer.buffer.data_ptr()
        reducer.reduce()
        once = [each.grad.clone() for each in made]
        reducer.reduce()  # equal gradients stay as they are, in the same buffer
        stable = all(map(torch.equal, once, [each.grad for each in made])) and reducer.buffer.data_ptr() == storage
        kept = all(each.grad.dtype == dtype for each in made)
        results.append((str(dtype), stable and kept, [each.float() for each in once]))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_mean_gradient(tmp_path):
    run_ranks(_reduce_on, str(tmp_path))
    got = [result for rank in range(2) for result in torch.load(tmp_path / f"{rank}.pt")]
    for dtype in (torch.float32, torch.bfloat16):
        zero, one = parameters(dtype, seed=0), parameters(dtype, seed=1)
        means = [(zero[0].grad.float() + one[0].grad.float()) / 2, one[1].grad.float() / 2, torch.zeros(SHAPES[2])]
        of_both = [(good, gradients) for name, good, gradients in got if name == str(dtype)]
        assert len(of_both) == 2
        for good, gradients in of_both:
            assert good
            for gradient, mean in zip(gradients, means, strict=True):
                assert torch.equal(gradient, mean.to(dtype).float())


def test_a_single_process_reduces_nothing():
    made = parameters()
    made[2].grad = None
    before = made[0].grad.clone()
    GradientReducer(made, 1).reduce()
    assert torch.equal(made[0].grad, before) and made[2].grad is None
