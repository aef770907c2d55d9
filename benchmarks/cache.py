#!/usr/bin/env python3
"""Images and captions a second that caching makes, and its peak memory; prints a table and JSON.

    python benchmarks/cache.py --pretrained_model_name_or_path MODEL [--images 64] [--resolution 512]
    python benchmarks/cache.py --pretrained_model_name_or_path MODEL --against 'python other_cache.py --data {data}'

Another program's command is timed in the same run, on the same images; `{data}` is replaced by their folder. Caches in files
are removed between the two.
"""

from __future__ import annotations

import argparse
import json
import shlex
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
    parser.add_argument("--images", type=int, default=64, help="how many images to make and encode (64)")
    parser.add_argument("--resolution", type=int, default=512, help="their side in pixels (512)")
    parser.add_argument("--vae_batch_size", type=int, default=4, help="images a VAE call (4)")
    parser.add_argument("--against", help="another program's command, with {data} for the folder of images")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder), chosen.images, chosen.resolution)
        common = ["--pretrained_model_name_or_path", chosen.pretrained_model_name_or_path, "--train_data_dir", folder]
        common += ["--resolution", str(chosen.resolution), "--caption_extension", ".txt", "--network_train_unet_only"]
        for what, tool, more in (
            ("latents", "cache_latents.py", ["--vae_batch_size", str(chosen.vae_batch_size)]),
            ("text", "cache_text_encoder_outputs.py", ["--text_encoder_batch_size", "8"]),
        ):
            command = [sys.executable, str(ROOT / "tools" / tool), *common, *more]
            rows.append(measure(f"{what}, ours", command, chosen.images))
        if chosen.against:
            for path in data.glob("*.safetensors"):
                path.unlink()
            rows.append(measure("against", shlex.split(chosen.against.replace("{data}", str(data))), chosen.images))
    print_rows(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
