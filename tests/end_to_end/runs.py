"""Real runs in this process, with the trainer left over to look into."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.options.resolve import resolve_options
from sd3_train_network import Sd3NetworkTrainer
from tests.end_to_end.conftest import Workshop

UNET = "--network_train_unet_only"
PREFIXES = {"te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_", "unet": "lora_unet_"}


@dataclass
class Run:
    trainer: Sd3NetworkTrainer
    folder: Path
    warnings: list[str]

    def weights(self, name: str = "lora.safetensors") -> dict[str, Tensor]:
        return load_file(self.folder / name)

    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "lora.metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines() if name in line]

    @property
    def losses(self) -> list[float]:
        return self.values("loss/current")

    def moved(self) -> dict[str, float]:
        """How far the Up weights, which start at zero, are from it in each part that the file has."""
        found: dict[str, float] = {}
        for key, tensor in self.weights().items():
            part = next(name for name, prefix in PREFIXES.items() if key.startswith(prefix))
            if key.endswith("lora_up.weight"):
                found[part] = max(found.get(part, 0.0), tensor.float().abs().max().item())
        return found


def train(workshop: Workshop, folder: Path, *more: str, **options: object) -> Run:
    """The run of `sd3_train_network.py` with these options: two steps unless they say another number. UserError as it does."""
    resolved = resolve_options(workshop.arguments(folder, *more, **{"max_train_steps": 2, **options}))
    trainer = Sd3NetworkTrainer(resolved.args, resolved.problems)
    trainer.train()
    return Run(trainer, folder, resolved.warnings)


def dataset_file(path: Path, subsets: list[str], dataset: str = "batch_size = 1") -> Path:
    """A dataset file of 64 x 64 images with one dataset; each subset is the text of its table."""
    tables = "\n".join(f"[[datasets.subsets]]\n{subset}" for subset in subsets)
    path.write_text(f"[[datasets]]\nresolution = 64\n{dataset}\n{tables}\n", encoding="utf-8")
    return path


def image_folder(folder: Path, count: int = 1, alpha: np.ndarray | None = None) -> Path:
    """Images of noise, 64 x 64, with captions; alpha [64, 64] uint8 makes them RGBA."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for number in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        if alpha is not None:
            pixels = np.dstack([pixels, alpha])
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.caption").write_text("a red cat", encoding="utf-8")
    return folder
