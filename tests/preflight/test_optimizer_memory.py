"""What an optimizer keeps, counted by letting it step."""

from __future__ import annotations

import pytest
import torch

from library.preflight.optimizer_memory import optimizer_cost


@pytest.mark.parametrize(("name", "states"), [("AdamW", 2.0), ("Lion", 1.0), ("SGD", 0.0), ("AdamW8bit", 0.5)])
def test_an_optimizers_state_is_counted(name: str, states: float):
    assert optimizer_cost(name, 1e-4, None, torch.float32).kept == pytest.approx(states, abs=0.02)
