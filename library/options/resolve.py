"""From the words of the command line to options that are whole: parsed, merged with the config file, filled in and checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from library.options.checks import check_options
from library.options.config_file import config_path, read_config
from library.options.normalise import normalise_options
from library.options.parser import default_values, given_values


@dataclass(frozen=True)
class ResolvedOptions:
    """args: every option, implied ones filled in. as_given: before that, for `write_config`.

    problems must be mended before training; they are returned, so that they can be told with those of dataset and model.
    warnings are for the log, once each.
    """

    args: argparse.Namespace
    as_given: argparse.Namespace
    problems: list[str]
    warnings: list[str]


def resolve_options(argv: Sequence[str] | None = None) -> ResolvedOptions:
    """Read the command line (None: the program's own) and its config file, which the command line overrides.

    Raises UserError with all that can't be read in either, and SystemExit(0) after `--help`.
    """
    given = given_values(argv)
    config = {}
    if given.get("config_file") and not given.get("output_config"):
        config = read_config(config_path(given["config_file"]))
    values = {**default_values(), **config, **given}
    args = argparse.Namespace(**values)
    notes = normalise_options(args)
    problems, warnings = check_options(args)
    return ResolvedOptions(args, argparse.Namespace(**values), problems, notes + warnings)
