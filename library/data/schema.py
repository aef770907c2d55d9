"""The tables of a dataset file and the keys that each may hold. Every wrong key or value becomes one sentence.

Three levels hold keys: [general], [[datasets]] and [[datasets.subsets]]. A value is looked for from the innermost outwards, so nearly
all are optional here; `library.data.config` resolves them. The keys are declared in `library.data.settings`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from library.data.keys import STYLES, Level, Style
from library.data.settings import KEYS

Table = Mapping[str, Any]


class Keys(BaseModel):
    """A table: unknown keys are refused, nothing is converted but whole numbers to floats."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _table(level: Level, style: Style | None = None) -> type[Keys]:
    """The model of the tables of one level, in datasets of one style, or of [general], which has no style."""
    definitions: dict[str, Any] = {}
    for name, declared in KEYS.items():
        if level in declared.key.levels and style in (None, *declared.key.styles):
            required = level == "subsets" and style in declared.key.required
            definitions[name] = (declared.type, ...) if required else (declared.type | None, None)
    return create_model(f"{level} {style or ''}".strip(), __base__=Keys, **definitions)


GENERAL_TABLE = _table("general")
"""[general], and the command line's values too: they are checked by the same rules."""
DATASET_TABLES: dict[str, type[Keys]] = {style: _table("datasets", style) for style in STYLES}
SUBSET_TABLES: dict[str, type[Keys]] = {style: _table("subsets", style) for style in STYLES}

COMMAND_LINE_ONLY = ("debug_dataset", "prior_loss_weight", "max_token_length", "masked_loss", "cache_latents", "seed")
OTHER_NAMES = {
    **{declared.option: name for name, declared in KEYS.items() if declared.option not in (None, name)},
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
    expectation = {
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
    return f'key "{key}" {expectation}, but it is {detail["input"]!r}'


def unknown_key(key: str, model: type[Keys]) -> str:
    """Why `key` isn't allowed in this table, with the key or the place that was probably meant."""
    in_subset = issubclass(model, tuple(SUBSET_TABLES.values()))
    if key in COMMAND_LINE_ONLY:
        return f'key "{key}" does not belong in a dataset file; give it on the command line as --{key}'
    if key == "conditioning_data_dir" and in_subset:
        return 'key "conditioning_data_dir" needs --masked_loss, and then every subset of the dataset must have it'
    if any(key in table.model_fields for table in SUBSET_TABLES.values()):
        if in_subset or key in GENERAL_TABLE.model_fields:
            return f'key "{key}" has no meaning for this style of subset'
        return f'key "{key}" belongs in [[datasets.subsets]], not here'
    if key in GENERAL_TABLE.model_fields:
        return f'key "{key}" belongs in [[datasets]] or [general], not here'
    return f'unknown key "{key}"' + nearest(OTHER_NAMES.get(key, key), model.model_fields)


def nearest(key: str, known: Iterable[str]) -> str:
    """A clause that offers the known name closest to `key`, or all of them where none is close."""
    names = sorted(known)
    near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known keys: {', '.join(names)}"
