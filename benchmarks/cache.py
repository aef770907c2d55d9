#!/usr/bin/env python3
"""Images and captions a second that caching makes, start-up included, and its peak memory.

    python -m benchmarks.cache --pretrained_model_name_or_path MODEL [--images 64] [--resolution 512]
    python -m benchmarks.cache --pretrained_model_name_or_path MODEL --kind latents --against 'python other_cache.py --data {data}'

With --against both programs work on the same images, in turn; caches in files are removed before each run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import Program, add_common_arguments, compare, make_images, other_program, report
from benchmarks.process_monitor import ROOT

TOOLS = {
    "latents": ("cache_latents.py", "--vae_batch_size"),
    "text": ("cache_text_encoder_outputs.py", "--text_encoder_batch_size"),
}


def main(words: Sequence[str] | None = None) -> None:
    chosen = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder), chosen.images, chosen.resolution)

        def clear() -> None:
            for path in data.glob("*.safetensors"):
                path.unlink()

        programs = {kind: tool(kind, chosen, folder) for kind in TOOLS}
        if chosen.against:
            placeholders = {"data": data, "folder": folder, "model": chosen.pretrained_model_name_or_path}
            against = other_program(chosen.against, placeholders, items=chosen.images)
            rows = compare(programs[chosen.kind], against, chosen.rounds, clear)
        else:
            rows = [program.run() for program in programs.values()]
    report("cache", rows, chosen.json, images=chosen.images, resolution=chosen.resolution)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--pretrained_model_name_or_path", required=True, help="an SD3 checkpoint (the demo's takes up to 192 pixels)"
    )
    made.add_argument("--images", type=int, default=64, help="how many images to make and encode (64)")
    made.add_argument("--resolution", type=int, default=512, help="their side in pixels (512)")
    made.add_argument("--batch_size", type=int, default=4, help="images or captions an encoder's call (4)")
    made.add_argument("--mixed_precision", default="no", help="no, fp16 or bf16 (no)")
    made.add_argument("--kind", choices=list(TOOLS), default="latents", help="what --against caches (latents)")
    add_common_arguments(made, "{folder}, {data} (the images' own in it) and {model} are replaced.")
    return made


def tool(kind: str, chosen: argparse.Namespace, folder: str) -> Program:
    name, size_option = TOOLS[kind]
    command = [
        *(sys.executable, str(ROOT / "tools" / name)),
        *("--pretrained_model_name_or_path", chosen.pretrained_model_name_or_path, "--train_data_dir", folder),
        *("--resolution", str(chosen.resolution), "--caption_extension", ".txt", "--network_train_unet_only"),
        *(size_option, str(chosen.batch_size), "--mixed_precision", chosen.mixed_precision),
    ]
    return Program(f"{kind}, ours", command, items=chosen.images)


if __name__ == "__main__":
    main()
