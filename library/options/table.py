"""All options, group by group in the order of `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from library.options.groups import (
    captions,
    compatibility,
    dataset,
    loss,
    memory,
    model,
    monitoring,
    saving,
    training,
)
from library.options.option import Group, Kind, Option

GROUPS: tuple[Group, ...] = (
    model.RUNNING,
    model.MODEL,
    dataset.DATASET,
    captions.CAPTIONS,
    captions.CACHING,
    model.NETWORK,
    training.TRAINING,
    training.OPTIMIZER,
    training.SCHEDULER,
    loss.LOSS,
    model.SD3,
    memory.MEMORY,
    saving.SAVING,
    saving.RESUMING,
    monitoring.PREVIEWS,
    loss.VALIDATION,
    monitoring.LOGGING,
    monitoring.METADATA,
    saving.HUB,
    memory.DISTRIBUTED,
    compatibility.WITHOUT_EFFECT,
    compatibility.REFUSED,
)
OPTIONS: tuple[Option, ...] = tuple(option for group in GROUPS for option in group.options)
BY_NAME: Mapping[str, Option] = MappingProxyType({option.name: option for option in OPTIONS})
"""Every option under its name, that is its flag without dashes."""


def option_class(name: str) -> Kind:
    """Whether the option works, has no effect on SD3, or is refused. KeyError for a name that is none."""
    return BY_NAME[name].kind
