"""The command line: the argparse parser, and a reader that tells every mistake at once."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

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
    _add_options(parser)
    return parser


class CollectingParser(argparse.ArgumentParser):
    """The same options, for a caller that collects mistakes: they raise, nothing exits, and defaults are not filled in."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own leaves out -1e-4
        _add_options(self)
        for action in self._actions:
            action.default = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (None: the program's own). Raises UserError with every mistake in it.

    `-h` and `--help` print the help and raise SystemExit(0).
    """
    return argparse.Namespace(**{**default_values(), **command_line_values(argv)})


def default_values() -> dict[str, object]:
    """Every option's default, by dest."""
    return {option.dest: option.default for option in OPTIONS}


def command_line_values(argv: Sequence[str] | None = None) -> dict[str, object]:
    """What the command line itself says, by dest. Of an option given twice the last counts.

    argparse stops at its first mistake, so it is given one option after the other, each with the words that follow it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        build_parser().print_help()
        raise SystemExit(0)
    parser, namespace, problems = CollectingParser(), argparse.Namespace(), Problems()
    for part in _parts(words):
        for problem in _parse_part(parser, part, namespace):
            problems.add(problem)
    problems.raise_if_any()
    return vars(namespace)


def _parts(words: list[str]) -> list[list[str]]:
    """The command line cut before each flag."""
    starts = [place for place, word in enumerate(words) if place == 0 or _is_flag(word)]
    return [words[start:end] for start, end in zip(starts, [*starts[1:], len(words)])]


def _parse_part(parser: CollectingParser, words: list[str], namespace: argparse.Namespace) -> list[str]:
    """Let argparse read a flag and the words after it into `namespace`. Returns the problems."""
    flag, has_value, _ = words[0].partition("=")
    option = BY_NAME.get(flag[2:]) if flag.startswith("--") else None
    try:
        _, unread = parser.parse_known_args(words, namespace)
    except (ValueError, OverflowError) as error:
        if option is None:
            raise
        return _refused_part(option, words, namespace, str(error))
    if option is None and _is_flag(words[0]):
        unknown = unknown_option(flag, (f"--{name}" for name in BY_NAME))
        return [unknown, *_strays(words[1:] if has_value else [])]  # else the words were meant as its values
    return _strays(unread)


def _refused_part(option: Option, words: list[str], namespace: argparse.Namespace, message: str) -> list[str]:
    """The problems of a part that argparse refuses, in our words. A switch with =true or =false is read here."""
    _, has_value, text = words[0].partition("=")
    texts = [text] if has_value else words[1:]
    after = [] if option.nargs else words[1 if has_value else 2 :]
    try:
        if option.is_switch:
            setattr(namespace, option.dest, read_switch(option, text))
            return _strays(after)
        for each in texts if option.nargs else texts[:1]:
            read_value(option, each)
        message = message if texts else "its value is missing"
    except ValueError as error:
        message = str(error)
    return [f"{option.flag}: {message}.", *_strays(after)]


def _strays(words: Iterable[str]) -> list[str]:
    return [
        f"{word!r} belongs to no option. Put values with spaces in quotes, and end a line with \\ alone."
        for word in words
    ]


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


def _add_options(parser: argparse.ArgumentParser) -> None:
    for group in GROUPS:
        section = parser.add_argument_group(group.title)
        for option in group.options:
            section.add_argument(option.flag, **_argparse_settings(option))


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
