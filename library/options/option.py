"""What one option is: the row of the tables in `library/options/groups/`, and the types that values are read with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What becomes of an option when it is given."""

    WORKS = "works"
    NO_EFFECT = "without effect"  # accepted, with one warning
    REFUSED = "refused"  # an error that gives the reason


@dataclass(frozen=True)
class Option:
    """One option of the command line.

    type reads one value from text; `bool` makes a switch that takes no value. `nargs` is None (one value) or "*" (a list).
    help is whole sentences; the default and the choices are added where they are shown. `reason` says, for an option that
    has no effect or is refused, why; it is a clause that follows "because".
    """

    flag: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[Any, ...] | None = None
    nargs: str | None = None
    kind: Kind = Kind.WORKS
    reason: str = ""
    secret: bool = False  # never written to a file or a log
    turns_off: str = ""  # a switch that sets another switch to False: that one's name

    @property
    def name(self) -> str:
        """The option's key in a config file."""
        return self.flag.lstrip("-")

    @property
    def dest(self) -> str:
        """The attribute of the Namespace that it sets."""
        return self.turns_off or self.name

    @property
    def is_switch(self) -> bool:
        return self.type is bool


@dataclass(frozen=True)
class Group:
    """Options of one concern, under one title in `--help` and in the option reference."""

    title: str
    options: tuple[Option, ...]


def switch(flag: str, help: str, kind: Kind = Kind.WORKS, reason: str = "", default: bool = False) -> Option:
    """An option without a value: False until it is given."""
    return Option(flag, help, bool, default, kind=kind, reason=reason)


def path(text: str) -> str:
    """A path as it stands. An empty one means not given (`normalise_options` makes it None)."""
    return text


def finite(text: str) -> float:
    """A float that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def int_or_float(text: str) -> int | float:
    """A count ("100"), a fraction ("0.1") or a percentage ("10%", a fraction too). Whole numbers from 1 on are counts."""
    if text.endswith("%"):
        return finite(text[:-1]) / 100.0
    value = finite(text)
    return int(value) if value == 0 or (value >= 1 and value.is_integer()) else value


def int_or_auto(text: str) -> int | str:
    """A whole number, or the word "auto"."""
    return "auto" if text == "auto" else int(text)


TYPE_NAMES: dict[Callable[[str], Any], str] = {
    str: "text",
    path: "a path",
    int: "a whole number",
    finite: "a number",
    int_or_float: 'a number of steps, a fraction or a percentage such as "10%"',
    int_or_auto: 'a whole number or "auto"',
    bool: "true or false",
}
METAVARS: dict[Callable[[str], Any], str] = {
    str: "TEXT",
    path: "PATH",
    int: "N",
    finite: "X",
    int_or_float: "N|X|N%",
    int_or_auto: "N|auto",
}


def read_value(option: Option, text: str) -> Any:
    """One value of `option` from text. Raises ValueError with the sentence that says what is wanted."""
    try:
        value = option.type(text)
    except (ValueError, OverflowError, argparse.ArgumentTypeError):
        raise ValueError(f"it must be {TYPE_NAMES[option.type]}, but it is {text!r}") from None
    check_choice(option, value)
    return value


def read_switch(option: Option, text: str) -> bool:
    """What `--switch=true` or `--switch=false` sets the option's dest to. Raises ValueError for other words."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"it is on or off: give it alone, or with =true or =false, not {text!r}")
    return (text.lower() == "true") is not bool(option.turns_off)


def check_choice(option: Option, value: Any) -> None:
    """Raises ValueError where `value` is none of the option's choices."""
    if option.choices is not None and value not in option.choices:
        listed = ", ".join(str(choice) for choice in option.choices)
        raise ValueError(f"it must be one of {listed}, but it is {str(value)!r}")
