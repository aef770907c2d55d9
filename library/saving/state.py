"""Training states: everything that a run needs to go on as if it had never stopped.

A state is a folder that appears whole or not at all: it is filled under a temporary name and renamed. It holds
    train_state.json        progress ("position"), the options that shape the run, versions (current_epoch and current_step as sd-scripts has them)
    model.safetensors       the trained weights, float32 or as trained
    <component>.pt          one file for each other component: optimizer, scheduler, scaler, ema, averages (torch.save of plain state dicts)
    random_states_<rank>.pt every process's random generators
Files ending in .pt are read with weights_only=True: a state from a stranger cannot run code.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

import torch

from library.common.errors import UserError
from library.common.files import flush_folder, flush_to_disk, save_safetensors, write_text
from library.common.safetensors_header import read_header
from library.common.text_files import parse_json, read_text
from library.training.train_progress import TrainProgress

logger = logging.getLogger(__name__)
FORMAT = 1
POSITION_FILE = "train_state.json"


class Stateful(Protocol):
    """A component whose state dict is saved and restored: optimizer, schedule, EMA."""

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state: dict[str, object], /) -> object: ...


class RandomStates(TypedDict, total=False):
    """The generators of one process. cuda: one state a device; absent without CUDA."""

    python: tuple[int, tuple[int, ...], float | None]
    torch: torch.Tensor
    cuda: list[torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A state in host memory, taken between two steps; it may be written while training goes on."""

    progress: TrainProgress
    options: Mapping[str, object]  # what shapes the run, to be compared at resume
    weights: dict[str, torch.Tensor]
    components: dict[str, object]  # state dicts
    random_states: RandomStates


def take_snapshot(
    progress: TrainProgress,
    options: Mapping[str, object],
    weights: Mapping[str, torch.Tensor],
    components: Mapping[str, Stateful],
) -> Snapshot:
    """Copy everything to host memory. Waits for the device once."""
    return Snapshot(
        progress,
        options,
        {key: _copy_to_host(value) for key, value in weights.items()},
        {name: _to_host(component.state_dict()) for name, component in components.items()},
        random_states(),
    )


def random_states() -> RandomStates:
    """This process's generators: Python's and torch's, every device's."""
    version, words, gauss = random.getstate()
    states: RandomStates = {"python": (version, words, gauss), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: RandomStates) -> None:
    """Set the generators to `states`; those of CUDA devices where there are as many as when they were saved."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def write_state(folder: Path, snapshot: Snapshot, rank: int = 0, barrier: Callable[[], None] | None = None) -> None:
    """Write the state folder. With several processes all call it; `barrier` lets them wait for each other.

    OSError where it cannot be written; what was there before stays.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        _fill_and_replace(temporary, folder, snapshot, rank, barrier or (lambda: None))
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fill_and_replace(temporary: Path, folder: Path, snapshot: Snapshot, rank: int, wait: Callable[[], None]) -> None:
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    if temporary.is_dir():  # not on other machines' disks; steps seed their draws themselves, so nothing is lost
        _save(temporary / f"random_states_{rank}.pt", snapshot.random_states)
    if rank == 0:
        save_safetensors(temporary / "model.safetensors", snapshot.weights)
        for name, state in snapshot.components.items():
            _save(temporary / f"{name}.pt", state)
    wait()
    if rank == 0:
        progress = snapshot.progress
        facts = {
            "current_epoch": progress.epoch,
            "current_step": progress.step,
            "format": FORMAT,
            "position": asdict(progress),
            "options": dict(snapshot.options),
            "torch": torch.__version__,
        }
        write_text(temporary / POSITION_FILE, json.dumps(facts, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        _replace_folder(temporary, folder)
    wait()


@dataclass(frozen=True)
class SavedState:
    """A state folder whose progress has been read and whose files are known to be there."""

    folder: Path
    position: TrainProgress
    options: dict[str, object]

    @property
    def seed(self) -> int:
        return cast(int, self.options["seed"])

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "model.safetensors")

    def component(self, name: str) -> dict[str, object] | None:
        """The state dict of a component; None where the state has none."""
        path = self.folder / f"{name}.pt"
        return cast("dict[str, object]", _load(path)) if path.exists() else None

    def random_states(self, rank: int) -> RandomStates | None:
        path = self.folder / f"random_states_{rank}.pt"
        return cast(RandomStates, _load(path)) if path.exists() else None


def open_state(folder: Path, whole: bool = True) -> SavedState:
    """Read a state's progress. UserError if the folder is not a state of ours; `whole`: or lacks the weights."""
    path = folder / POSITION_FILE
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder. Give a folder that ends in -state, or auto.")
    try:
        facts = cast("dict[str, Any]", parse_json(read_text(path)))
        progress = TrainProgress(**facts["position"])
        if not all(type(number) is int and 0 <= number < 2**53 for number in asdict(progress).values()):
            raise _Damaged(f"{POSITION_FILE} holds a position that is none")
        if whole:
            _check_files(folder)
        return SavedState(folder, progress, dict(facts["options"]))
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if path.exists() and "position" not in path.read_text(encoding="utf-8", errors="replace"):
            reason = "it was saved by another program (sd-scripts' states hold neither the place in the epoch nor every random state)"
        else:
            reason = str(error) if isinstance(error, UserError | _Damaged) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"--resume {folder}: this is not a state that can be continued: {reason}. To start from its LoRA weights alone, use --network_weights."
        ) from error


