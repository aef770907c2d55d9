#!/usr/bin/env python3
"""From launch to the first step, and peak memory: without caches, with cold and with warm disk caches.

    python -m benchmarks.startup --pretrained_model_name_or_path MODEL [--images 24] [--resolution 64]
    python -m benchmarks.startup --pretrained_model_name_or_path MODEL --caches warm \\
        --against 'accelerate launch OTHER/sd3_train_network.py … --train_data_dir {folder} --output_dir {output} --max_train_steps 1'

With --against both programs train one step on the same images, in turn: `seconds` are those from launch to the end of the run, which
writes a LoRA. --caches says which kind of run is compared; before a cold one the caches in files are removed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import Program, Row, add_common_arguments, compare, make_images, other_program, report
from benchmarks.process_monitor import ROOT, run_monitored

TO_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
KINDS = {"live": (), "cold": TO_DISK, "warm": TO_DISK}


def main(words: Sequence[str] | None = None) -> None:
    chosen = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder), chosen.images, chosen.resolution)
        if chosen.against:
            rows = in_turn(chosen, Path(folder), data)
        else:
            rows = [first_step(kind, chosen, Path(folder)) for kind in KINDS]
    report("startup", rows, chosen.json, images=chosen.images, resolution=chosen.resolution)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--pretrained_model_name_or_path", required=True, help="an SD3 checkpoint (the demo's takes up to 192 pixels)"
    )
    made.add_argument("--images", type=int, default=24, help="how many images to make (24)")
    made.add_argument("--resolution", type=int, default=64, help="their side in pixels (64)")
    made.add_argument("--mixed_precision", default="no", help="no, fp16 or bf16 (no)")
    made.add_argument("--caches", choices=list(KINDS), default="live", help="the kind of run for --against (live)")
    add_common_arguments(made, "{folder}, {data} (the images' own), {output} and {model} are replaced.")
    return made


def command(kind: str, chosen: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "sd3_train_network.py"), "--train_data_dir", str(folder)),
        *("--pretrained_model_name_or_path", chosen.pretrained_model_name_or_path),
        *("--resolution", str(chosen.resolution), "--caption_extension", ".txt", "--output_dir", str(folder / kind)),
        *("--network_module", "networks.lora_sd3", "--network_train_unet_only", "--max_train_steps", str(steps)),
        *("--mixed_precision", chosen.mixed_precision, *KINDS[kind]),
    ]


def first_step(kind: str, chosen: argparse.Namespace, folder: Path) -> Row:
    """One run of two steps: its first step is over when its line of numbers has been written."""
    metrics = folder / kind / "last.metrics.jsonl"
    usage = run_monitored(command(kind, chosen, folder, 2), lambda: metrics.exists() and metrics.stat().st_size > 0)
    what = f"{kind} caches" if KINDS[kind] else "no caches"
    return {"what": what, "first_step": usage.first, **usage.numbers()}


def in_turn(chosen: argparse.Namespace, folder: Path, data: Path) -> list[Row]:
    placeholders = {"folder": folder, "data": data, "output": folder / "against"}
    placeholders["model"] = chosen.pretrained_model_name_or_path
    ours = Program("ours", command(chosen.caches, chosen, folder, 1))
    against = other_program(chosen.against, placeholders)

    def clear() -> None:
        for path in data.glob("*.safetensors"):
            path.unlink()

    if chosen.caches == "warm":
        ours.run(), against.run()  # they fill their caches
    return compare(ours, against, chosen.rounds, (lambda: None) if chosen.caches == "warm" else clear)


if __name__ == "__main__":
    main()
