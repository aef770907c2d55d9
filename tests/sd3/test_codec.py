"""A model that visits the device is there when it works, and nowhere near when it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.sd3.codec import offload_to_cpu, onload

ELSEWHERE = torch.device("cuda", 0)  # its moves are noted, so that no such device is needed


class Traveller(nn.Module):
    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def to(self, place):  # type: ignore[override]
        self.places.append(torch.device(place).type)
        return self


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(True))
    return calls


def test_an_onloaded_model_is_offloaded_and_its_memory_released(emptied: list[bool]) -> None:
    model = Traveller()
    with onload(model, ELSEWHERE, keep_resident=False):
        assert model.places == ["cuda"] and not emptied
    assert model.places == ["cuda", "cpu"] and emptied == [True]


def test_an_onloaded_model_is_offloaded_after_an_error(emptied: list[bool]) -> None:
    model = Traveller()
    with pytest.raises(ValueError), onload(model, ELSEWHERE, keep_resident=False):
        raise ValueError
    assert model.places == ["cuda", "cpu"]


def test_one_that_stays_is_not_moved_away(emptied: list[bool]) -> None:
    model = Traveller()
    with onload(model, ELSEWHERE, keep_resident=True):
        pass
    assert model.places == ["cuda"] and not emptied


def test_on_the_cpu_there_is_nowhere_to_go() -> None:
    model = Traveller()
    offload_to_cpu(model, torch.device("cpu"))
    with onload(model, torch.device("cpu"), keep_resident=False):
        pass
    assert model.places == ["cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_is_free_between_visits() -> None:
    model, device = nn.Linear(1024, 1024), torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    with onload(model, device, keep_resident=False):
        assert torch.cuda.memory_allocated(device) - before >= 4 << 20
    assert torch.cuda.memory_allocated(device) == before and model.weight.device.type == "cpu"
