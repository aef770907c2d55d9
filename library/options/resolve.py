"""The options of a run, whole: parsed, merged with the config file, normalized and checked. Open this file first.

An option is one row (`option.py`) of the tables in `groups/`, which `table.py` puts in order. From the rows are made:
the argparse parser (`parser.py`), the keys of `--config_file` (`config_file.py`), the implied values (`normalize.py`), the checks
(`checks.py`), what a resume compares and metadata records (`values.py`), and the option reference (`tools/make_option_docs.py`).
A new option is a row plus the code that uses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from library.options.checks import check_options
from library.options.config_file import config_path, read_config
from library.options.normalize import normalize_options
from library.options.parser import command_line_values, default_values


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
    words = command_line_values(argv)
    config = {}
    if words.get("config_file") and not words.get("output_config"):
        config = read_config(config_path(str(words["config_file"])))
    values = {**default_values(), **config, **words}
    as_given = argparse.Namespace(**values)
    args, notes = normalize_options(as_given)
    problems, warnings = check_options(args)
    return ResolvedOptions(args, as_given, problems, notes + warnings)
