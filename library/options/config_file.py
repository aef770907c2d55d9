"""`--config_file`: options from a TOML file, checked like the command line; `--output_config`: options to such a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from library.common.errors import Problems, UserError
from library.common.files import write_text
from library.common.text_files import FormatError, parse_toml, read_text
from library.options.option import Option, finite, read_value
from library.options.parser import unknown_option
from library.options.table import BY_NAME, GROUPS

COMMAND_LINE_ONLY = ("config_file", "output_config")


def config_path(name: str) -> Path:
    """The file that `--config_file name` means: `.toml` may be left out."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config(path: Path) -> dict[str, object]:
    """The options that the file sets, by dest. Sections are for order alone and may have any name.

    Raises UserError with every problem: unreadable, not TOML, unknown keys, wrong types, wrong choices, keys set twice.
    """
    known, problems = BY_NAME, Problems()
    values: dict[str, object] = {}
    set_by: dict[str, str] = {}
    for section, key, value in _entries(_read_toml(path)):
        where = f"{path}, {f'[{section}] ' if section else ''}{key}"
        if key not in known:
            problems.add(f"{where}: {unknown_option(key, known)}")
        elif key in COMMAND_LINE_ONLY:
            problems.add(f"{where}: this option is for the command line alone; take it out of the file.")
        elif known[key].dest in set_by:
            problems.add(f"{where}: {set_by[known[key].dest]} sets this already; keep one of them.")
        else:
            set_by[known[key].dest] = f"[{section}] {key}" if section else key
            try:
                values[known[key].dest] = toml_value(known[key], value)
            except ValueError as error:
                problems.add(f"{where}: {error}.")
    problems.raise_if_any()
    return values


def write_config(args: argparse.Namespace) -> Path:
    """Write the options of `args` that differ from their defaults to `--config_file`. Returns the file's path.

    Secrets are left out. Raises UserError where no file is named, where it exists, or where it can't be written.
    """
    if not args.config_file:
        raise UserError("--output_config needs --config_file, the name of the file to write.")
    path = config_path(args.config_file)
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten; choose another name for --config_file.")
    try:
        write_text(path, config_text(args))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}.") from None
    return path


def config_text(args: argparse.Namespace) -> str:
    """The TOML text of the options that differ from their defaults, a section for each group, without secrets."""
    sections = []
    for group in GROUPS:
        lines = [
            f"{option.name} = {_toml(getattr(args, option.dest))}"
            for option in group.options
            if not (option.secret or option.turns_off or option.name in COMMAND_LINE_ONLY)
            and getattr(args, option.dest) not in (option.default, None)
        ]
        if lines:
            sections.append("\n".join([f"[{json.dumps(group.title)}]", *lines]) + "\n")
    return "\n".join(sections)


def toml_value(option: Option, value: object) -> object:
    """A TOML value as the option's own type. Raises ValueError with what is wanted.

    An integer is taken where a float or a text is meant, and one value where a list is meant.
    """
    if option.is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"it must be true or false, but it is {_shown(value)}")
        return value is not bool(option.turns_off)
    if option.nargs == "*":
        return [_toml_single(option, each) for each in (value if isinstance(value, list) else [value])]
    return _toml_single(option, value)


def _toml_single(option: Option, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(
            f"it must be {'a single value' if isinstance(value, list) else 'text or a number'}, but it is {_shown(value)}"
        )
    if option.type is finite and isinstance(value, str):
        raise ValueError(f"it must be a number, but it is the text {_shown(value)}; take the quotes away")
    if option.type is int and isinstance(value, (str, float)):
        raise ValueError(f"it must be a whole number, but it is {_shown(value)}")
    return read_value(option, value if isinstance(value, str) else str(value))


def _read_toml(path: Path) -> dict[str, object]:
    try:
        text = read_text(path)
    except FormatError as error:
        raise UserError(f"--config_file: {path} can't be read: {error}.") from None
    try:
        return parse_toml(text)
    except FormatError as error:
        raise UserError(f"--config_file: {path} is not valid TOML: {error}.") from None


def _entries(tables: dict[str, object]) -> Iterator[tuple[str, str, object]]:
    """(section or "", key, value) of each entry; a section is a table at the top."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from ((key, inner, each) for inner, each in value.items())
        else:
            yield "", key, value


def _toml(value: object) -> str:
    """A bool, number, text or list of them as TOML."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _shown(value: object) -> str:
    text = str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
