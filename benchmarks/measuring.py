"""Shared by the benchmarks: common arguments, comparison with another program, tables and JSON, test images.

Two programs are compared by running them in turn, A B A B, in one run on one machine: seconds from a web page are
those of another machine, while ratios of one run hold on the reader's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.process_monitor import run_monitored

OF_COMPARISONS = ("--against", "--json", "--rounds")  # not passed to a compared program
Row = dict[str, Any]


# --- arguments and output ---------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser, placeholders: str = "") -> None:
    """The options that every benchmark has."""
    more = f" {placeholders}" if placeholders else ""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed to this file too, as JSON")
    parser.add_argument("--against", metavar="COMMAND", help=f"another program, run in turn in the same run.{more}")
    parser.add_argument("--rounds", type=int, default=2, help="how often each program runs with --against (2)")


def report(benchmark: str, rows: Sequence[Row], file: Path | None = None, **more: Any) -> None:
    """Print the table, and all as JSON in the last line; to `file` too where there is one."""
    print_rows(rows)
    text = json.dumps({"benchmark": benchmark, "machine": machine(), **more, "rows": list(rows)})
    print(text)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def print_rows(rows: Sequence[Row]) -> None:
    """A table: one line a row, one column a number. A row may lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "what"))
    first = max(len(str(row["what"])) for row in rows)
    widths = [max(len(name), 9) + 2 for name in names]
    print(" " * first + "".join(f"{name:>{width}}" for name, width in zip(names, widths)))
    for row in rows:
        print(f"{row['what']:<{first}}" + "".join(f"{_cell(row.get(n)):>{w}}" for n, w in zip(names, widths)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, (int, str)) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


# --- two programs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A program that takes part in a comparison."""

    what: str
    command: list[str]
    longer: list[str] | None = None  # the same with `more_steps` steps more
    more_steps: int = 0
    items: int = 0  # images or captions that a run processes

    def run(self) -> Row:
        """One run: seconds and memory, and the numbers of the first row of JSON that it prints last, as our benchmarks do."""
        usage = run_monitored(self.command)
        row: Row = {"what": self.what, **reported_numbers(usage.output), **usage.numbers()}
        if self.items:
            row["items_per_second"] = self.items / usage.seconds
        if self.longer is not None:
            longer = run_monitored(self.longer)
            # start-up is in both
            row["step_seconds"] = (longer.seconds - usage.seconds) / self.more_steps
            row |= {"peak_mib": max(usage.peak_mib, longer.peak_mib)}
            if usage.gpu_mib is not None and longer.gpu_mib is not None:
                row["gpu_mib"] = max(usage.gpu_mib, longer.gpu_mib)
        return row


def reported_numbers(output: str) -> dict[str, float]:
    """The numbers of the first row in the last line of a program's output, where that is JSON as `report` prints it."""
    try:
        printed = json.loads(output.strip().splitlines()[-1])
        return {name: value for name, value in printed["rows"][0].items() if isinstance(value, (int, float))}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def other_program(
    text: str, placeholders: Mapping[str, object] | None = None, steps: tuple[int, int] | None = None, items: int = 0
) -> Program:
    """The program that --against names, with its {placeholders} filled.

    items: number of images or captions that a run processes. steps: where the command has {steps}, it runs with either number, and seconds a step are the difference.
    """

    def filled(count: int | None) -> list[str]:
        return [
            fill(word, {**(placeholders or {}), **({} if count is None else {"steps": count})})
            for word in shlex.split(text)
        ]

    if steps is None or "{steps}" not in text:
        return Program("against", filled(None), items=items)
    return Program("against", filled(steps[0]), filled(steps[1]), steps[1] - steps[0], items)


def fill(word: str, placeholders: Mapping[str, object]) -> str:
    for name, value in placeholders.items():
        word = word.replace(f"{{{name}}}", str(value))
    return word


def this_program(module: str, words: Sequence[str]) -> Program:
    """This benchmark with its own command line, without the options of the comparison."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in OF_COMPARISONS:
            skip = True
        elif word.split("=", 1)[0] not in OF_COMPARISONS:
            kept.append(word)
    return Program("ours", [sys.executable, "-m", module, *kept])


def compare(first: Program, second: Program, rounds: int, before: Callable[[], None] = lambda: None) -> list[Row]:
    """Run both in turn, `rounds` times: a row for each (the median of each number), and their ratio, first to second.

    before: called before each run, to remove the files of the last one.
    """
    runs: dict[str, list[Row]] = {first.what: [], second.what: []}
    for number in range(rounds):
        for program in (first, second) if number % 2 == 0 else (second, first):
            before()
            runs[program.what].append(program.run())
    rows = [_medians(what, rows) for what, rows in runs.items()]
    shared = [name for name in rows[0] if name != "what" and rows[1].get(name)]
    return [*rows, {"what": "ratio", **{name: rows[0][name] / rows[1][name] for name in shared}}]


def _medians(what: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    names = [name for name in runs[0] if name != "what" and all(name in run for run in runs)]
    return {"what": what, **{name: statistics.median(run[name] for run in runs) for name in names}}


# --- something to work on ---------------------------------------------------------------------------------------------


def make_images(folder: Path, count: int, side: int) -> Path:
    """Images of noise over a ramp, each with a caption of its own."""
    data, rng = folder / "1_thing", np.random.default_rng(0)
    data.mkdir()
    ramp = np.linspace(0, 200, side, dtype=np.uint8)[None, :, None]
    for number in range(count):
        pixels = ramp + rng.integers(0, 55, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number:05d}.png")
        (data / f"{number:05d}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return data
