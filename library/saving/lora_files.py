"""The LoRA files of a run: which weights go into them, in which formats, and who writes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.common.errors import UserError
from library.saving.hub import HubUploader
from library.saving.metadata import FileMetadata
from library.saving.run_facts import save_facts
from library.saving.saver import BackgroundSaver, fallback_folders, remove, write_weights_somewhere
from library.training.ema import WeightEma
from library.training.optimizers import OptimizerBundle
from library.training.train_progress import TrainProgress
from networks.diffusers_layout import to_diffusers, unread_by_diffusers
from networks.network import Network

logger = logging.getLogger(__name__)
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ObsoletePaths = Callable[[], list[Path]]
"""Which older files may be removed; called once the new one is on the disk."""


@dataclass(frozen=True)
class TrainedWeights:
    """The network in training, with what averages its weights: an EMA, or a schedule-free optimizer."""

    network: Network
    optimizer: OptimizerBundle
    ema: WeightEma | None = None

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The averaged weights inside the block, where something averages them; the training weights after it."""
        with self.optimizer.evaluation_weights():
            if self.ema is None:
                yield
            else:
                with self.ema.swapped():
                    yield


@dataclass(frozen=True)
class LoraFileSettings:
    """dtype: of the saved tensors; None: as trained. format: "kohya", "diffusers" or "both"."""

    dtype: torch.dtype | None = None
    format: str = "kohya"
    cache_dir: Path | None = None  # where a file goes that the output folder has no room for
    ema_beside: bool = True  # the EMA in a file of its own; False: in place of the live weights

    def names_of(self, path: Path, has_average: bool) -> list[Path]:
        """All files of one save of `path`."""
        bases = [path, average_name(path)] if has_average and self.ema_beside else [path]
        return [target for base in bases for target, _ in self.formats_of(base, {})]

    def formats_of(self, path: Path, tensors: dict[str, Tensor]) -> list[tuple[Path, dict[str, Tensor]]]:
        """The files of `format`: the diffusers file has a name of its own beside the kohya file."""
        files = [(path, tensors)] if self.format != "diffusers" else []
        if self.format != "kohya":
            target = path if self.format == "diffusers" else path.with_name(f"{path.stem}-diffusers{path.suffix}")
            files.append((target, to_diffusers(tensors)))
        return files


def average_name(path: Path) -> Path:
    """The file of the EMA beside that of the live weights."""
    return path.with_name(f"{path.stem}-ema{path.suffix}")


class LoraFileWriter:
    """Hands copies of the weights to the background saver, which writes, uploads and removes files."""

    def __init__(
        self,
        weights: TrainedWeights,
        settings: LoraFileSettings,
        metadata: FileMetadata | None,
        saver: BackgroundSaver,
        hub: HubUploader | None,
    ):
        """metadata: None on every rank but 0, which writes nothing."""
        self.weights, self.settings, self.metadata = weights, settings, metadata
        self.saver, self.hub = saver, hub
        if settings.format != "kohya" and unread_by_diffusers(weights.network.layers):
            logger.warning(
                "diffusers skips a LoRA of T5: ComfyUI alone reads its part of the file (text_encoders.t5xxl.transformer.…)."
            )

    def check_finite(self, path: Path, progress: TrainProgress) -> None:
        """UserError where weights that would be saved are not finite. All ranks call it, so that all stop together."""
        ema, dtype = self.weights.ema, self.settings.dtype
        with torch.no_grad():
            tensors = [*self.weights.network.parameters(), *(ema.averages.values() if ema is not None else ())]
            checks = [(tensor if dtype is None else tensor.to(dtype)).isfinite().all() for tensor in tensors]
            if not checks or bool(torch.stack(checks).all()):
                return
        remedy = "--save_precision float would keep them. " if dtype is torch.float16 else ""
        raise UserError(
            f"{path}: the weights are not finite at step {progress.step}, and the file is not written. {remedy}Files saved before are "
            "finite: resume from a state of an earlier step with a lower --learning_rate."
        )

    def save(self, path: Path, progress: TrainProgress, final: bool = False, obsolete: ObsoletePaths = list) -> None:
        """Save the weights as they are now. final: wait for the hashes of the base files in the metadata."""
        described = self.metadata
        if described is None:
            return
        metadata = described.at(save_facts(progress, time.time()))
        files = self._copies(path)

        def write() -> None:
            outputs = [each for target, tensors in files for each in self.settings.formats_of(target, tensors)]
            problems: list[str] = []
            for target, tensors in outputs:
                facts = described.with_hashes(metadata, tensors, wait=final)
                fallbacks = fallback_folders(self.settings.cache_dir)
                written, wrong = write_weights_somewhere(target, tensors, facts, fallbacks)
                problems += wrong
                self.upload(written)
            if problems:
                raise UserError(problems)
            remove([old for old in obsolete() if old not in {target for target, _ in outputs}])

        self.saver.submit(write)

    def _copies(self, path: Path) -> list[tuple[Path, dict[str, Tensor]]]:
        """Host copies of the weights of each file: the live ones, the EMA's, or both."""
        network, dtype, ema = self.weights.network, self.settings.dtype, self.weights.ema
        files: list[tuple[Path, dict[str, Tensor]]] = []
        if ema is None or self.settings.ema_beside:
            with self.weights.optimizer.evaluation_weights():
                files.append((path, network.state_dict_for_saving(dtype)))
        if ema is not None:
            target = average_name(path) if self.settings.ema_beside else path
            files.append((target, network.state_dict_for_saving(dtype, ema.averages)))
        return files

    def upload(self, path: Path) -> None:
        """Send a saved file to the Hub, if there is one. Called on the saver's thread."""
        if self.hub is not None:
            self.hub.submit(path)
