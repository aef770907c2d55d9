"""The tables of a dataset file and the keys that each may hold. Every wrong key or value becomes one sentence.

Three levels hold keys: [general], [[datasets]] and [[datasets.subsets]]. A value is looked for from the innermost outwards, so all
fields are optional here; `library.data.config` resolves them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from library.data.settings import Interpolation

Table = Mapping[str, Any]


def _size(value: object) -> object:
    """1024 or [832, 1216] -> (W, H)."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise PydanticCustomError("size", "must be a whole number or [width, height]")
    if min(sides) < 1:
        raise PydanticCustomError("size", "must be above 0")
    return tuple(sides)


def _range(value: object) -> object:
    """[0.3, 0.6] -> (0.3, 0.6)."""
    ends = value if isinstance(value, list | tuple) else []
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise PydanticCustomError("range", "must be two numbers, as in [0.3, 0.6]")
    if not 0 < ends[0] <= ends[1]:
        raise PydanticCustomError("range", "must be two numbers above 0, the smaller one first")
    return (float(ends[0]), float(ends[1]))


Resolution = Annotated[tuple[int, int], BeforeValidator(_size)]
FaceRange = Annotated[tuple[float, float], BeforeValidator(_range)]
Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


class Keys(BaseModel):
    """A table: unknown keys are refused, nothing is converted but whole numbers to floats."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SharedKeys(Keys):
    """Keys of a subset that may also stand in [[datasets]] and [general]."""

    num_repeats: int | None = None
    shuffle_caption: bool | None = None
    caption_separator: Text | None = None
    keep_tokens: NotNegative | None = None
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: Probability | None = None
    caption_dropout_every_n_epochs: NotNegative | None = None
    caption_tag_dropout_rate: Probability | None = None
    token_warmup_min: NotNegative | None = None
    token_warmup_step: Annotated[float, Field(ge=0)] | None = None
    color_aug: bool | None = None
    flip_aug: bool | None = None
    face_crop_aug_range: FaceRange | None = None
    random_crop: bool | None = None
    custom_attributes: dict[str, Any] | None = None
    resize_interpolation: Interpolation | None = None


class CaptionFileKeys(Keys):
    """Keys about caption files, which metadata style has no use for."""

    caption_extension: Text | None = None
    class_tokens: str | None = None


class CacheKeys(Keys):
    cache_info: bool | None = None


class AlphaKeys(Keys):
    alpha_mask: bool | None = None


class DatasetKeys(SharedKeys, CacheKeys):
    resolution: Resolution | None = None
    batch_size: Positive | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: Positive | None = None
    max_bucket_reso: Positive | None = None
    bucket_reso_steps: Positive | None = None
    bucket_no_upscale: bool | None = None
    network_multiplier: float | None = None
    validation_split: float | None = None
    validation_seed: int | None = None


class GeneralTable(DatasetKeys, CaptionFileKeys, AlphaKeys):
    """[general], and the command line's values too: they are checked by the same rules."""


class FolderDataset(DatasetKeys, CaptionFileKeys, AlphaKeys):
    """[[datasets]] whose subsets are folders."""


class MetadataDataset(DatasetKeys, AlphaKeys):
    """[[datasets]] whose subsets have a metadata_file."""


class MaskDataset(DatasetKeys, CaptionFileKeys):
    """[[datasets]] whose subsets have a folder of masks."""


class FolderSubset(SharedKeys, CaptionFileKeys, CacheKeys, AlphaKeys):
    image_dir: Text
    is_reg: bool | None = None


class MetadataSubset(SharedKeys, CacheKeys, AlphaKeys):
    metadata_file: Text
    image_dir: Text | None = None


class MaskSubset(SharedKeys, CaptionFileKeys, CacheKeys):
    image_dir: Text
    conditioning_data_dir: Text


SUBSET_TABLES: dict[str, type[Keys]] = {"folder": FolderSubset, "metadata": MetadataSubset, "mask": MaskSubset}
DATASET_TABLES: dict[str, type[Keys]] = {"folder": FolderDataset, "metadata": MetadataDataset, "mask": MaskDataset}

COMMAND_LINE_ONLY = ("debug_dataset", "prior_loss_weight", "max_token_length", "masked_loss", "cache_latents", "seed")
OTHER_NAMES = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",
    "train_data_dir": "image_dir",
    "in_json": "metadata_file",
}


def check(model: type[Keys], table: Table) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the table's valid values (converted, without nulls) and its problems as (key, what is wrong).

    Each key is validated alone, so that one bad value hides no other.
    """
    blank, problems = model.model_construct(), []
    good: dict[str, Any] = {}
    for key, value in table.items():
        if key not in model.model_fields:
            problems.append((key, unknown_key(key, model)))
        elif value is not None:
            try:
                model.__pydantic_validator__.validate_assignment(blank, key, value)
                good[key] = getattr(blank, key)
            except ValidationError as error:
                problems.append((key, _sentence(key, error.errors()[0])))
    for key, field in model.model_fields.items():
        if field.is_required() and table.get(key) is None:
            problems.append((key, f'key "{key}" is missing'))
    return good, problems


def _sentence(key: str, detail: ErrorDetails) -> str:
    """One pydantic error as a sentence about `key`."""
    limits = detail.get("ctx", {})
    wanted = {
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "string_type": "must be text in quotes",
        "string_too_short": "must not be empty",
        "dict_type": "must be a table",
        "greater_than_equal": f"must be at least {limits.get('ge')}",
        "less_than_equal": f"must be at most {limits.get('le')}",
        "literal_error": f"must be one of {limits.get('expected')}",
    }.get(detail["type"], detail["msg"])
    return f'key "{key}" {wanted}, but it is {detail["input"]!r}'


def unknown_key(key: str, model: type[Keys]) -> str:
    """Why `key` isn't allowed in this table, with the key or the place that was probably meant."""
    in_subset = issubclass(model, tuple(SUBSET_TABLES.values()))
    if key in COMMAND_LINE_ONLY:
        return f'key "{key}" does not belong in a dataset file; give it on the command line as --{key}'
    if key == "conditioning_data_dir" and in_subset:
        return 'key "conditioning_data_dir" needs --masked_loss, and then every subset of the dataset must have it'
    if any(key in table.model_fields for table in SUBSET_TABLES.values()):
        if in_subset or key in GeneralTable.model_fields:
            return f'key "{key}" has no meaning for this style of subset'
        return f'key "{key}" belongs in [[datasets.subsets]], not here'
    if key in GeneralTable.model_fields:
        return f'key "{key}" belongs in [[datasets]] or [general], not here'
    return f'unknown key "{key}"' + nearest(OTHER_NAMES.get(key, key), model.model_fields)


def nearest(key: str, known: Iterable[str]) -> str:
    """A clause that offers the known name closest to `key`, or all of them where none is close."""
    names = sorted(known)
    found = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    return f'; did you mean "{found[0]}"?' if found else f"; known keys: {', '.join(names)}"
