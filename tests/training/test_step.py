"""A training step's parts: clipping, skipping of bad steps, weighting of micro-batches."""

import copy

import pytest
import torch
from torch import nn

from library.training.optimizers import build_optimizer
from library.training.step import clip_gradients, step_if_finite

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


def test_accumulated_gradients_equal_those_of_the_large_batch():
    model = nn.Linear(6, 3)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    large, small = copy.deepcopy(model), copy.deepcopy(model)
    large(inputs).square().flatten(1).mean(1).mean().backward()
    for micro in inputs.split(2):
        (small(micro).square().flatten(1).mean(1).mean() / 4).backward()
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
