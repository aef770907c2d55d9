#!/usr/bin/env python3
"""Make the demo: a small SD3 model with its tokenizers, pictures to learn from, and the files that name them.

    python tools/make_demo.py --output demo

Nothing is trained and nothing is downloaded: the weights come with this program (tools/demo/pretrain.py made them), the
pictures are drawn. Existing files are kept, so that edits survive; --force writes everything again.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from library.common.files import atomic_write
from tools.demo.dataset import dataset_toml, prompts_txt, reg_scenes, train_scenes, write_if_absent, write_pictures
from tools.demo.vocabularies import CLIP_FOLDER, CLIP_G_FOLDER

WEIGHTS = Path(__file__).resolve().parent / "demo" / "weights"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="the folder to make, default: demo")
    parser.add_argument("--force", action="store_true", help="make also what is there already")
    chosen = parser.parse_args(arguments)
    written = make_demo(chosen.output, chosen.force)
    print(f"{chosen.output}: {written} files written." if written else f"{chosen.output} is there and whole.")


def make_demo(output: Path, force: bool = False) -> int:
    """Write the demo below `output` and return the number of files written."""
    written = copy_model(output / "model", force)
    written += write_pictures(output / "train", train_scenes(), seed=11, freedom=0.5, force=force)
    written += write_pictures(output / "reg", reg_scenes(), seed=12, freedom=1.0, force=force)
    written += write_if_absent(output / "dataset.toml", dataset_toml(output), force)
    return written + write_if_absent(output / "prompts.txt", prompts_txt(), force)


def copy_model(folder: Path, force: bool) -> int:
    """Copy the checkpoint and the tokenizers. An older copy is replaced: nobody edits these."""
    written = 0
    for source in sorted(path for path in WEIGHTS.rglob("*") if path.is_file()):
        name = source.relative_to(WEIGHTS)
        written += copy_file(source, folder / name, force)
        if CLIP_FOLDER in name.parts:
            written += copy_file(source, folder / "tokenizers" / CLIP_G_FOLDER / name.name, force)
    return written


def copy_file(source: Path, target: Path, force: bool) -> int:
    if target.exists() and not force and filecmp.cmp(source, target, shallow=False):
        return 0
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)
    return 1


if __name__ == "__main__":
    main()
