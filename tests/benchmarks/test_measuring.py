"""Measurements of a command are right: its seconds, its memory, the numbers that it prints, the ratios."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.devices import device_peak, known_peak, measured_peak
from benchmarks.measuring import Program, compare, fill, other_program, report, reported_numbers, this_program
from benchmarks.process_monitor import GpuGrowth, own_peak_bytes, reset_high_water, run_monitored, used_gpu_mib

PYTHON = sys.executable
TAKES_MEMORY = "import time; block = bytearray(b'x') * (200 << 20); time.sleep(0.2); print(len(block))"
IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKES_MEMORY!r}], check=True)"


def test_a_command_is_monitored_with_its_children():
    own, child = run_monitored([PYTHON, "-c", TAKES_MEMORY]), run_monitored([PYTHON, "-c", IN_A_CHILD])
    for usage in (own, child):
        assert 200 < usage.peak_mib < 260
        assert 0.2 < usage.seconds < 20 and 0 < usage.cpu_seconds < usage.seconds + 0.5
        assert usage.output.strip() == str(200 << 20)


def test_the_first_sign_of_life_is_timed(tmp_path: Path):
    sign = tmp_path / "sign"
    code = f"import pathlib, time; pathlib.Path({str(sign)!r}).touch(); time.sleep(0.5)"
    usage = run_monitored([PYTHON, "-c", code], sign.exists)
    assert usage.first is not None and usage.first + 0.3 < usage.seconds


def test_a_failing_command_is_reported_with_its_output():
    with pytest.raises(SystemExit, match="no such thing"):
        run_monitored([PYTHON, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_this_process_can_be_reset():
    block = bytearray(b"x") * (100 << 20)
    high = own_peak_bytes()
    del block
    reset_high_water()
    assert own_peak_bytes() < high - (50 << 20)


def test_growth_of_gpu_memory_counts_from_the_start():
    readings = iter([500, 900, 700])
    growth = GpuGrowth(lambda: next(readings))
    for _ in range(2):
        growth.next_poll = 0.0
        growth.poll()
    assert growth.growth_mib == 400.0
    nothing = GpuGrowth(lambda: None)
    nothing.poll()
    assert nothing.growth_mib is None


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert used_gpu_mib() is None
    if os.name == "posix":
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 1200\necho 34\n")
        tool.chmod(0o755)
        assert used_gpu_mib() == 1234


def program(what: str, log: Path, **numbers: float) -> Program:
    printed = json.dumps({"rows": [{"what": what, **numbers}]})
    code = f"open({str(log)!r}, 'a').write({what!r}); print('a table'); print({printed!r})"
    return Program(what, [PYTHON, "-c", code])


def test_two_programs_run_in_turn_and_shared_numbers_have_a_ratio(tmp_path: Path):
    log, cleared = tmp_path / "log", []
    first, second = program("a", log, step_seconds=2.0, own=1.0), program("b", log, step_seconds=8.0)
    rows = compare(first, second, 2, lambda: cleared.append(1))
    assert log.read_text() == "abba" and len(cleared) == 4
    assert [row["what"] for row in rows] == ["a", "b", "ratio"]
    assert rows[2]["step_seconds"] == 0.25 and "own" not in rows[2]
    assert rows[2]["seconds"] == rows[0]["seconds"] / rows[1]["seconds"]


def test_seconds_a_step_are_the_difference_of_two_runs():
    text = f"{PYTHON} -c 'import time; time.sleep(0.3 + 0.1 * {{steps}})'"
    run = other_program(text, steps=(1, 5)).run()
    assert run["step_seconds"] == pytest.approx(0.1, abs=0.05)
    assert "step_seconds" not in other_program(f"{PYTHON} -c 'pass'", steps=(1, 5)).run()


def test_placeholders_are_filled_after_the_words_are_split():
    made = other_program("x --data {data} '{other} {data}'", {"data": "C:\\my files"})
    assert made.command == ["x", "--data", "C:\\my files", "{other} C:\\my files"]
    assert fill("{a}{b}", {"a": 1, "b": 2}) == "12"


def test_our_own_command_leaves_out_the_comparison():
    words = [
        "--against",
        "x y",
        "--scale",
        "0.5",
        "--json=f",
        "--rounds",
        "3",
        "--against=z",
        "--mixed_precision",
        "bf16",
    ]
    assert this_program("benchmarks.step", words).command[1:] == [
        *("-m", "benchmarks.step", "--scale", "0.5", "--mixed_precision", "bf16")
    ]


def test_items_a_second_count_from_launch():
    run = Program("x", [PYTHON, "-c", "pass"], items=10).run()
    assert run["items_per_second"] == pytest.approx(10 / run["seconds"])


@pytest.mark.parametrize("output", ["", "no json", "[]", '{"rows": []}', '{"rows": [3]}', "3"])
def test_output_without_json_has_no_numbers(output: str):
    assert reported_numbers(output) == {}


def test_table_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report("some", [{"what": "one", "seconds": 1.5}, {"what": "two", "memory": 12345.6}], tmp_path / "f.json", more=3)
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [["seconds", "memory"], ["one", "1.5", "-"], ["two", "-", "12346"]]
    printed = json.loads(last)
    assert printed == json.loads((tmp_path / "f.json").read_text()) and printed["more"] == 3
    assert printed["rows"][1] == {"what": "two", "memory": 12345.6} and printed["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla T4", 65.0),
        ("NVIDIA T400", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None):
    assert known_peak(name) == peak


def test_another_device_is_measured():
    peak, source = device_peak(torch.device("cpu"), torch.float32)
    assert source == "measured matrix product" and peak > 1e-3
    assert measured_peak(torch.device("cpu"), torch.float32, 64, 0.01) > 0
