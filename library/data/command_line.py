"""What the command line says about data: fallbacks of the dataset file, or, without a file, the whole of it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from library.common.errors import Problems, UserError
from library.data.schema import GeneralTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommandLineData:
    """The data options of the command line, as argparse leaves them. The defaults here are the options' defaults."""

    train_data_dir: str | None = None
    reg_data_dir: str | None = None
    in_json: str | None = None
    conditioning_data_dir: str | None = None
    masked_loss: bool = False
    alpha_mask: bool = False
    prior_loss_weight: float = 1.0
    resolution: str | None = None  # "1024" or "832,1216"
    train_batch_size: int = 1
    dataset_repeats: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    validation_split: float = 0.0
    validation_seed: int | None = None
    resize_interpolation: str | None = None
    cache_info: bool = False
    caption_extension: str = ".caption"
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    shuffle_caption: bool = False
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: str | None = None  # "0.3,0.6"


def dataset_keys(command_line: CommandLineData, problems: Problems) -> dict[str, Any]:
    """The command line's values under the names of the dataset file's keys, without those that say nothing.

    The bucket limits count only where they differ from the option's default, so that the default can follow the resolution.
    """
    shared = {field.name for field in fields(CommandLineData)} & GeneralTable.model_fields.keys()
    keys: dict[str, Any] = {name: getattr(command_line, name) for name in sorted(shared)}
    keys["batch_size"] = command_line.train_batch_size
    keys["num_repeats"] = command_line.dataset_repeats
    default = CommandLineData()
    for name in ("min_bucket_reso", "max_bucket_reso"):
        if keys[name] == getattr(default, name):
            del keys[name]
    for name, parse in (("resolution", parse_resolution), ("face_crop_aug_range", parse_face_range)):
        try:
            keys[name] = parse(keys.pop(name))
        except UserError as error:
            problems.collect(error)
    return {key: value for key, value in keys.items() if value is not None}


def parse_resolution(text: str | None) -> list[int] | None:
    """ "1024" -> [1024, 1024], "832,1216" -> [832, 1216] (W, H), nothing -> None."""
    if not text:
        return None
    found = re.fullmatch(r"\s*\(?\s*(\d+)\s*(?:[,xX]\s*(\d+)\s*)?\)?\s*", text)
    if found is None:
        raise UserError(f'--resolution must be "S" or "W,H", as in 1024 or 832,1216, but it is "{text}".')
    width, height = found.group(1), found.group(2) or found.group(1)
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
    regularisation. Raises UserError where nothing can be found.
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
        regularisation = _numbered_folders(command_line.reg_data_dir, "--reg_data_dir", problems)
        subsets += [{**subset, "is_reg": True} for subset in regularisation]
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
        found = re.match(r"(\d+)(?:_(.*))?$", folder.name, re.DOTALL)
        if found is None or int(found.group(1)) == 0:
            logger.warning("%s: %s is left out, its name does not begin with a number above 0", option, folder)
            continue
        subsets.append(
            {"image_dir": str(folder), "num_repeats": int(found.group(1)), "class_tokens": found.group(2) or ""}
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