class _Damaged(ValueError):
    """A file of a state is missing or not whole."""


def _check_files(folder: Path) -> None:
    """Whether the files are whole, as far as that is quickly seen: the header of the weights, the end of every other part."""
    if not (folder / "model.safetensors").is_file():
        raise _Damaged("model.safetensors is missing")
    read_header(folder / "model.safetensors")
    for path in sorted(folder.glob("*.pt")):
        if not zipfile.is_zipfile(path):
            raise _Damaged(f"{path.name} is cut short or damaged")


def own_state_name(name: str) -> re.Pattern[str]:
    """The names of the states of output name `name`."""
    return re.compile(re.escape(name) + r"(-\d{6}|-step\d{8})?-state")


def newest_state(output_dir: Path, name: str) -> SavedState | None:
    """The whole state of output name `name` that has come farthest; broken and half-written folders are passed over."""
    pattern = own_state_name(name)
    if not output_dir.is_dir():
        return None
    replaced = [old for old in output_dir.glob(".*-state.old") if not (output_dir / _replaced_name(old)).exists()]
    folders = {folder: folder.name for folder in output_dir.glob("*-state")} | {
        old: _replaced_name(old) for old in replaced
    }
    states = []
    for folder, folder_name in folders.items():
        if pattern.fullmatch(folder_name):
            try:
                states.append(open_state(folder))
            except UserError as error:
                logger.warning("A state that is not whole is passed over. %s", error)
    return max(states, key=lambda state: (state.position.step, state.folder.stat().st_mtime_ns), default=None)


def _replaced_name(old: Path) -> str:
    """The state's name, of one that a run was replacing when it died: `.<name>.old`."""
    return old.name[1 : -len(".old")]


def changed_options(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Options whose value differs from the saved run's, as "name: old -> new"; those that the saved run lacks come last."""
    plain = json.loads(json.dumps(dict(now), default=str))
    return [
        f"{key}: {saved.get(key)!r} -> {plain.get(key)!r}"
        for key in sorted(saved.keys() | plain.keys(), key=lambda key: (key not in saved, key))
        if saved.get(key) != plain.get(key)
    ]


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Put `temporary` in the place of `folder`; the old one is removed only after the new one stands."""
    for path in temporary.iterdir():
        flush_to_disk(path)
    if not folder.exists():
        os.replace(temporary, folder)
        flush_folder(folder.parent)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(temporary, folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _to_host(value: object) -> object:
    """A copy of a state dict that shares no memory with the live objects."""
    if isinstance(value, torch.Tensor):
        return _copy_to_host(value)
    if isinstance(value, Mapping):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(item) for item in value)
    return value


def _save(path: Path, state: object) -> None:
    with path.open("wb") as file:  # given a path, torch reports a full disk by an error of its own, not by OSError
        torch.save(state, file)


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: this part of the state cannot be read ({type(error).__name__}). Resume from an older state."
        ) from error
