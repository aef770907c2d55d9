"""Progress where there is no terminal: a line every so often, for logs and people."""

from __future__ import annotations

import logging
import re

import pytest

from library.common import progress
from library.common.progress import Progress, clock, progress_bar


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_lines_come_every_30_seconds_and_at_the_end(time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shown = Progress(100, "Training")
    for _ in range(100):
        time.now += 1.0
        shown.advance()
    shown.close()
    counts = [int(re.match(r"Training (\d+)/100", record.getMessage()).group(1)) for record in caplog.records]  # type: ignore[union-attr]
    assert counts == [31, 62, 93, 100]


def test_a_line_tells_rate_time_left_and_values(time: Clock) -> None:
    shown = Progress(200, "Training", start=100)
    time.now = 20.0
    shown.count = 110
    shown.note(avr_loss="0.1234")
    assert shown.line() == "Training 110/200 (55 %), 2.00 s each, 3:00 left, avr_loss=0.1234"


def test_what_comes_before_the_first_step_is_no_part_of_the_rate(time: Clock) -> None:
    shown = Progress(100, "Training", start=50)
    time.now = 40.0  # previews of the untrained model
    shown.starts_now()
    time.now = 42.0
    shown.advance()
    assert "2.00 s each, 1:38 left" in shown.line()
    shown.starts_now()  # later on, previews are a part of what is left
    time.now = 44.0
    shown.advance()
    assert "2.00 s each" in shown.line()


def test_there_are_no_control_characters_without_a_terminal(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress_bar(range(50), "Caching")) == list(range(50))
    shown = capsys.readouterr()
    text = shown.out + shown.err + "".join(record.getMessage() for record in caplog.records)
    assert "Caching 50/50" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x1b]", text)


def test_other_processes_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress_bar([1, 2], "Caching", shown=False)) == [1, 2]
    assert caplog.records == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3600, "1:00:00"), (7265, "2:01:05")])
def test_times(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_items_that_come_one_by_one_are_not_gathered_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    taken: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for number in range(3):
            taken.append(number)
            yield number

    for number in progress_bar(items(), "Validation", total=3):
        assert taken == list(range(number + 1))
    assert "Validation 3/3" in caplog.text


def test_a_single_item_needs_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress_bar(["x"], "Caching")) == ["x"]
    assert caplog.records == []


def test_nothing_to_do_is_no_division_by_zero() -> None:
    assert list(progress_bar([], "Caching")) == []
    assert "0/0" in Progress(0, "Training").line()
