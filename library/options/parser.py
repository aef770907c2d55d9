"""The command line: the argparse parser, and a reader that tells every mistake at once."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from library.common.errors import Problems
from library.options.option import METAVARS, Option, read_switch, read_value
from library.options.table import BY_NAME, GROUPS, OPTIONS

NEGATIVE_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$|-\d+(\.\d*)?[eE][-+]?\d+$")


def build_parser(
    prog: str = "sd3_train_network.py", description: str = "Train a LoRA for Stable Diffusion 3 or 3.5."
) -> argparse.ArgumentParser:
    """The parser of all options. Names must be given in full: an abbreviation could mean another option tomorrow."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for option in group.options:
            section.add_argument(option.flag, **_argparse_settings(option))
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (None: the program's own). Raises UserError with every mistake in it.

    `-h` and `--help` print the help and raise SystemExit(0).
    """
    return argparse.Namespace(**{**default_values(), **given_values(argv)})


def default_values() -> dict[str, Any]:
    """Every option's default, by dest."""
    return {option.dest: option.default for option in OPTIONS}


def given_values(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What the command line itself says, by dest. Of an option given twice the last counts."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        build_parser().print_help()
        raise SystemExit(0)
    options, problems = BY_NAME, Problems()
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word, position = words[position], position + 1
        if not _is_flag(word):
            problems.add(
                f"{word!r} belongs to no option. Put values with spaces in quotes, and end a line with \\ alone."
            )
            continue
        flag, has_value, inline = word.partition("=")
        following: list[str] = []
        while position < len(words) and not _is_flag(words[position]) and not has_value:
            following.append(words[position])
            position += 1
        option = options.get(flag[2:]) if flag.startswith("--") else None
        if option is None:
            problems.add(unknown_option(flag, (f"--{name}" for name in options)))
            continue
        if option.nargs is None and not has_value and following:
            taken = 0 if option.is_switch else 1
            position -= len(following) - taken  # the rest is looked at on its own
            following = following[:taken]
        try:
            values[option.dest] = _value(option, [inline] if has_value else following, bool(has_value))
        except ValueError as error:
            problems.add(f"{option.flag}: {error}.")
    problems.raise_if_any()
    return values


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is no option, with the nearest ones. Dashes before names do not count as likeness."""
    names = {each.lstrip("-"): each for each in known}
    near = [names[each] for each in difflib.get_close_matches(name.lstrip("-"), list(names), n=3, cutoff=0.65)]
    hint = f" Did you mean {' or '.join(near)}?" if near else " See --help for all options."
    return f"{name} is not an option.{hint}"


def _is_flag(word: str) -> bool:
    """Whether a word is an option rather than a value: text with a space, a number below 0 and a lone dash are values."""
    if len(word) < 2 or not word.startswith("-") or NEGATIVE_NUMBER.match(word):
        return False
    return " " not in word.partition("=")[0]


def _value(option: Option, texts: list[str], inline: bool) -> Any:
    """An option's value from the words that follow it. Raises ValueError with what is wrong."""
    if option.is_switch:
        return read_switch(option, texts[0] if inline else "true")
    if option.nargs == "*":
        return [read_value(option, text) for text in texts]
    if not texts:
        raise ValueError("its value is missing")
    return read_value(option, texts[0])


def _argparse_settings(option: Option) -> dict[str, Any]:
    settings: dict[str, Any] = {"default": option.default, "dest": option.dest, "help": _help(option)}
    if option.is_switch:
        return {**settings, "action": "store_false" if option.turns_off else "store_true"}
    settings["type"] = option.type
    if option.choices is not None:
        settings["choices"] = list(option.choices)
    else:
        settings["metavar"] = METAVARS[option.type]
    if option.nargs:
        settings["nargs"] = option.nargs
    return settings


def _help(option: Option) -> str:
    text = option.help
    if not option.is_switch and option.default not in (None, ""):
        text += f" Default: {option.default}."
    if option.reason:
        text += f" {option.kind.value.capitalize()}: {option.reason}."
    return text.replace("%", "%%")  # argparse reads a % as a placeholder
