"""What one option is: the row of the tables in `library/options/groups/`, and the types that values are read with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What becomes of an option when it is given."""

    WORKS = "works"
    NO_EFFECT = "without effect"  # accepted, with one warning
    REFUSED = "refused"  # an error that gives the reason


@dataclass(frozen=True)
class Option:
    """One option of the command line, and all that the program knows about it apart from the code that uses it.

    type reads one value from text; `bool` makes a switch without a value. `nargs` is None (one value) or "*" (a list). The helps
    are whole sentences; default and choices are added where they are shown. Other options are named by their dest.
    """

    flag: str
    help: str
    help_ja: str
    type: Callable[[str], object] = str
    default: object = None
    choices: tuple[object, ...] | None = None
    nargs: str | None = None

    # The range of the value, or of each value of a list. "auto" and None are in every range.
    min: float | None = None
    max: float | None = None
    above: float | None = None  # an exclusive minimum
    below: float | None = None  # an exclusive maximum
    zero_is_off: bool = False  # an interval: 0 or less means None

    # What it needs of other options
    required: str = ""  # an error without it; says what it names
    requires: tuple[str, ...] = ()  # an error without any of these
    useless_without: tuple[str, ...] = ()  # a warning without any of these
    replaced_by: str = ""  # a warning with this one, which takes its place
    excludes: Mapping[str, str] = field(default_factory=dict, hash=False)  # option -> the reason of the error with it
    default_of: str = ""  # the key of the dataset file that it is the default of (library/data/settings.py)

    # What becomes of it
    kind: Kind = Kind.WORKS
    reason: str = ""  # why it has no effect or is refused: a clause that follows "because"
    turns_off: str = ""  # the switch that this switch sets to False
    secret: bool = False  # never written to a file, a log, a command or metadata
    resume_safe: bool = False  # a resumed run may change it: the weights do not depend on it
    in_metadata: bool = False  # the LoRA file tells its value
    in_resume_command: bool = True  # False: it says where or whether one run starts, or another option holds its value

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

    @property
    def has_range(self) -> bool:
        return any(bound is not None for bound in (self.min, self.max, self.above, self.below))

    def in_range(self, value: float) -> bool:
        return (
            (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        )

    def range_text(self) -> str:
        """The range as it follows "must be". A maximum never comes without a minimum."""
        low = f"{self.min:g} or more" if self.above is None else f"above {self.above:g}"
        if self.max is None and self.below is None:
            return low
        return f"{low} and {f'at most {self.max:.10g}' if self.below is None else f'below {self.below:.10g}'}"


@dataclass(frozen=True)
class Group:
    """Options of one concern, under one title in `--help` and in the option reference."""

    title: str
    title_ja: str
    options: tuple[Option, ...]


def path(text: str) -> str:
    """A path as it stands. An empty one means not given (`normalize_options` makes it None)."""
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


TYPE_NAMES: dict[Callable[[str], object], str] = {
    str: "text",
    path: "a path",
    int: "a whole number",
    finite: "a number",
    int_or_float: 'a number of steps, a fraction or a percentage such as "10%"',
    int_or_auto: 'a whole number or "auto"',
    bool: "true or false",
}
METAVARS: dict[Callable[[str], object], str] = {
    str: "TEXT",
    path: "PATH",
    int: "N",
    finite: "X",
    int_or_float: "N|X|N%",
    int_or_auto: "N|auto",
}


def read_value(option: Option, text: str) -> object:
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


def check_choice(option: Option, value: object) -> None:
    """Raises ValueError where `value` is none of the option's choices."""
    if option.choices is not None and value not in option.choices:
        listed = ", ".join(str(choice) for choice in option.choices)
        raise ValueError(f"it must be one of {listed}, but it is {str(value)!r}")
