"""A tiny SD3 model in the real file layout, some images, and a way to run the real command on them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sd3.tiny import tiny_model_folder
from tests.warm_processes import run_python

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(64, 64), (80, 64), (64, 96), (70, 70), (96, 64), (64, 64)]


@dataclass
class Workshop:
    """A folder with a model, images and a dataset file; every test trains into a folder of its own."""

    folder: Path
    model: Path
    dataset: Path

    def arguments(self, output: Path, *more: str, **options: object) -> list[str]:
        """The command's words: sensible ones for a quick run, then those of the test, which win."""
        chosen: dict[str, object] = {
            "pretrained_model_name_or_path": self.model,
            "dataset_config": self.dataset,
            "output_dir": output,
            "output_name": "lora",
            "network_module": "networks.lora_sd3",
            "learning_rate": "1e-3",
            "max_train_steps": 6,
            "seed": 7,
            "max_data_loader_n_workers": 0,
            **options,
        }
        return [word for name, value in chosen.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), tiny_model)


def make_workshop(folder: Path, model: Path | None = None) -> Workshop:
    """The tiny model, six images and their dataset file."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        flat = np.full((height, width, 3), rng.integers(0, 255, 3), dtype=np.uint8)
        Image.fromarray(flat).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a cat, number {number}, on grass", encoding="utf-8")
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"""
[general]
resolution = 64
enable_bucket = true
bucket_reso_steps = 32
caption_extension = ".txt"

[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = {str(images)!r}
  num_repeats = 2
""",
        encoding="utf-8",
    )
    return Workshop(folder, model or tiny_model_folder(folder / "model", "5-medium"), dataset)


def run_command(
    arguments: list[str], launcher: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the real script in a process of its own. launcher: words between `python` and the script."""
    return run_python([*launcher, str(ROOT / "sd3_train_network.py"), *arguments], environment)
