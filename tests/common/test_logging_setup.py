"""Log lines: which stream gets them, and that they do not run into a progress bar."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from library.common.logging_setup import ConsoleHandler
from library.common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.console")
    logger.propagate = False
    logger.setLevel("INFO")
    yield logger
    logger.handlers.clear()


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_a_line_of_the_log_does_not_run_into_the_bar(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, level: str
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger.addHandler(ConsoleHandler())
    progress = Progress(10, "Training")
    progress.advance(3)
    logger.log(getattr(logging, level), "saved a.safetensors")
    progress.close()
    lines = terminal.getvalue().split("\n")
    shown = [line.rsplit("\r", 1)[-1] for line in lines]  # what stays on the screen
    assert shown[0] == "saved a.safetensors"
    assert shown[1].startswith("Training:")


def test_warnings_go_to_stderr_and_the_rest_to_stdout(logger: logging.Logger, capsys: pytest.CaptureFixture[str]):
    logger.addHandler(ConsoleHandler())
    logger.info("a step")
    logger.warning("a warning")
    logger.error("an error")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a step\n", "a warning\nan error\n")
    logger.handlers[:] = [ConsoleHandler(all_to_stderr=True)]
    logger.info("a step")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "a step\n")


def test_a_stream_that_lacks_a_letter_gets_an_escape(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    logger.addHandler(ConsoleHandler())
    logger.info("層 1")
    assert raw.getvalue() == b"\\u5c64 1\n"
