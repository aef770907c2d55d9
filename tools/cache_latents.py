#!/usr/bin/env python3
"""Encode a dataset's images ahead of time, into the files that sd3_train_network.py --cache_latents_to_disk reads.

python tools/cache_latents.py --pretrained_model_name_or_path MODEL --dataset_config DATASET.toml
Give the options of the training command: what changes latents (VAE, precision, flip_aug, …) must be the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from tools.caching import run_cache


def main(arguments: list[str] | None = None) -> int:
    return run_cache(
        Path(__file__).name, __doc__, arguments, "--cache_latents_to_disk", lambda trainer: trainer.cache_latents()
    )


if __name__ == "__main__":
    sys.exit(main())
