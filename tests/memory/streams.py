"""A device's streams, acted out on a CPU, so that the order of copies can be tested where there is no GPU.

What a side stream is asked to do waits until the compute stream waits for it, and is done no earlier: work that reads a copy
without waiting finds old bytes. Time is counted on the compute stream: a side stream knows how far it has waited for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

copy_now, move_now, empty_now = Tensor.copy_, Tensor.to, torch.empty


@dataclass
class Event:
    stream: SideStream | None  # None: the compute stream
    moment: int


@dataclass
class ComputeStream:
    """Its work is done at once."""

    time: int = 0

    def record_event(self, event: Event | None = None) -> Event:
        self.time += 1
        return Event(None, self.time)

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None
        event.stream.work_until(event.moment)

    def wait_stream(self, stream: SideStream) -> None:
        stream.work_until(stream.asked)


@dataclass
class SideStream:
    on_copy: Callable[[SideStream, Tensor], None]  # called with the target of each copy when it is asked for
    asked: int = 0
    done: int = 0
    seen: int = 0  # the latest moment of the compute stream that was waited for
    waiting: list[Callable[[], Any]] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)  # addresses of tensors whose memory is kept until this stream is done

    def ask(self, work: Callable[[], Any]) -> None:
        self.waiting.append(work)
        self.asked += 1

    def work_until(self, moment: int) -> None:
        while self.done < moment:
            self.waiting.pop(0)()
            self.done += 1

    def record_event(self, event: Event | None = None) -> Event:
        return Event(self, self.asked)

    def wait_event(self, event: Event) -> None:
        assert event.stream is None
        self.seen = max(self.seen, event.moment)

    def wait_stream(self, stream: ComputeStream) -> None:
        stream.time += 1
        self.seen = stream.time


class ActedStreams:
    """Puts the actors in place of torch's: what is copied inside `torch.cuda.stream(side)` is asked of `side`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, on_copy: Callable[[SideStream, Tensor], None] = lambda s, t: None
    ):
        self.compute, self.side = ComputeStream(), SideStream(on_copy)
        self.current: SideStream | None = None
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", self._inside)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: self.side)
        monkeypatch.setattr(
            torch, "empty", lambda *args, pin_memory=False, device=None, **more: empty_now(*args, **more)
        )
        monkeypatch.setattr(Tensor, "copy_", lambda *args, **more: self._copy(*args, **more))
        monkeypatch.setattr(Tensor, "to", lambda *args, **more: self._to(*args, **more))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream))

    @contextmanager
    def _inside(self, stream: SideStream) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        stream = self.current
        if stream is None:
            return copy_now(target, source)
        assert non_blocking
        stream.on_copy(stream, target)
        target, source = target.detach(), source.detach()
        stream.ask(lambda: copy_now(target, source))
        return target

    def _to(self, tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        stream = self.current
        if stream is None:
            return move_now(tensor, *args, **more)
        assert more.get("non_blocking")
        target = torch.full_like(tensor, float("nan"))
        stream.ask(lambda: copy_now(target, tensor))
        return target

    def _record(self, tensor: Tensor, stream: Any) -> None:
        if isinstance(stream, SideStream):
            stream.kept.add(tensor.untyped_storage().data_ptr())
