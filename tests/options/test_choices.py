"""Packages beside the options know no option: their choices and defaults agree with those of the rows."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from library.flow.loss import HUBER_SCHEDULES, LOSS_TYPES, LossSettings
from library.flow.samplers import SAMPLERS
from library.flow.timesteps import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES, FlowSettings
from library.memory.quantization import KINDS
from library.options.groups.monitoring import WORKING_SAMPLERS
from library.options.table import BY_NAME
from library.sd3.text_encoder_manager import parse_t5_dtype
from library.training.precision import DTYPES


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("loss_type", LOSS_TYPES),
        ("huber_schedule", HUBER_SCHEDULES),
        ("weighting_scheme", WEIGHTING_SCHEMES),
        ("timestep_sampling", TIMESTEP_SAMPLINGS),
        ("loss_weighting", LOSS_WEIGHTINGS),
        ("mixed_precision", tuple(DTYPES)),
        ("base_quantization", tuple(kind for kind in KINDS if kind != "fp8")),
    ],
)
def test_choices_are_what_the_code_knows(name: str, known: tuple[str, ...]) -> None:
    assert BY_NAME[name].choices == known


def test_the_samplers_that_work_are_those_of_flow() -> None:
    choices = BY_NAME["sample_sampler"].choices
    assert choices is not None and set(WORKING_SAMPLERS) == set(SAMPLERS) & set(choices)


def test_every_dtype_of_t5_is_known() -> None:
    choices = BY_NAME["t5xxl_dtype"].choices
    assert choices is not None and all(parse_t5_dtype(choice, torch.float32) for choice in choices)


@pytest.mark.parametrize("settings", [FlowSettings, LossSettings])
def test_defaults_are_those_of_the_settings(settings: type) -> None:
    for field in fields(settings):
        default = BY_NAME[field.name].default
        assert default == field.default or default is None, field.name
