"""The moving average of weights: its formula, its swap, its state."""

import numpy as np
import pytest
import torch
from torch import nn

from library.common.errors import UserError
from library.training.ema import WeightEma


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)) for name in ("down", "up")}


def move(live, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for each in live.values():
            each.add_(torch.randn(each.shape, generator=generator).to(each.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_follows_the_formula(decay, dtype):
    live = weights(dtype)
    ema = WeightEma(live, decay)
    expected = live["up"].detach().double().numpy()
    for step in range(20):
        move(live, step)
        ema.update()
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * live["up"].detach().double().numpy()
    np.testing.assert_allclose(ema.averages["up"].double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert ema.averages["up"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_shows_the_averages_and_gives_the_same_weights_back(dtype):
    live = weights(dtype)
    ema = WeightEma(live, 0.9)
    for step in range(5):
        move(live, step)
        ema.update()
    before = {name: each.detach().clone() for name, each in live.items()}
    pointers = {name: each.data_ptr() for name, each in live.items()}
    with pytest.raises(RuntimeError, match="while saving"), ema.swapped():
        for name, each in live.items():
            assert torch.equal(each, ema.averages[name].to(dtype)) and not torch.equal(each, before[name])
        raise RuntimeError("while saving")
    for name, each in live.items():
        assert torch.equal(each, before[name]) and each.data_ptr() == pointers[name]


def test_resumes_to_the_bit():
    unbroken = weights()
    whole = WeightEma(unbroken, 0.99)
    for step in range(9):
        move(unbroken, step)
        whole.update()
    live = weights()
    first = WeightEma(live, 0.99)
    for step in range(4):
        move(live, step)
        first.update()
    state = first.state_dict()
    resumed = WeightEma(live, 0.99)
    for step in range(4, 9):
        if step == 4:
            first.update()  # the saved state is a copy, which later updates don't reach
            resumed.load_state_dict(state)
        move(live, step)
        resumed.update()
    assert resumed.updates == whole.updates
    assert all(torch.equal(resumed.averages[name], whole.averages[name]) for name in live)


def test_bad_decay_and_foreign_state_are_refused():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="--ema_decay"):
            WeightEma(weights(), decay)
    other = WeightEma({"down": torch.zeros(2, 4), "up": torch.zeros(3, 4)}, 0.9)
    with pytest.raises(UserError, match="layers or ranks"):
        WeightEma(weights(), 0.9).load_state_dict(other.state_dict())
