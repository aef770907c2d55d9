#!/usr/bin/env python3
"""From a checkpoint to a model on the device: seconds and peak memory, beside the size of what is read.

    python -m benchmarks.load --pretrained_model_name_or_path MODEL.safetensors --dtype bf16
    python -m benchmarks.load --preset sd3m --scale 0.5          (makes a file of noise of that size first)

Each way runs in a process of its own, `--rounds` times in turn: ours, and the plain one (a model made with its usual
initial weights, the file read whole by safetensors, load_state_dict, then to the dtype and the device). `peak_mib` is what the process
grew by; pages of the file that the kernel keeps for it count. With --cold the file is dropped from the kernel's memory before
each run (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.devices import wait_for
from benchmarks.job import add_sizes, random_model, sizes
from benchmarks.measuring import Program, Row, add_common_arguments, compare, machine, other_program, report
from benchmarks.process_monitor import own_peak_bytes, reset_high_water
from library.common.files import save_safetensors
from library.common.tensor_io import Part
from library.sd3.checkpoint import locate_parts
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.models import load_mmdit, shapes_of

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PREFIX = "model.diffusion_model."


def main(words: Sequence[str] | None = None) -> None:
    chosen = parser().parse_args(words)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.way:
        row = load_once(chosen.way, Path(chosen.pretrained_model_name_or_path), DTYPES[chosen.dtype], device)
        print(json.dumps({"benchmark": "load", "machine": machine(), "rows": [row]}))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(chosen.pretrained_model_name_or_path or write_noise(Path(folder), chosen))

        def way(name: str) -> Program:
            words = ["--way", name, "--pretrained_model_name_or_path", str(path), "--dtype", chosen.dtype]
            return Program(name, [sys.executable, "-m", "benchmarks.load", *words, "--device", str(device)])

        other = other_program(chosen.against, {"model": path}) if chosen.against else way("plain")
        rows = compare(way("ours"), other, chosen.rounds, (lambda: forget(path)) if chosen.cold else lambda: None)
    report("load", rows, chosen.json, device=str(device), dtype=chosen.dtype)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pretrained_model_name_or_path", help="a checkpoint of SD3; none: noise of the sizes below")
    add_sizes(made)
    made.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="what the weights become (bf16)")
    made.add_argument("--stored", choices=list(DTYPES), default="fp16", help="the dtype of a file of noise (fp16)")
    made.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    made.add_argument("--cold", action="store_true", help="have the file come from the disk each time (Linux)")
    made.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    add_common_arguments(made, "{model} is replaced by the file.")
    return made


def write_noise(folder: Path, chosen: argparse.Namespace) -> Path:
    """A checkpoint of noise that holds the image model alone."""
    path = folder / "noise.safetensors"
    model = random_model(sizes(chosen), DTYPES[chosen.stored])
    save_safetensors(path, {PREFIX + name: tensor for name, tensor in model.state_dict().items()})
    return path


def load_once(way: str, path: Path, dtype: torch.dtype, device: torch.device) -> Row:
    """Load in this process: seconds, by how much it grew, the size of what is read."""
    part = locate_parts(str(path)).mmdit
    size = sum(end - start for start, end in (info.offsets for info in part.tensors.values()))
    torch.zeros(1, device=device)
    reset_high_water()
    before, started = own_peak_bytes(), time.perf_counter()
    model = WAYS[way](part, dtype, device)
    wait_for(device)
    seconds = time.perf_counter() - started
    grown = (own_peak_bytes() - before) / 2**20
    row: Row = {"what": way, "load_seconds": seconds, "file_mib": size / 2**20, "grown_mib": grown}
    row["grown_to_file"] = grown * 2**20 / size
    if device.type == "cuda":
        row["gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    assert all(tensor.device.type == device.type for tensor in model.parameters())
    return row


def ours(part: Part, dtype: torch.dtype, device: torch.device) -> MMDiT:
    return load_mmdit(part, device, dtype)


def plain(part: Part, dtype: torch.dtype, device: torch.device) -> MMDiT:
    from safetensors.torch import load_file

    model = MMDiT(MMDiTConfig.from_shapes(shapes_of(part)))
    tensors = {name.removeprefix(part.prefix): tensor for name, tensor in load_file(part.path).items()}
    model.load_state_dict({name: tensors[name] for name in part.tensors})
    return model.to(device, dtype)


WAYS = {"ours": ours, "plain": plain}


def forget(path: Path) -> None:
    """Have the kernel drop the file's pages."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("--cold needs a system that can be asked to drop a file from memory (Linux).")
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


if __name__ == "__main__":
    main()
