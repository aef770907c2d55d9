"""All options, group by group in the order of `--help`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from library.options.groups import (
    caching,
    captions,
    dataset,
    distributed,
    huggingface,
    logging_options,
    loss,
    memory,
    metadata,
    model,
    network,
    optimizer,
    refused,
    resuming,
    running,
    sampling,
    saving,
    scheduler,
    sd3,
    training,
    validation,
    without_effect,
)
from library.options.option import Group, Kind, Option

GROUPS: tuple[Group, ...] = (
    running.GROUP,
    model.GROUP,
    dataset.GROUP,
    captions.GROUP,
    caching.GROUP,
    network.GROUP,
    training.GROUP,
    optimizer.GROUP,
    scheduler.GROUP,
    loss.GROUP,
    sd3.GROUP,
    memory.GROUP,
    saving.GROUP,
    resuming.GROUP,
    sampling.GROUP,
    validation.GROUP,
    logging_options.GROUP,
    metadata.GROUP,
    huggingface.GROUP,
    distributed.GROUP,
    without_effect.GROUP,
    refused.GROUP,
)
OPTIONS: tuple[Option, ...] = tuple(option for group in GROUPS for option in group.options)
BY_NAME: Mapping[str, Option] = MappingProxyType({option.name: option for option in OPTIONS})
"""Every option under its name, that is its flag without dashes."""


def option_class(name: str) -> Kind:
    """Whether the option works, has no effect on SD3, or is refused. KeyError for a name that is none."""
    return BY_NAME[name].kind
