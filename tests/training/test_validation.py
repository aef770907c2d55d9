"""Validation: the same generators every time, so that its numbers can be compared."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from library.common.seeds import StepGenerators
from library.training.step import BatchLosses
from library.training.validation import validate

CPU = torch.device("cpu")


@dataclass
class Held:
    loss_weights: Tensor


@dataclass
class Losses:
    """Loss = weight + noise drawn + timestep / 1000, and a note of what was seen."""

    weight: float = 0.0
    seen: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, batch: Held, generators: StepGenerators, timestep: int) -> BatchLosses:
        noise = torch.rand(len(batch.loss_weights), generator=generators.device)
        random.random()
        torch.rand(1)
        self.seen.append((timestep, noise[0].item()))
        return BatchLosses(self.weight + noise + timestep / 1000, torch.full((len(noise),), float(timestep)))


BATCHES = [Held(torch.ones(2)), Held(torch.ones(3)), Held(torch.tensor([1.0, 0.0]))]


def run(
    losses: Losses,
    seed: int = 1,
    most: int | None = None,
    timesteps: tuple[int, ...] = (100, 900),
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    batches = BATCHES[share[0] :: share[1]]
    return validate(batches, losses, timesteps, seed, most, StepGenerators(CPU), [], share=share)


def test_the_same_weights_give_the_same_number_at_any_step() -> None:
    first, second = Losses(), Losses()
    torch.manual_seed(1)
    before = run(first)
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(before, run(second)) and first.seen == second.seen


def test_a_change_of_the_weights_shows_through_the_noise() -> None:
    before, after = run(Losses(0.0)), run(Losses(0.25))
    assert (after[0] / after[1] - before[0] / before[1]).item() == pytest.approx(0.25, abs=1e-6)


def test_every_batch_is_seen_at_every_timestep_with_its_own_noise() -> None:
    losses = Losses()
    run(losses)
    assert [timestep for timestep, _ in losses.seen] == [100, 900] * 3
    assert len({noise for _, noise in losses.seen}) == 6


def test_images_are_counted_once_a_timestep_and_fillers_not_at_all() -> None:
    assert run(Losses())[1] == 2 * (2 + 3 + 1)


def test_the_number_of_batches_can_be_bounded() -> None:
    assert run(Losses(), most=1)[1] == 2 * 2


def test_several_processes_together_find_what_one_finds() -> None:
    shares = [run(Losses(), share=(rank, 2)) for rank in range(2)]
    torch.testing.assert_close(shares[0] + shares[1], run(Losses()))


def test_another_seed_draws_other_noise() -> None:
    assert not torch.equal(run(Losses(), seed=1), run(Losses(), seed=2))


def test_training_does_not_notice_validation() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    modes: list[bool] = []

    def losses(batch: Held, generators: StepGenerators, timestep: int) -> BatchLosses:
        modes.append(model.training)
        assert not torch.is_grad_enabled()
        return Losses()(batch, generators, timestep)

    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(3)
    random.seed(5)
    torch.manual_seed(5)
    validate(BATCHES, losses, (500,), 1, None, StepGenerators(CPU), [model])
    assert random.random() == expected[0] and torch.equal(torch.rand(3), expected[1])
    assert model.training and modes == [False] * 3
