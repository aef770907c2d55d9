#!/usr/bin/env python3
"""From launch to the first step, and peak memory: without caches, with cold and with warm disk caches. Prints a table and JSON.

python benchmarks/startup.py --pretrained_model_name_or_path MODEL [--images 24] [--resolution 64]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, make_images, measure, print_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="an SD3 checkpoint (the demo's takes up to 192 pixels)"
    )
    parser.add_argument("--images", type=int, default=24, help="how many images to make (24)")
    parser.add_argument("--resolution", type=int, default=64, help="their side in pixels (64)")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), chosen.images, chosen.resolution)
        disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
        for what, more in (("live encoding", []), ("cold disk caches", disk), ("warm disk caches", disk)):
            output = Path(folder) / "output" / what.replace(" ", "_")
            metrics = output / "last.metrics.jsonl"
            command = [
                *(sys.executable, str(ROOT / "sd3_train_network.py")),
                *("--pretrained_model_name_or_path", chosen.pretrained_model_name_or_path, "--train_data_dir", folder),
                *("--resolution", str(chosen.resolution), "--caption_extension", ".txt", "--output_dir", str(output)),
                *(
                    "--network_module",
                    "networks.lora_sd3",
                    "--network_train_unet_only",
                    "--max_train_steps",
                    "2",
                    *more,
                ),
            ]
            rows.append(
                measure(what, command, 2, lambda metrics=metrics: metrics.exists() and metrics.stat().st_size > 0)
            )
    print_rows(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
