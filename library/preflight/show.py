"""What a run would do, for `--dry_run` and `--debug_dataset`: the plan as text, the dataset as sheets of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from library.data.examples import bucket_examples
from library.data.loader import LoaderSettings
from library.monitoring.dataset_sheets import PICTURES, write_dataset_sheets
from library.preflight.plan import RunPlan
from library.saving.saver import told_if_unwritable


def show_plan(args: argparse.Namespace, plan: RunPlan, memory: str, settings: LoaderSettings) -> None:
    """Print the dataset, the steps and the memory plan; with --debug_dataset draw sheets of the images and print their paths."""
    print(plan.text(args.gradient_accumulation_steps))
    if memory:
        print(f"\n{memory}")
    if not args.debug_dataset:
        return
    folder = Path(args.output_dir) / "dataset"
    for kind, batches in (("training", plan.training), ("validation", plan.validation)):
        if batches is not None:
            name = f"{args.output_name or 'last'}-{kind}"
            with told_if_unwritable(folder):
                for path in write_dataset_sheets(bucket_examples(batches, settings, PICTURES), folder, name):
                    print(f"{kind}: {path}")
