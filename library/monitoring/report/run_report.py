"""Callback: keeps the report of a run up to date while it trains."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from library.data.dataset import DatasetIndex, IndexedDataset
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.metrics import RunMetrics
from library.monitoring.report.background_writer import ReportWriter
from library.monitoring.report.html_page import DatasetSection, RunDescription, RunState, render
from library.monitoring.report.thumbnails import THUMBNAIL_SIDE, ThumbnailCache
from library.saving.run_facts import program_version
from library.training.train_progress import StepReport, TrainProgress

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "pillow")
MOST_THUMBNAILS = 16  # of a dataset


class RunReport:
    """Writes the report in a thread of its own. Use it as a context: leaving it writes how the run ended."""

    def __init__(
        self,
        path: Path,
        description: RunDescription,
        index: DatasetIndex,
        metrics: RunMetrics,
        previews: Sequence[PreviewRecord],
        interrupted: Callable[[], bool] = lambda: False,
        has_state: Callable[[], bool] = lambda: False,
    ):
        """description: without its datasets, which are added from `index`. previews: grows while the run goes on.

        interrupted: whether a signal has asked the run to stop. has_state: whether the run can be resumed now.
        """
        self.description, self.index, self.metrics, self.previews = description, index, metrics, previews
        self.interrupted, self.has_state = interrupted, has_state
        self.started = time.monotonic()
        self.progress = TrainProgress()
        self.thumbnails = ThumbnailCache()
        self._sections: list[DatasetSection] | None = None
        self._writer = ReportWriter(path, self.render)

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.interrupted():
            self._writer.close("stopped")
        else:
            self._writer.close("finished" if error is None else f"ended by {type(error).__name__}")

    def start(self, progress: TrainProgress) -> None:
        """Write the first report. Call it before the first step."""
        self._update(progress)

    def on_step_end(self, report: StepReport) -> None:
        self._update(report.progress)

    def on_epoch_end(self, progress: TrainProgress) -> None:
        self._update(progress)

    def _update(self, progress: TrainProgress) -> None:
        self.progress = progress
        self._writer.notify()

    def render(self, status: str) -> str:
        """The page's text. Called on the report's thread: it reads and changes nothing of the run."""
        if self._sections is None:
            training = [dataset_section(dataset, "training", self.thumbnails) for dataset in self.index.training]
            validation = [dataset_section(dataset, "validation", self.thumbnails) for dataset in self.index.validation]
            self._sections = training + validation
        progress, metrics, description = self.progress, self.metrics, self.description
        state = RunState(
            status=status,
            step=progress.step,
            epoch=min(progress.epoch + (progress.batch > 0), description.epochs),
            seconds=time.monotonic() - self.started,
            time=time.strftime("%Y-%m-%d %H:%M"),
            curves=metrics.curves,
            by_timestep=metrics.averages.by_timestep.means(),
            sheet=self.thumbnails.sheet(list(self.previews)),
            skipped_steps=metrics.nonfinite.skipped,
            has_state=self.has_state(),
        )
        return render(replace(description, datasets=self._sections), state)


def dataset_section(dataset: IndexedDataset, use: str, thumbnails: ThumbnailCache) -> DatasetSection:
    """A dataset's buckets with their counts, and some of its images. use: "training" or "validation"."""
    settings = dataset.settings
    rows = []
    for size, numbers in dataset.buckets.items():
        repeats = sum(dataset.records[number].repeats for number in numbers)
        rows.append((f"{size[0]}x{size[1]}", len(numbers), repeats, -(-repeats // settings.batch_size)))
    every = max(1, len(dataset.records) // MOST_THUMBNAILS)
    pictures = [
        thumbnails.picture(Path(record.path), record.caption or Path(record.path).name, THUMBNAIL_SIDE)
        for record in dataset.records[::every][:MOST_THUMBNAILS]
    ]
    count, (width, height) = len(dataset.records), settings.resolution
    images = "1 image" if count == 1 else f"{count} images"
    title = f"{settings.name}, {use}: {images}, {width}x{height}, batch size {settings.batch_size}"
    return DatasetSection(title, rows, [picture for picture in pictures if picture is not None])


def versions(device: torch.device) -> dict[str, str]:
    """The program, Python, the packages that matter, the system and the device."""
    names = {"program": program_version(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    names["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if device.type == "cuda":
        names["device"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        names["device"] = str(device)
    return names
