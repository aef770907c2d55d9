"""The options that are defaults of keys of the dataset file agree with the keys, whose declarations know no options."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from library.data.command_line import KEY_OPTIONS, data_options
from library.data.settings import KEYS, CaptionSettings, DatasetSettings, Interpolation, SubsetSettings
from library.options.option import Option, finite
from library.options.table import BY_NAME, OPTIONS

AS_TEXT = {"resolution", "face_crop_aug_range"}  # "832,1216" on the command line
TYPES = {str: str, int: int, float: finite, bool: bool, Interpolation: str}


def test_options_and_keys_name_each_other() -> None:
    assert {option.name: option.default_of for option in OPTIONS if option.default_of} == dict(KEY_OPTIONS)
    assert set(data_options()) <= set(BY_NAME)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.default_of], ids=lambda option: option.name)
def test_an_option_has_the_type_and_the_default_of_its_key(option: Option) -> None:
    key = KEYS[option.default_of]
    hints: dict[str, object] = {}
    for owner in (CaptionSettings, SubsetSettings, DatasetSettings):
        hints |= get_type_hints(owner)
    if option.name in AS_TEXT:
        assert option.type is str and option.default is None is key.default
        return
    parts = [part for part in get_args(hints[key.name]) if part is not type(None)]
    expected = parts[0] if parts and hints[key.name] is not Interpolation else hints[key.name]
    assert option.type is TYPES[expected]
    assert option.default == key.default or (option.default is None and key.default in ("", None))
    if expected is Interpolation:
        assert option.choices == get_args(Interpolation)


def test_every_field_of_the_settings_is_a_key_or_is_made_by_the_program() -> None:
    made = {"name", "captions", "loss_weight", "subsets"}
    fields = {name for owner in (CaptionSettings, SubsetSettings, DatasetSettings) for name in get_type_hints(owner)}
    assert fields == made | set(KEYS)
