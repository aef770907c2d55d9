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


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGHUP nor SIGUSR1")


@POSIX
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR2"])
def test_a_closed_terminal_and_a_schedulers_warning_stop_the_run_in_order(name: str) -> None:
    with StopSignals() as signals:
        signal.raise_signal(getattr(signal, name))
        signal.raise_signal(getattr(signal, name))  # the shell sends it after the kernel: it must not end the save
        assert signals.received == getattr(signal, name)
        assert signals.exit_code == 128 + getattr(signal, name)


@POSIX
def test_a_warning_and_then_sigterm_still_ends_in_order() -> None:
    """Slurm and systemd send SIGTERM after what they warn with: the run is saving by then."""
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        assert signals.exit_code == 128 + signal.SIGTERM


@POSIX
def test_sigusr1_asks_for_one_save_and_not_for_an_end() -> None:
    with StopSignals() as signals:
        assert not signals.take_save_request()
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received is None
        assert signals.take_save_request() and not signals.take_save_request()


@POSIX
def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@POSIX
def test_output_to_a_closed_terminal_does_not_fail() -> None:
    code = (
        "import os, pty, signal, sys\nfrom library.training.signals import StopSignals\n"
        "master, slave = pty.openpty()\nos.dup2(slave, 2)\n"
        "with StopSignals():\n    os.close(master)\n    os.close(slave)\n    signal.raise_signal(signal.SIGHUP)\n"
        "    print('step 8', file=sys.stderr, flush=True)\nprint('saved')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "saved\n" and done.returncode == 0


@POSIX
def test_sigusr1_before_training_ends_nothing() -> None:
    code = (
        "import signal\nfrom library.training.signals import ignore_early_save_requests\n"
        "ignore_early_save_requests()\nsignal.raise_signal(signal.SIGUSR1)\nprint('going on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "going on\n" and "nothing to save yet" in done.stderr
