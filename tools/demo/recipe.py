#!/usr/bin/env python3
"""The demo's training command, as a list of words: what quickstart.py prints and runs.

python -m tools.demo.recipe --demo demo --output_dir output    # one word a line
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "zorp"
SCRIPT = "sd3_train_network.py"
STEPS = 700
MOST_THREADS = 4  # a model of four million parameters gains nothing from more


def command(output_dir: str | Path, demo: str | Path = ROOT / "demo", steps: int = STEPS) -> list[str]:
    """Train a LoRA on the demo's new figure, with previews before, halfway and after."""
    demo, output_dir = Path(demo), Path(output_dir)
    threads = max(1, min(MOST_THREADS, os.cpu_count() or 1))
    return [
        *("accelerate", "launch", "--quiet", "--num_cpu_threads_per_process", str(threads), SCRIPT),
        *("--pretrained_model_name_or_path", str(demo / "model" / "sd3_demo.safetensors")),
        *("--dataset_config", str(demo / "dataset.toml")),
        *("--output_dir", str(output_dir), "--output_name", NAME),
        *("--network_module", "networks.lora_sd3", "--network_dim", "8", "--network_alpha", "8"),
        "--network_train_unet_only",
        *("--learning_rate", "2e-3", "--optimizer_type", "AdamW"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--max_train_steps", str(steps)),
        *("--timestep_sampling", "logit_normal", "--loss_weighting", "velocity"),
        *("--mixed_precision", "bf16"),
        *("--cache_latents", "--cache_text_encoder_outputs", "--t5xxl_max_token_length", "32"),
        *("--sample_prompts", str(demo / "prompts.txt"), "--sample_at_first"),
        *("--sample_every_n_steps", str(steps // 2)),
        *("--seed", "42"),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default=ROOT / "demo", help="what tools/make_demo.py made")
    parser.add_argument("--output_dir", required=True, help="where the LoRA and the previews go")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    chosen = parser.parse_args(arguments)
    print("\n".join(command(chosen.output_dir, chosen.demo, chosen.steps)))


if __name__ == "__main__":
    main()
