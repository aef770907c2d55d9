#!/usr/bin/env python3
"""Encode a dataset's captions ahead of time, into the files that --cache_text_encoder_outputs_to_disk reads.

python tools/cache_text_encoder_outputs.py --pretrained_model_name_or_path MODEL --dataset_config DATASET.toml --network_train_unet_only
Give the options of the training command: what changes the outputs (encoders, precision, token length, masks) must be the
same. Encoders that are to be trained are not cached; --network_train_unet_only trains none of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from tools.caching import run_cache


def main(arguments: list[str] | None = None) -> int:
    return run_cache(
        Path(__file__).name,
        __doc__,
        arguments,
        "--cache_text_encoder_outputs_to_disk",
        lambda trainer: trainer.cache_texts(),
    )


if __name__ == "__main__":
    sys.exit(main())
