"""Signals in training: those that ask the run to finish its step, save and end, and SIGUSR1, which asks it to save and go on."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
URGENT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
"""A second one of these ends the process at once. SIGBREAK: Ctrl-Break on Windows."""
ORDERLY = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR2") if hasattr(signal, name))
"""A closed terminal, a scheduler's warning: these may come twice, or before a SIGTERM, while the run is saving."""
SAVE: int | None = getattr(signal, "SIGUSR1", None)


class StopSignals:
    """A context that catches the signals. `received` is the number of the one that stops the run, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._save_requested = False
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # Under nohup SIGHUP is ignored, and stays so.
            caught = [*URGENT, *(number for number in ORDERLY if signal.getsignal(number) is not signal.SIG_IGN)]
            self._before = {number: signal.signal(number, self._handle) for number in caught}
            if SAVE is not None:
                self._before[SAVE] = signal.signal(SAVE, self._request_save)
            self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended: 128 and the signal's number."""
        return 128 + (self.received or signal.SIGTERM)  # another process was told to stop

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 has been received since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def _request_save(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True
        logger.warning("SIGUSR1 received: LoRA and state are saved after this step, and training goes on.")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if self.received is not None:
            if number in URGENT and self.received in URGENT:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            elif number in URGENT:
                self.received = number
            return
        self.received = number
        logger.warning(
            "%s received: the step is finished, then everything is saved. Once more ends at once.",
            signal.Signals(number).name,
        )

    def _leave_terminals(self) -> None:
        """Write no more to a terminal that was closed: a log line or progress bar would fail, and the save with it."""
        for descriptor in self._terminals:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        self._terminals = []


def ignore_early_save_requests() -> None:
    """Have SIGUSR1 do nothing until training begins: its default would end the process."""
    if SAVE is not None and threading.current_thread() is threading.main_thread():
        signal.signal(
            SAVE, lambda number, frame: print("SIGUSR1 received: there is nothing to save yet.", file=sys.stderr)
        )


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
