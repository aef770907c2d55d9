"""What the report tells of a run, collected from the trainer."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.data.records import IndexedDataset
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.metrics import RunMetrics
from library.monitoring.report.page import DatasetSection, RunDescription, RunState, render
from library.monitoring.report.pictures import THUMBNAIL_SIDE, PictureBox
from library.options.values import resume_command, split_options
from library.saving.run_facts import program_version
from library.training.train_progress import TrainProgress

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "pillow")
MOST_THUMBNAILS = 16  # of a dataset


class RunReport:
    """Makes the page's text. `make` is called from the report's thread: it reads and changes nothing of the trainer."""

    def __init__(self, trainer: NetworkTrainer, metrics: RunMetrics, previews: Callable[[], list[PreviewRecord]]):
        self.trainer, self.metrics, self.previews = trainer, metrics, previews
        self.started = time.monotonic()
        self.position = TrainProgress()
        self.box = PictureBox()
        self._description: RunDescription | None = None

    def make(self, status: str) -> str:
        if self._description is None:
            self._description = self._describe()
        position, metrics = self.position, self.metrics
        state = RunState(
            status=status,
            step=position.step,
            epoch=min(position.epoch + (position.batch > 0), self.trainer.plan.length.epochs),
            seconds=time.monotonic() - self.started,
            time=time.strftime("%Y-%m-%d %H:%M"),
            curves=metrics.curves,
            by_timestep=metrics.by_timestep.means(),
            sheet=self.box.sheet(self.previews()),
            skipped_steps=metrics.skipped,
        )
        return render(self._description, state)

    def _describe(self) -> RunDescription:
        trainer, args = self.trainer, self.trainer.args
        length, index = trainer.plan.length, trainer.plan.index
        family = trainer.metadata_facts()
        parameters = sum(parameter.numel() for parameter in trainer.parameters)
        given, other = split_options(args)
        return RunDescription(
            title=args.output_name or "LoRA training",
            max_steps=length.max_steps,
            epochs=length.epochs,
            about=[
                family.title,
                f"{family.base_file.name}",
                f"{args.network_module}, {parameters:,} parameters",
                trainer.optimizer.name_for_metadata,
            ],
            datasets=[
                *(self._dataset(dataset, "training") for dataset in index.training),
                *(self._dataset(dataset, "validation") for dataset in index.validation),
            ],
            options=given,
            other_options=other,
            versions=versions(trainer.device),
            resume_command=resume_command(args, trainer.accelerator.num_processes),
        )

    def _dataset(self, dataset: IndexedDataset, use: str) -> DatasetSection:
        settings = dataset.settings
        rows = []
        for size, numbers in dataset.buckets.items():
            repeats = sum(dataset.records[number].repeats for number in numbers)
            rows.append((f"{size[0]}x{size[1]}", len(numbers), repeats, -(-repeats // settings.batch_size)))
        every = max(1, len(dataset.records) // MOST_THUMBNAILS)
        shown = [
            self.box.picture(Path(record.path), record.caption or Path(record.path).name, THUMBNAIL_SIDE)
            for record in dataset.records[::every][:MOST_THUMBNAILS]
        ]
        count, (width, height) = len(dataset.records), settings.resolution
        images = "1 image" if count == 1 else f"{count} images"
        title = f"{settings.name}, {use}: {images}, {width}x{height}, batch size {settings.batch_size}"
        return DatasetSection(title, rows, [picture for picture in shown if picture is not None])


def versions(device: torch.device) -> dict[str, str]:
    """The program, Python, the packages that matter, the system and the device."""
    found = {"program": program_version(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if device.type == "cuda":
        found["device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        found["device"] = str(device)
    return found
