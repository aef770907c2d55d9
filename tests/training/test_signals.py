"""Ctrl-C and SIGTERM: asked once, a run ends in order; asked twice, at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from library.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
        assert signals.exit_code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process in another way")
def test_the_second_signal_ends_at_once() -> None:
    code = (
        "import signal\nfrom library.training.signals import StopSignals\n"
        "with StopSignals():\n    signal.raise_signal(15)\n    print('asked', flush=True)\n    signal.raise_signal(15)\n    print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "asked\n" and done.returncode == -signal.SIGTERM


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[object] = []

    def work() -> None:
        with StopSignals() as signals:
            found.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
