"""What the command line says about data: fallbacks of the dataset file, or, without a file, the whole of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.common.errors import Problems, UserError
from library.data.settings import KEYS

logger = logging.getLogger(__name__)


KEY_OPTIONS: Mapping[str, str] = {declared.option: name for name, declared in KEYS.items() if declared.option}
"""The options that are defaults of keys of the dataset file, and those keys."""


@dataclass(frozen=True)
class CommandLineData:
    """The data options of the command line, as argparse leaves them."""

    train_data_dir: str | None = None
    reg_data_dir: str | None = None
    in_json: str | None = None
    conditioning_data_dir: str | None = None
    masked_loss: bool = False
    prior_loss_weight: float = 1.0
    key_options: Mapping[str, object] = field(default_factory=dict)  # those of KEY_OPTIONS, by the options' names

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CommandLineData:
        """Take what concerns data out of all options, by name. What is missing has its default."""
        own = {each.name for each in fields(cls)} & options.keys()
        key_options = {name: options[name] for name in KEY_OPTIONS if name in options}
        return cls(**{name: options[name] for name in own}, key_options=key_options)


def data_options() -> tuple[str, ...]:
    """The names of all options that `CommandLineData` takes."""
    return (*(each.name for each in fields(CommandLineData) if each.name != "key_options"), *KEY_OPTIONS)


def dataset_keys(command_line: CommandLineData, problems: Problems) -> dict[str, Any]:
    """The command line's values under the names of the dataset file's keys, without those that say nothing.

    The bucket limits count only where they differ from the option's default, so that the default can follow the resolution.
    """
    keys: dict[str, Any] = {KEY_OPTIONS[option]: value for option, value in command_line.key_options.items()}
    for name in ("min_bucket_reso", "max_bucket_reso"):
        if keys.get(name) == KEYS[name].default:
            keys.pop(name, None)
    for name, parse in (("resolution", parse_resolution), ("face_crop_aug_range", parse_face_range)):
        try:
            keys[name] = parse(keys.pop(name, None))
        except UserError as error:
            problems.collect(error)
    return {key: value for key, value in keys.items() if value is not None}


def parse_resolution(text: str | None) -> list[int] | None:
    """ "1024" -> [1024, 1024], "832,1216" -> [832, 1216] (W, H), nothing -> None."""
    if not text:
        return None
    match = re.fullmatch(r"\s*\(?\s*(\d+)\s*(?:[,xX]\s*(\d+)\s*)?\)?\s*", text)
    if match is None:
        raise UserError(f'--resolution must be "S" or "W,H", as in 1024 or 832,1216, but it is "{text}".')
    width, height = match.group(1), match.group(2) or match.group(1)
    return [int(width), int(height)]


def parse_face_range(text: str | None) -> list[float] | None:
    """ "0.3,0.6" -> [0.3, 0.6], nothing -> None."""
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f'--face_crop_aug_range must be two numbers, as in 0.3,0.6, but it is "{text}".') from None
    return [low, high]


def dataset_tables(command_line: CommandLineData) -> dict[str, Any]:
    """The command line's datasets as the tables of a dataset file: `--in_json`, or the `10_name` folders of `--train_data_dir`.

    Each folder becomes a subset with its number as num_repeats and its name as class_tokens; folders of `--reg_data_dir` are
    regularization. Raises UserError where there is none.
    """
    if not command_line.train_data_dir and not command_line.in_json:
        raise UserError("No dataset is given: pass --dataset_config, or --train_data_dir with subfolders like 10_name.")
    if command_line.in_json:
        subset: dict[str, Any] = {"metadata_file": command_line.in_json}
        if command_line.train_data_dir:
            subset["image_dir"] = command_line.train_data_dir
        return {"datasets": [{"subsets": [subset]}]}
    problems = Problems()
    subsets = _numbered_folders(command_line.train_data_dir, "--train_data_dir", problems)
    if command_line.reg_data_dir and command_line.masked_loss and command_line.conditioning_data_dir:
        problems.add("--reg_data_dir can't be used with --conditioning_data_dir: regularisation images have no masks.")
    elif command_line.reg_data_dir:
        regularization = _numbered_folders(command_line.reg_data_dir, "--reg_data_dir", problems)
        subsets += [{**subset, "is_reg": True} for subset in regularization]
    problems.raise_if_any()
    return {"datasets": [{"subsets": subsets}]}


def _numbered_folders(parent: str | None, option: str, problems: Problems) -> list[dict[str, Any]]:
    """A subset table for each folder `<number>_<name>` in `parent`, in order of their names."""
    try:
        folders = sorted(
            path for path in Path(parent or "").iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        problems.add(f"{option}: the folder {parent} can't be read: {error.strerror or error}.")
        return []
    subsets = []
    for folder in folders:
        match = re.match(r"(\d+)(?:_(.*))?$", folder.name, re.DOTALL)
        if match is None or int(match.group(1)) == 0:
            logger.warning("%s: %s is left out, its name does not begin with a number above 0", option, folder)
            continue
        subsets.append(
            {"image_dir": str(folder), "num_repeats": int(match.group(1)), "class_tokens": match.group(2) or ""}
        )
    if not subsets:
        problems.add(
            f"{option}: {parent} has no subfolder named like 10_name (repeats, then the words for images without a caption);"
            " move the images into one, or write a dataset file for --dataset_config."
        )
    return subsets


def mask_folder(masks: str, image_dir: object) -> str:
    """Where the masks of `image_dir` are: in the folder of its name within `masks`, or else in `masks` itself."""
    own = Path(masks) / Path(str(image_dir)).name
    return str(own) if own.is_dir() else masks
