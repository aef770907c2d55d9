"""Clipping, skipping of bad steps, the flat all-reduce over two real processes, and the loss scale."""

import copy
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from library.distributed.gradients import GradientReducer, LossScaler, clip_gradients, step_if_finite
from library.training.optimizers import build_optimizer

SHAPES = ((4, 7), (5,), (2, 3, 2))


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for each in made:
        each.grad = torch.randn(each.shape, generator=generator).to(dtype)
    return made


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_zero_means_no_clipping_and_missing_gradients_are_passed_over():
    made = parameters()
    made[1].grad = None
    before = made[0].grad.clone()
    norm = clip_gradients(made, 0.0)
    exact = (made[0].grad.double().square().sum() + made[2].grad.double().square().sum()).sqrt()
    assert torch.equal(made[0].grad, before) and norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_half_precision_gradients_is_taken_in_float32(dtype):
    made = parameters(dtype)
    exact = torch.stack([each.grad.double().square().sum() for each in made]).sum().sqrt().item()
    norm = clip_gradients(made, 0.5)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-6)
    assert all(each.grad.dtype == dtype for each in made)
    assert clip_gradients(made, 0.0).item() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["AdamW", "SGDNesterov", "Lion", "AdamW8bit", "Prodigy"])
def test_a_nonfinite_step_leaves_weights_and_state_alone(name, bad):
    def run(steps):
        made = parameters()
        bundle = build_optimizer(name, [{"params": made, "lr": 1.0}], 1.0)
        for value in steps:
            for index, each in enumerate(made):
                each.grad = torch.full_like(each, value if index == 1 else 0.3)
            norm = clip_gradients(made, 1.0)
            step_if_finite(bundle.optimizer, ~torch.isfinite(norm))
        return [*made, *(state["step"] for state in bundle.optimizer.state.values() if "step" in state)]

    for a, b in zip(run([0.1, bad, 0.2]), run([0.1, 0.2]), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_fused_step_is_skipped_without_reading_the_flag(monkeypatch):
    made = parameters()
    bundle = build_optimizer("AdamW", [{"params": made, "lr": 1.0}], 1.0)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("waited for the device"))
    before = made[0].detach().clone()
    step_if_finite(bundle.optimizer, torch.tensor(True))
    monkeypatch.undo()
    assert torch.equal(made[0], before) and not hasattr(bundle.optimizer, "found_inf")
    step_if_finite(bundle.optimizer, torch.tensor(False))
    assert not torch.equal(made[0], before)


def _reduce_on(rank, port, results):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for dtype in (torch.float32, torch.bfloat16):
        made = parameters(dtype, seed=rank)
        made[1].grad = None if rank == 0 else made[1].grad
        made[2].grad = None
        reducer = GradientReducer(made, 2)
        storage = reducer.buffer.data_ptr()
        reducer.all_reduce()
        once = [each.grad.clone() for each in made]
        reducer.all_reduce()  # equal gradients stay as they are, in the same buffer
        stable = all(map(torch.equal, once, [each.grad for each in made])) and reducer.buffer.data_ptr() == storage
        kept = all(each.grad.dtype == dtype for each in made)
        results.put((rank, str(dtype), stable and kept, [each.float().numpy() for each in once]))
    dist.destroy_process_group()


def test_two_processes_get_the_mean_gradient(unused_port):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_reduce_on, args=(rank, unused_port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(timeout=60)
    for dtype in (torch.float32, torch.bfloat16):
        zero, one = parameters(dtype, seed=0), parameters(dtype, seed=1)
        means = [(zero[0].grad.float() + one[0].grad.float()) / 2, one[1].grad.float() / 2, torch.zeros(SHAPES[2])]
        of_both = [(good, gradients) for _rank, name, good, gradients in got if name == str(dtype)]
        assert len(of_both) == 2
        for good, gradients in of_both:
            assert good
            for gradient, mean in zip(gradients, means, strict=True):
                assert torch.equal(torch.from_numpy(gradient), mean.to(dtype).float())


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_single_process_reduces_nothing():
    made = parameters()
    made[2].grad = None
    before = made[0].grad.clone()
    GradientReducer(made, 1).all_reduce()
    assert torch.equal(made[0].grad, before) and made[2].grad is None


def test_accumulated_gradients_equal_those_of_the_large_batch():
    model = nn.Linear(6, 3)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    large, small = copy.deepcopy(model), copy.deepcopy(model)
    large(inputs).square().flatten(1).mean(1).mean().backward()
    for micro in inputs.split(2):
        (small(micro).square().flatten(1).mean(1).mean() / 4).backward()
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_loss_scale_moves_as_torch_s_grad_scaler_does():
    ours = LossScaler("cpu", initial=1024.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for bad in [0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1]:
        optimizer.zero_grad()
        theirs.scale(weight.sum() * (float("inf") if bad else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(bool(bad)))
        assert ours.factor.item() == theirs.get_scale()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaling_and_unscaling_leave_the_gradient(dtype):
    scaler = LossScaler("cpu", initial=256.0)
    weight = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)).to(dtype))
    weight.square().sum().backward()
    expected, weight.grad = weight.grad, None
    scaler.scale(weight.square().sum()).backward()
    torch.testing.assert_close(weight.grad, expected * 256)
    scaler.unscale([weight])
    assert torch.equal(weight.grad, expected)


def test_loss_scale_resumes():
    scaler = LossScaler("cpu", initial=64.0, growth_interval=3)
    for bad in (False, True, False, False):
        scaler.update(torch.tensor(bad))
    other = LossScaler("cpu", growth_interval=3)
    other.load_state_dict(scaler.state_dict())
    for each in (scaler, other):
        each.update(torch.tensor(False))
    assert scaler.factor.item() == other.factor.item() == 64.0
