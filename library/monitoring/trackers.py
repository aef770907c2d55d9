"""TensorBoard and Weights & Biases, through accelerate's trackers, with scalars under sd-scripts' names."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.common.errors import UserError
from library.common.text_files import FormatError, parse_toml, read_text
from library.training.callback_settings import TrackingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from PIL.Image import Image

logger = logging.getLogger(__name__)
HIDDEN = "***"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def tracking_problems(settings: TrackingSettings) -> list[str]:
    """What would keep the trackers from starting: packages that are missing, a bad --log_tracker_config."""
    problems = [
        f"--log_with {name}: the package is not installed. Install it with: pip install {name}"
        for name in settings.names
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name])
    ]
    problems += _folder_problems(settings.folder) if settings.names and settings.folder else []
    try:
        arguments = tracker_arguments(settings)
    except UserError as error:
        return problems + error.problems
    if settings.arguments_file is not None and not problems:
        for name, table in arguments.items():
            where = f"--log_tracker_config {settings.arguments_file}, [{name}]"
            problems += [f"{where}: {problem}" for problem in _argument_problems(name, table)]
    return problems


def _folder_problems(folder: Path) -> list[str]:
    """Why no logs can be written in the folder, which need not exist yet. Nothing is written."""
    for path in (folder, *folder.parents):
        try:
            path.stat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return [f"--logging_dir {folder} can't be used: {getattr(error, 'strerror', None) or error}."]
        if not path.is_dir() or not os.access(path, os.W_OK):
            return [f"--logging_dir {folder}: {path} is not a folder that can be written to. Choose another."]
        return []
    return []


def tracker_arguments(settings: TrackingSettings) -> dict[str, dict[str, object]]:
    """Arguments by tracker: the run's name for W&B, and over it the tables of --log_tracker_config."""
    arguments: dict[str, dict[str, object]] = {name: {} for name in settings.names}
    if settings.run_name and "wandb" in arguments:
        arguments["wandb"]["name"] = settings.run_name
    if settings.arguments_file is None:
        return arguments
    where = f"--log_tracker_config {settings.arguments_file}"
    try:
        tables = parse_toml(read_text(settings.arguments_file))
    except FormatError as error:
        raise UserError(f"{where}: the file cannot be read ({error}).") from error
    for name, table in tables.items():
        if name not in PACKAGES or not isinstance(table, dict):
            raise UserError(f"{where}: {name} is not known. It takes the tables [tensorboard] and [wandb].")
        if name in arguments:
            arguments[name] |= table
    return arguments


def _argument_problems(name: str, table: Mapping[str, object]) -> list[str]:
    """Keys that the tracker does not take, by its own signature."""
    if not table:
        return []
    if name == "wandb":
        import wandb

        known, ours = inspect.signature(wandb.init).parameters, {"project": "--log_tracker_name"}
    else:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # accelerate takes the one or the other
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
        known, ours = inspect.signature(SummaryWriter).parameters, {"log_dir": "--logging_dir"}
    problems = [f"{key} is what {option} says. Leave it out." for key, option in ours.items() if key in table]
    return problems + [f"{key} is not known. Known are {', '.join(known)}." for key in table if key not in known]


class Trackers:
    """The trackers of rank 0; on other ranks, or without trackers, it does nothing.

    They log in a thread, in order: a slow disk or network does not delay training, and a tracker that fails is a warning.
    """

    def __init__(
        self, accelerator: Accelerator, settings: TrackingSettings, config: Mapping[str, object] | None = None
    ):
        """config: the options to log (--log_config), or None."""
        self._trackers: list[GeneralTracker] = []
        self._thread: ThreadPoolExecutor | None = None
        self._failed = False
        if not settings.names or not accelerator.is_main_process:
            return
        if settings.api_key:
            os.environ["WANDB_API_KEY"] = settings.api_key  # wandb.login would write it to a file
        with _argv_without(settings.secrets):
            plain = {key: _plain(value) for key, value in config.items()} if config is not None else None
            with _translate_wandb_errors():
                try:
                    accelerator.init_trackers(settings.project, plain, tracker_arguments(settings))
                except OSError as error:
                    raise UserError(
                        f"--logging_dir {settings.folder}: nothing can be written there ({error.strerror or error})."
                        " Make room, or choose another folder."
                    ) from error
        self._trackers = list(accelerator.trackers)
        self._thread = ThreadPoolExecutor(1, "trackers")
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.tracker.define_metric("epoch", hidden=True)
                tracker.tracker.define_metric("global_step", hidden=True)

    def scalars(self, values: Mapping[str, float], x: int, step: int, epoch: int) -> None:
        """x: the step, or for an epoch's values the epoch. W&B has an axis of its own and logs step and epoch as values."""
        self._submit(partial(self._scalars, dict(values), x, {"global_step": step, "epoch": epoch}))

    def images(self, images: Sequence[tuple[int, str, Image]], step: int, epoch: int) -> None:
        """Previews as sample_<index>: (index, prompt, image)."""
        self._submit(partial(self._images, list(images), step, {"global_step": step, "epoch": epoch}))

    def close(self) -> None:
        """Wait until everything has been logged."""
        self._submit(lambda: [tracker.finish() for tracker in self._trackers])
        if self._thread is not None:
            self._thread.shutdown()
        self._trackers, self._thread = [], None

    def _submit(self, do: Callable[[], object]) -> None:
        if self._thread is not None:
            self._thread.submit(self._guarded, do)

    def _guarded(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever it is, hours of training are worth more
            if not self._failed:
                logger.warning("A tracker failed, and may miss values: %s: %s", type(error).__name__, error)
            self._failed = True

    def _scalars(self, values: dict[str, float], x: int, axes: dict[str, int]) -> None:
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log({**values, **axes})
            else:
                tracker.log(values, step=x)

    def _images(self, images: list[tuple[int, str, Image]], step: int, axes: dict[str, int]) -> None:
        import numpy as np

        for tracker in self._trackers:
            if tracker.name == "wandb":
                import wandb

                samples = {f"sample_{index}": wandb.Image(image, caption=prompt) for index, prompt, image in images}
                tracker.log({**samples, **axes})
            else:
                for index, _, image in images:
                    tracker.log_images({f"sample_{index}": np.asarray(image)[None]}, step=step, dataformats="NHWC")


@contextmanager
def _translate_wandb_errors() -> Iterator[None]:
    """Turn an error of W&B, which cannot log in or start, into a UserError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        raise UserError(
            f"--log_with wandb: {error} Log in with `wandb login`, give --wandb_api_key, or set WANDB_MODE=offline."
        ) from error


@contextmanager
def _argv_without(secrets: Sequence[str]) -> Iterator[None]:
    """Trackers record the command line when they start: hide secrets in it inside the block."""
    before = list(sys.argv)
    for index, word in enumerate(sys.argv):
        for secret in secrets:
            word = word.replace(secret, HIDDEN)
        sys.argv[index] = word
    try:
        yield
    finally:
        sys.argv[:] = before


def _plain(value: object) -> bool | int | float | str | None:
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
