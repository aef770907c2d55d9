"""Number formats: what was asked for where the device can, and a warning where it cannot."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from library.common.seeds import StepGenerators, fold_seed
from library.training.precision import LossScaler, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SEED_OF_1_2 = 1446411180646796515  # a saved state must mean the same draws in every version


@pytest.mark.parametrize(("asked", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_gpu_computes_in_what_was_asked_for(asked: str, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    precision = choose_precision(asked, False, False, GPU)
    assert (precision.dtype, precision.trained_dtype, precision.warnings) == (dtype, torch.float32, ())
    assert precision.scale_loss == (asked == "fp16")


def test_float16_on_a_cpu_becomes_bfloat16_with_a_warning():
    precision = choose_precision("fp16", True, False, CPU)
    assert precision.dtype == precision.trained_dtype == torch.bfloat16
    assert not precision.scale_loss and "bf16 is used instead" in precision.warnings[0]


def test_bfloat16_on_a_gpu_without_it_becomes_float16_with_loss_scaling(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    precision = choose_precision("bf16", False, True, GPU)
    assert precision.dtype == precision.trained_dtype == torch.float16
    assert precision.scale_loss and "fp16 is used instead" in precision.warnings[0]


def test_draws_depend_on_the_place_alone():
    def draw() -> tuple:
        return random.random(), torch.rand(1).item(), torch.rand(1, generator=draws.cpu).item()

    draws = StepGenerators(CPU)
    draws.seed(fold_seed(1, "a", 2))
    first = draw()
    torch.rand(100)
    draws.seed(fold_seed(1, "a", 2))
    assert draw() == first
    draws.seed(fold_seed(1, "a", 3))
    assert all(a != b for a, b in zip(draw(), first))


def test_seeds_are_well_mixed_and_the_same_everywhere():
    assert fold_seed(1, 2) == SEED_OF_1_2
    assert len({fold_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert fold_seed(12, 3) != fold_seed(1, 23)
    assert 0 <= fold_seed("x") < 2**63


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
    scaler.unscale_([weight])
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
